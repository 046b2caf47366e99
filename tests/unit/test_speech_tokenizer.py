"""The speech tokenizer as a whole: clips to codes, states and text, against the originals' pipeline and on its own."""

import dataclasses
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx
from reference_weights import filled, jitted, quantizer_weights, set_weights, whisper_weights

from ichigo_jax import SpeechTokenizer, configuration
from ichigo_jax.audio import ahead
from ichigo_jax.audio.decode import AudioError
from ichigo_jax.data import audio_files
from ichigo_jax.errors import InputError
from ichigo_jax.inference import speech_tokenizer
from ichigo_jax.inference.clips import ClipBatches, read_clips
from ichigo_jax.inference.decoding_options import WHISPER_DEFAULTS
from ichigo_jax.models.declare import cast_params
from ichigo_jax.models.quantizer import QuantizerConfig
from ichigo_jax.models.speech_tokenizer import SpeechTokenizerConfig, SpeechTokenizerModel
from ichigo_jax.models.whisper import WhisperConfig
from ichigo_jax.storage.model_folder import save_model
from ichigo_jax.text.train_tokenizer import train_whisper_tokenizer
from ichigo_jax.text.whisper import WhisperText

NANO = SpeechTokenizerConfig(
    whisper=WhisperConfig(
        n_mels=80,
        n_audio_ctx=40,
        n_audio_state=32,
        n_audio_head=2,
        n_audio_layer=1,
        n_vocab=300,
        n_text_ctx=12,
        n_text_state=32,
        n_text_head=2,
        n_text_layer=2,
        layer_norm_eps=1e-5,
    ),
    quantizer=QuantizerConfig(
        n_head=2,
        head_width=16,
        ffn_mult=4,
        depth=1,
        vq_codes=24,
        mask_code=24,
        num_quantizers=1,
        fsq_levels=None,
        codebook_dim=8,
        downsample=2,
        downsampling="mean",
        positions=40,
        codebook_decay=0.9,
        threshold_ema_dead_code=0.0,
        laplace_eps=1e-5,
        commitment_weight=1.0,
        statistics_over="all_frames",
        query_mult=2.0,
        rope=True,
        rope_base=10000.0,
        layer_norm_eps=1e-5,
        init_std=1.5,
        embeddings_std=0.045,
    ),
)
CONTEXT = 12800  # samples: 0.8 s
CODE = 640  # samples


def noise(seed, samples):
    """Something with a little melody, so that the codes differ."""
    random = np.random.default_rng(seed)
    time = np.arange(samples) / 16000
    pitch = 200 + 3000 * random.random(1 + samples // 1600).repeat(1600)[:samples]
    return (0.3 * np.sin(2 * np.pi * pitch * time) + 0.05 * random.normal(size=samples)).astype(np.float32)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "tokenizer"
    train_whisper_tokenizer(["turn on the light", "what is two plus two"], folder, 270)
    return folder


@pytest.fixture(scope="module")
def model():
    return filled(lambda rngs: SpeechTokenizerModel(NANO, rngs))


@pytest.fixture(scope="module")
def tokenizer(model, text_folder):
    return SpeechTokenizer(model, NANO, WhisperText.from_folder(text_folder), batch_size=2)


@pytest.fixture(scope="module")
def folder(model, text_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "nano"
    save_model(folder, "speech_tokenizer", NANO, nnx.to_pure_dict(nnx.state(model)), {"source": "a test"}, text_folder)
    return folder


# ---- against the originals -------------------------------------------------------------------------------------------


def test_codes_equal_the_originals_pipeline(monkeypatch):
    torch = pytest.importorskip("torch")
    whisper = pytest.importorskip("whisper")
    monkeypatch.setitem(sys.modules, "torchaudio", types.ModuleType("torchaudio"))
    quantizer_class = pytest.importorskip("ichigo.asr.arch.quantizer").Quantizer
    config = SpeechTokenizerConfig(
        whisper=dataclasses.replace(NANO.whisper, n_audio_ctx=1500),
        quantizer=dataclasses.replace(NANO.quantizer, positions=1500),
    )
    torch.manual_seed(0)
    dims = {key: value for key, value in dataclasses.asdict(config.whisper).items() if key != "layer_norm_eps"}
    reference = whisper.model.Whisper(whisper.model.ModelDimensions(**dims)).eval()
    torch.nn.init.normal_(reference.decoder.positional_embedding, std=0.1)
    values = dataclasses.asdict(config.quantizer) | {"q_depth": 1, "use_cosine_sim": True, "mask_embs": True}
    quantizer = quantizer_class({"quantizer": values | {"downsample_conv": False, "downsample_mean": True}}).eval()
    ours = nnx.eval_shape(lambda: SpeechTokenizerModel(config, nnx.Rngs(0)))
    set_weights(ours.whisper, whisper_weights(reference, config.whisper))
    set_weights(ours.quantizer, quantizer_weights(quantizer, config.quantizer))

    clips = [noise(1, 51_234), noise(2, 16_000 * 30 + 159), noise(3, 2000)]
    found = SpeechTokenizer(ours, config, None, batch_size=4).encode([clips[0], clips[1][:480_000], clips[2]])
    for clip, codes in zip(clips, found):
        mel = whisper.log_mel_spectrogram(torch.tensor(clip))[None, :, :3000]
        frames = mel.shape[-1]
        mel = torch.nn.functional.pad(mel, (0, 3000 - frames), value=-1.5)
        with torch.no_grad():
            expected = quantizer(reference.encoder(mel), frames, return_stoks=True)[0].numpy()
        np.testing.assert_array_equal(codes, expected)
    assert len(found[1]) == 750 and len(found[2]) == 3
    assert len(np.unique(found[0])) > 3


# ---- batches, lengths, folders ---------------------------------------------------------------------------------------


def test_a_batch_gives_what_each_clip_gives_alone(tokenizer):
    clips = [noise(seed, length) for seed, length in enumerate([CONTEXT, 700, 5000, 9999, 12799, 1, 640])]
    together = tokenizer.encode(clips)
    # A code needs four whole frames of 160 samples.
    assert [len(codes) for codes in together] == [20, 1, 7, 15, 19, 0, 1]
    assert all(codes.dtype == np.int32 for codes in together)
    for clip, codes in zip(clips, together):
        np.testing.assert_array_equal(tokenizer.encode([clip])[0], codes)
    assert tokenizer.encode([]) == []


def test_long_clips_lose_nothing(tokenizer):
    clip = noise(1, 5 * CONTEXT + 321)
    clip[10_000:10_600] = 0.0  # quiet near the first mark, two thirds of a context: 8533
    (codes,) = tokenizer.encode([clip])
    assert len(codes) == len(clip) // CODE
    batches = ClipBatches(CONTEXT, CODE, batch_size=2)
    pieces = [piece.samples for piece in batches.pieces([clip], batches.context_seconds)]
    assert len(pieces) > 5 and max(map(len, pieces)) <= CONTEXT
    np.testing.assert_array_equal(np.concatenate(pieces), clip)
    np.testing.assert_array_equal(np.concatenate(tokenizer.encode(pieces)), codes)


def test_files_and_arrays_are_the_same(tokenizer, tmp_path):
    clip = noise(1, 8000)
    soundfile.write(tmp_path / "clip.wav", clip, 16000, subtype="FLOAT")
    from_file, from_name, from_array = tokenizer.encode([tmp_path / "clip.wav", str(tmp_path / "clip.wav"), clip])
    np.testing.assert_array_equal(from_file, from_array)
    np.testing.assert_array_equal(from_name, from_array)
    with pytest.raises(AudioError, match="clip 1: found no samples"):
        tokenizer.encode([clip, clip[:0]])
    with pytest.raises(AudioError, match="missing.wav: no such file"):
        tokenizer.transcribe([tmp_path / "missing.wav"])


def test_codes_beyond_a_clip_are_the_mask_code(model):
    samples = np.stack([noise(1, CONTEXT), noise(2, CONTEXT)])
    codes = jitted(model, "tokenize")(samples, np.array([CONTEXT, 3 * CODE + 100]))
    assert codes.shape == (2, 20, 1)
    assert (codes[1, 3:] == 24).all() and not (codes[0] == 24).all()


def test_several_quantizers_give_columns(text_folder):
    config = dataclasses.replace(NANO, quantizer=dataclasses.replace(NANO.quantizer, num_quantizers=3))
    tokenizer = SpeechTokenizer(filled(lambda rngs: SpeechTokenizerModel(config, rngs)), config, None)
    (codes,) = tokenizer.encode([noise(1, 6400)])
    assert codes.shape == (10, 3)
    assert tokenizer.dequantize([codes]).shape == (1, 40, 32)


def test_dequantize(tokenizer, model):
    codes = tokenizer.encode([noise(1, CONTEXT), noise(2, 5000), noise(3, 9000)])
    states = tokenizer.dequantize(codes)
    assert states.shape == (3, 40, 32) and states.dtype == np.float32
    shorter = jitted(model, "states_from_codes")(codes[1][None, :, None])
    np.testing.assert_allclose(states[1:2], shorter, atol=1e-5)
    assert tokenizer.dequantize([]).shape == (0, 40, 32)
    for wrong, message in [
        ([25], "sound code 25 found, expected 0 to 24"),
        ([-1], "sound code -1 found"),
        ([0] * 21, "21 codes found, expected at most 20"),
        ([0.5], "type float64"),
        ([[0, 1]], "1 quantisers"),
    ]:
        with pytest.raises(InputError, match=message):
            tokenizer.dequantize([np.array(wrong)])


def test_transcribe_is_the_decoders_greedy_answer(tokenizer, model):
    clips = [noise(0, 3000), noise(1, 6000), noise(9, 2 * CONTEXT), noise(2, 5000)]
    texts = tokenizer.transcribe(clips)
    assert len(texts) == 4 and any(texts) and all("<|" not in text for text in texts)
    assert tokenizer.transcribe(clips[:2]) == texts[:2]
    # Step by step over whole sequences, without a cache.
    text, length = tokenizer.tokenizer, NANO.whisper.n_text_ctx
    states = jnp.asarray(tokenizer.dequantize(tokenizer.encode(clips[:2]))[:1])
    decode = jitted(model.whisper.decoder, "__call__")
    prompt, answer = list(text.prompt), []
    while len(answer) < length // 2 and text.end not in answer:
        ids = prompt + answer
        logits = np.array(decode(np.pad([ids], ((0, 0), (0, length - len(ids)))), states)[0, len(ids) - 1])
        logits[[*text.out_of_place, *text.non_speech, *range(text.size, NANO.whisper.n_vocab)]] = -np.inf
        if not answer:
            logits[list(text.blank)] = -np.inf
        answer.append(int(logits.argmax()))
    assert text.decode(answer) == texts[0]


@pytest.mark.parametrize("language", ["en", None])
def test_a_clip_too_short_for_a_code_has_no_text(tokenizer, language):
    short = [noise(seed, length) for seed, length in enumerate([1, 300, CODE - 1])]
    clips = [short[0], noise(0, 3000), *short[1:], noise(1, 6000)]
    texts = tokenizer.transcribe(clips, language=language)
    alone = tokenizer.transcribe([clips[1], clips[4]], language=language)
    assert all(alone) and texts == ["", alone[0], "", "", alone[1]]
    assert [len(codes) for codes in tokenizer.encode(short)] == [0, 0, 0]


def test_mixed_lengths_compile_two_programs(model):
    tokenizer = SpeechTokenizer(model, NANO, None, batch_size=4)
    compiled = speech_tokenizer.tokenize.compiled_programs()
    random = np.random.default_rng(0)
    clips = [noise(seed, int(random.integers(1, 3 * CONTEXT))) for seed in range(30)]
    found = list(tokenizer.encode_each(iter(clips)))
    assert [len(codes) for codes in found] == [NANO.code_count(len(clip)) for clip in clips]
    assert speech_tokenizer.tokenize.compiled_programs() - compiled <= 2  # full batches and the last one


def test_clips_are_read_a_few_ahead_only(tokenizer):
    taken = []

    def clips():
        for seed in range(200):
            taken.append(seed)
            yield noise(seed, 640)

    codes = tokenizer.encode_each(clips())
    next(codes)
    assert len(taken) < 100
    codes.close()


def test_files_and_arrays_may_take_turns(tmp_path):
    clips = [noise(seed, 500 + seed) for seed in range(6)]
    given = list(clips)
    for index in (0, 2, 3, 5):
        given[index] = tmp_path / f"{index}.wav"
        soundfile.write(given[index], clips[index], 16000, subtype="FLOAT")
    for expected, found in zip(clips, read_clips(given, max_seconds=1, max_bytes=1 << 20), strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(AudioError, match="clip 4: found no samples"):
        list(read_clips([*given[:4], clips[4][:0]], max_seconds=1, max_bytes=1 << 20))


def test_clips_that_were_read_are_not_read_ahead_again(monkeypatch, tmp_path):
    """``for_each_clip`` has decoded them ahead; another queue would keep as many clips in memory again."""
    rows = [{"path": str(tmp_path / f"{number}.wav")} for number in range(200)]
    for row in rows:
        soundfile.write(row["path"], noise(0, 640), 16000)
    read = []
    real = audio_files.read_clip
    monkeypatch.setattr(audio_files, "read_clip", lambda path, *bounds: [read.append(path), real(path, *bounds)][1])

    def lengths(clips):
        return ({"samples": len(clip)} for clip in read_clips(clips, max_seconds=1, max_bytes=1 << 20))

    outcomes = audio_files.for_each_clip(rows, lengths, max_seconds=1, max_bytes=1 << 20)
    next(outcomes)
    assert len(read) <= ahead.AHEAD + 1
    outcomes.close()


def test_options_and_language(tokenizer):
    clips = [noise(seed, 6000) for seed in range(3)]
    plain = tokenizer.transcribe(clips)
    assert tokenizer.transcribe(clips, WHISPER_DEFAULTS) == plain == tokenizer.transcribe(clips, language="English")
    short = WHISPER_DEFAULTS.replace(sample_len=2, language=None)
    assert short.sample_len == 2 and WHISPER_DEFAULTS.sample_len is None
    assert tokenizer.transcribe(clips, short) == tokenizer.transcribe(clips, short, language="en") != plain
    with pytest.raises(InputError, match="options 'vi' found, expected DecodingOptions; .* language='vi'"):
        tokenizer.transcribe(clips, "vi")
    with pytest.raises(InputError, match="decoding option 'beam' found, expected one of task, language"):
        WHISPER_DEFAULTS.replace(beam=5)
    with pytest.raises(InputError, match="beam_size 0 found"):
        WHISPER_DEFAULTS.replace(beam_size=0)


def test_prompts(text_folder):
    text = WhisperText.from_folder(text_folder)
    names = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    assert text.prompt == [text._tokenizer.special_id(name) for name in names]
    assert set(text.out_of_place) == {text.prompt[0], text.prompt[2]}
    assert text.languages == {"en": text.prompt[1]} and text.no_speech is text.previous is None
    assert text.decode([*text.encode(" turn on"), text.end, *text.encode("off")]) == "turn on"
    assert text.decode([*text.prompt, *text.encode("<|en|>")]) == "<|en|>", "spelled by the speaker, so it stays"
    assert set(text.encode("(")) <= set(text.non_speech)
    assert not set(text.encode(" two–four")) & set(text.non_speech), "bytes that other signs are made of"
    with pytest.raises(InputError, match="language 'vi' found"):
        text.prompt_in("vi")
    with pytest.raises(InputError, match="translate"):
        text.prompt_in("en", "translate")


def test_english_only_models_get_no_language_or_task():
    names = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|vi|>", "<|transcribe|>", "<|notimestamps|>"]

    def text(first):
        ids = {name: first + index for index, name in enumerate(names)}
        return WhisperText(types.SimpleNamespace(added=ids, size=first + 6, special_id=ids.__getitem__))

    assert text(50256).prompt == [50257, 50261]
    assert text(50257).prompt == [50258, 50259, 50261, 50262]
    assert text(50257).prompt_in("vi") == [50258, 50260, 50261, 50262]
    with pytest.raises(InputError, match="language 'vi' found"):
        text(50256).prompt_in("vi")


def test_folder_gives_the_same_tokenizer(folder, tokenizer):
    loaded = SpeechTokenizer.from_pretrained(folder, batch_size=2)
    assert loaded.config == NANO
    clips = [noise(seed, 7000) for seed in range(2)]
    for a, b in zip(loaded.encode(clips), tokenizer.encode(clips)):
        np.testing.assert_array_equal(a, b)
    assert loaded.transcribe(clips) == tokenizer.transcribe(clips)
    assert loaded.fingerprint == tokenizer.fingerprint


def test_half_precision_keeps_codebook_and_fingerprint(folder, tokenizer, model):
    loaded = SpeechTokenizer.from_pretrained(folder, dtype="bfloat16")
    assert loaded.arrays["whisper"]["encoder"]["norm"]["scale"].dtype == jnp.bfloat16
    assert loaded.arrays["quantizer"]["vq"]["codebook"]["embed"].dtype == jnp.float32
    assert loaded.fingerprint == tokenizer.fingerprint
    rounded = SpeechTokenizer(nnx.merge(nnx.graphdef(model), cast_params(nnx.state(model), jnp.bfloat16)), NANO, None)
    assert rounded.fingerprint != tokenizer.fingerprint
    clips = [noise(seed, CONTEXT) for seed in range(2)]
    same = np.concatenate(loaded.encode(clips)) == np.concatenate(tokenizer.encode(clips))
    assert same.mean() > 0.8  # random weights give close calls that trained ones do not
    loaded.transcribe(clips)


def test_what_cannot_be_used_is_refused(model, folder, text_folder, tmp_path):
    with pytest.raises(InputError, match="no text tokenizer"):
        SpeechTokenizer(model, NANO, None).transcribe([noise(1, 1000)])
    for dtype in ("float16", "float64", "int8"):
        with pytest.raises(InputError, match=f"dtype '{dtype}' found, expected float32 or bfloat16"):
            SpeechTokenizer.from_pretrained(folder, dtype=dtype)
    with pytest.raises(InputError, match="expected a model folder"):
        SpeechTokenizer.from_pretrained(tmp_path / "none")
    with pytest.raises(InputError, match="batch size 0"):
        SpeechTokenizer(model, NANO, None, batch_size=0)
    small = dataclasses.replace(NANO, whisper=dataclasses.replace(NANO.whisper, n_vocab=200))
    with pytest.raises(InputError, match="n_vocab 200"):
        SpeechTokenizer(model, small, WhisperText.from_folder(text_folder))


def test_a_quantizer_must_fit_its_whisper():
    with pytest.raises(InputError, match="width 48 .*expected Whisper's n_audio_state, 32"):
        dataclasses.replace(NANO, quantizer=dataclasses.replace(NANO.quantizer, n_head=3))
    with pytest.raises(InputError, match="44 positions found, expected Whisper's n_audio_ctx, 40"):
        dataclasses.replace(NANO, quantizer=dataclasses.replace(NANO.quantizer, positions=44))
    values = configuration.to_dict(NANO)
    assert configuration.from_dict(SpeechTokenizerConfig, values, "config") == NANO
