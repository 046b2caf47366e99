"""A Whisper by itself: in Python, in ``transcribe`` and in ``evaluate``; its text is that of ``whisper.decode``."""

import dataclasses
import json

import numpy as np
import pytest
import soundfile
from flax import nnx
from reference_weights import filled, set_weights, whisper_weights
from test_speech_tokenizer import NANO, noise

from converters.whisper_text import build
from ichigo_jax import PlainWhisper, SpeechTokenizer, evaluate, transcribe
from ichigo_jax.errors import InputError
from ichigo_jax.inference.decoding_options import WHISPER_DEFAULTS
from ichigo_jax.inference.plain_whisper import load_speech_to_text
from ichigo_jax.models.whisper import Whisper
from ichigo_jax.storage.model_folder import save_model

torch = pytest.importorskip("torch")
whisper = pytest.importorskip("whisper")
SHORT = WHISPER_DEFAULTS.replace(sample_len=8, logprob_threshold=None, no_speech_threshold=None)


@pytest.fixture(scope="module")
def reference():
    """openai-whisper's model with random weights and a context of 30 s."""
    config = dataclasses.replace(NANO.whisper, n_mels=80, n_vocab=51_865, n_text_ctx=24, n_audio_ctx=1500)
    torch.manual_seed(0)
    dims = {name: value for name, value in dataclasses.asdict(config).items() if name != "layer_norm_eps"}
    model = whisper.model.Whisper(whisper.model.ModelDimensions(**dims)).eval()
    torch.nn.init.normal_(model.decoder.positional_embedding, std=1.0)  # so that the answer changes from step to step
    with torch.no_grad():
        model.encoder.ln_post.weight *= 20.0  # and from clip to clip
    return config, model


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    config, theirs = reference
    folder = tmp_path_factory.mktemp("whisper")
    (folder / "texts").mkdir()
    assert build(config.n_vocab, folder / "texts") is None
    model = filled(lambda rngs: Whisper(config, rngs))
    set_weights(model, whisper_weights(theirs, config))
    state = nnx.to_pure_dict(nnx.state(model))
    save_model(folder / "model", "whisper", config, state, {"source": "a test"}, folder / "texts")
    return folder / "model"


def theirs(model, clip):
    """What ``whisper.decode`` finds in a clip that is padded to 30 s."""
    mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(clip))
    options = whisper.DecodingOptions(language="en", sample_len=8, without_timestamps=True, fp16=False)
    return whisper.decode(model, mel, options)


def test_text_is_that_of_openai_whisper(reference, folder):
    clips = [noise(seed, samples) for seed, samples in enumerate((16_000, 50_000, 300_001))]
    found = list(PlainWhisper.from_pretrained(folder).transcribe_each(clips, SHORT))
    for clip, (piece,) in zip(clips, found):
        expected = theirs(reference[1], clip)
        assert list(piece.tokens) == expected.tokens
        assert piece.avg_logprob == pytest.approx(expected.avg_logprob, abs=1e-4)
        assert piece.no_speech_prob == pytest.approx(expected.no_speech_prob, rel=1e-3)
    assert len({piece.tokens for (piece,) in found}) == 3


def test_long_and_short_clips(folder):
    model = PlainWhisper.from_pretrained(folder, batch_size=2)
    (pieces, none) = list(model.transcribe_each([noise(1, 50 * 16_000), noise(2, 319)], SHORT))
    assert len(pieces) == 3 and [piece.text for piece in none] == [""]
    assert model.transcribe([noise(2, 319)], SHORT) == [""] and model.transcribe([]) == []


def test_the_folder_says_which_model_it_is(folder, tmp_path):
    assert isinstance(load_speech_to_text(folder), PlainWhisper)
    with pytest.raises(InputError, match="expected a model of kind 'speech_tokenizer', found 'whisper'"):
        SpeechTokenizer.from_pretrained(folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"kind": "language_model"}')
    with pytest.raises(InputError, match="found a model of kind 'language_model', expected a speech tokenizer or a Whisper"):
        load_speech_to_text(tmp_path / "other")
    with pytest.raises(InputError, match="expected a model folder, found nothing"):
        load_speech_to_text(tmp_path / "none")


def test_commands_take_it(folder, tmp_path, capsys):
    clip = noise(3, 16_000)
    soundfile.write(tmp_path / "a.wav", clip, 16_000, subtype="FLOAT")
    (text,) = PlainWhisper.from_pretrained(folder).transcribe([clip])
    with pytest.raises(SystemExit) as ended:
        transcribe.main(["--model", str(folder), str(tmp_path / "a.wav")])
    assert ended.value.code == 0 and json.loads(capsys.readouterr().out)["text"] == text

    rows = [{"path": "a.wav", "text": text}, {"path": "gone.wav", "text": "x"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as ended:
        evaluate.main(
            ["speech-tokenizer", str(tmp_path / "rows.jsonl"), "--model", str(folder), "--output", str(tmp_path / "o.json")]
        )
    written = json.loads((tmp_path / "o.json").read_text())
    assert ended.value.code == 1 and written["metrics"] == {"wer": 0.0, "cer": 0.0, "unusable_clips": 1}
    assert "code_counts" not in written and np.isfinite(list(written["metrics"].values())).all()
