"""Decoding against ``whisper.decode`` on random weights and Whisper's own vocabularies, and what surrounds it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_weights import filled, set_weights, whisper_weights
from test_speech_tokenizer import NANO

from converters.whisper_text import build
from ichigo_jax.decoding import whisper as decoding_loop
from ichigo_jax.errors import InputError
from ichigo_jax.inference.decoding_options import WHISPER_DEFAULTS, DecodingOptions, DecodingResult
from ichigo_jax.inference.transcription import Transcriber
from ichigo_jax.models.speech_tokenizer import SpeechTokenizerModel
from ichigo_jax.models.split import SplitModel
from ichigo_jax.text.whisper import WhisperText

MULTILINGUAL, ENGLISH_ONLY = 51_865, 51_864
CLIPS = 5


class Both:
    """The same decoder twice, and something to decode."""

    def __init__(self, n_vocab, folder):
        self.torch = pytest.importorskip("torch")
        self.whisper = pytest.importorskip("whisper")
        assert build(n_vocab, folder) is None
        self.text = WhisperText.from_folder(folder)
        config = dataclasses.replace(NANO, whisper=dataclasses.replace(NANO.whisper, n_vocab=n_vocab, n_text_ctx=48))
        self.config = config.whisper
        self.torch.manual_seed(0)
        dims = {key: value for key, value in dataclasses.asdict(config.whisper).items() if key != "layer_norm_eps"}
        self.reference = self.whisper.model.Whisper(self.whisper.model.ModelDimensions(**dims)).eval()
        decoder = self.reference.decoder
        self.torch.nn.init.normal_(decoder.positional_embedding, std=1.0)  # so that the answer changes from step to step
        with self.torch.no_grad():
            decoder.token_embedding.weight[self.text.end] *= 3.5  # so that answers end, some early and some late
        model = filled(lambda rngs: SpeechTokenizerModel(config, rngs))
        set_weights(model.whisper, whisper_weights(self.reference, config.whisper))
        self.decoder = SplitModel(model.whisper.decoder)
        self.states = (10.0 * np.random.default_rng(2).normal(size=(CLIPS, 40, 32))).astype(np.float32)

    def transcriber(self, options):
        return Transcriber(self.decoder, self.config, self.text, options)

    def ours(self, options, states=None):
        states = jnp.asarray(self.states if states is None else states)
        transcriber = self.transcriber(options)
        languages = [options.language] * len(states) if options.language else transcriber.detect_languages(states)
        return transcriber(states, languages, range(len(states)))

    def theirs(self, options):
        """Clip by clip: in a batch theirs may depend on each other, see ``beam_search``."""
        named = {field.name for field in dataclasses.fields(self.whisper.DecodingOptions)}
        chosen = {name: value for name, value in dataclasses.asdict(options).items() if name in named}
        chosen |= {"temperature": 0.0, "best_of": None, "suppress_tokens": list(options.suppress_tokens)}
        chosen = self.whisper.DecodingOptions(**chosen, without_timestamps=True, fp16=False)
        return [self.whisper.decode(self.reference, self.torch.tensor(row[None]), chosen)[0] for row in self.states]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return Both(MULTILINGUAL, tmp_path_factory.mktemp("multilingual"))


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    return Both(ENGLISH_ONLY, tmp_path_factory.mktemp("english"))


def assert_same(found, expected):
    assert [list(result.tokens) for result in found] == [result.tokens for result in expected]
    for ours, theirs in zip(found, expected):
        assert ours.language == theirs.language
        assert ours.compression_ratio == pytest.approx(theirs.compression_ratio, abs=0.2)  # of text with special tokens in it
        assert ours.avg_logprob == pytest.approx(theirs.avg_logprob, abs=1e-4)
        assert ours.no_speech_prob == pytest.approx(theirs.no_speech_prob, rel=1e-4)


OPTIONS = {
    "greedy": {},
    "all_may_be_written": {"suppress_tokens": (), "suppress_blank": False, "sample_len": 9},
    "prompt_and_prefix": {
        "prompt": "Ngô Ý, earlier: text that is long enough to be cut. " * 3,
        "prefix": "So we",
        "sample_len": 20,
    },
    "detected": {"language": None, "task": "translate"},
    "beam": {"beam_size": 3},
    "impatient": {"beam_size": 4, "patience": 0.5, "length_penalty": 0.7, "suppress_tokens": (-1, 100, 200)},
    "patient": {"beam_size": 2, "patience": 2.0, "prefix": "And"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_equal_openai_whisper(both, name):
    options = WHISPER_DEFAULTS.replace(**{"language": "vi"} | OPTIONS[name])
    found, expected = both.ours(options), both.theirs(options)
    assert_same(found, expected)
    lengths = {len(result.tokens) for result in found}
    assert len(lengths) > 1 and max(lengths) > 4, "some end, and not all at the same step"
    assert len({result.tokens for result in found}) == CLIPS
    if name == "detected":
        assert len({result.language for result in found}) > 1


def test_english_only_tokens_equal_openai_whisper(english):
    options = WHISPER_DEFAULTS.replace(language=None, prompt="earlier")
    assert english.transcriber(options).detect_languages(english.states) == ["en"] * CLIPS
    assert_same(english.ours(options), english.theirs(dataclasses.replace(options, language="en")))
    with pytest.raises(InputError, match="language 'vi'"):
        english.ours(WHISPER_DEFAULTS.replace(language="vi"))


def test_lists_of_ids_equal_openai_whisper(both, english):
    for side, multilingual in ((both, True), (english, False)):
        reference = side.whisper.tokenizer.get_tokenizer(multilingual, language="en", task="transcribe")
        assert side.text.non_speech == reference.non_speech_tokens
        assert side.text.prompt == list(reference.sot_sequence_including_notimestamps)
        assert (side.text.previous, side.text.no_speech) == (reference.sot_prev, reference.no_speech)
        assert sorted(side.text.blank) == sorted([*reference.encode(" "), reference.eot])
    languages = side.whisper.tokenizer.LANGUAGES
    assert both.text.languages.keys() == set(list(languages)[:99]) and not english.text.languages


def test_a_row_does_not_depend_on_the_others(both):
    options = WHISPER_DEFAULTS.replace(temperature=(0.7,), best_of=2, sample_len=8)
    together = both.ours(options)
    assert both.ours(options) == together, "the same every time"
    transcriber = both.transcriber(options)
    for row in (0, 3):
        # Rows past the languages only fill up the batch.
        (alone,) = transcriber(jnp.asarray(np.roll(both.states, -row, axis=0)), ["en"], [row])
        assert alone.tokens == together[row].tokens
        assert alone.avg_logprob == pytest.approx(together[row].avg_logprob, abs=1e-5)
    assert transcriber(jnp.asarray(both.states), ["en"], [7])[0].tokens != together[0].tokens, "another number, other luck"


def test_sampling_follows_the_temperature(both):
    choose = dict(sample_len=6, compression_ratio_threshold=None, logprob_threshold=None)
    greedy = both.ours(WHISPER_DEFAULTS.replace(**choose))
    cold = both.ours(WHISPER_DEFAULTS.replace(temperature=(1e-5,), **choose))
    assert [result.tokens for result in cold] == [result.tokens for result in greedy]
    one = both.ours(WHISPER_DEFAULTS.replace(temperature=(1.0,), **choose))
    best = both.ours(WHISPER_DEFAULTS.replace(temperature=(1.0,), best_of=8, **choose))
    mean = lambda results: np.mean([result.avg_logprob for result in results])  # noqa: E731
    assert mean(one) < mean(best) < mean(greedy)


def test_only_what_fails_is_tried_again(both, monkeypatch):
    asked = []
    sample = decoding_loop.sample
    monkeypatch.setattr(
        decoding_loop, "sample", lambda *args, **sizes: asked.append(len(args[1].states)) or sample(*args, **sizes)
    )
    choose = dict(sample_len=6, compression_ratio_threshold=None, no_speech_threshold=None)
    greedy = both.ours(WHISPER_DEFAULTS.replace(logprob_threshold=None, **choose))
    threshold = sorted(result.avg_logprob for result in greedy)[2]  # two fail
    asked.clear()
    options = WHISPER_DEFAULTS.replace(temperature=(0.0, 1e-5, 1e-4), logprob_threshold=threshold, **choose)
    found = both.ours(options)
    assert asked == [CLIPS, 2, 2]
    failed = [result.avg_logprob < threshold for result in greedy]
    assert [result.temperature for result in found] == [1e-4 if fault else 0.0 for fault in failed]
    assert [result.tokens for result in found] == [result.tokens for result in greedy]


def result(text="ok", avg_logprob=-0.5, no_speech_prob=0.0):
    return DecodingResult((), text, "en", 0.0, avg_logprob, no_speech_prob)


@pytest.mark.parametrize(
    ("found", "again", "silent"),
    [
        (result(), False, False),
        (result("la " * 40), True, False),
        (result(avg_logprob=-1.1), True, False),
        (result(avg_logprob=-1.1, no_speech_prob=0.7), False, True),
        (result(avg_logprob=-0.9, no_speech_prob=0.7), False, False),
        (result(avg_logprob=-1.1, no_speech_prob=math.nan), True, False),
        (result("la " * 40, avg_logprob=-1.1, no_speech_prob=0.7), False, True),
    ],
)
def test_thresholds_are_those_of_whisper_transcribe(found, again, silent):
    assert (found.needs_fallback(WHISPER_DEFAULTS), found.is_silence(WHISPER_DEFAULTS)) == (again, silent)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"task": "sing"}, "task 'sing'"),
        ({"temperature": ()}, "temperature"),
        ({"temperature": (-0.1,)}, "temperature"),
        ({"beam_size": 0}, "beam_size 0 found, expected at least 1"),
        ({"patience": 1.0}, "patience 1.0 found with beam_size None"),
        ({"beam_size": 2, "patience": 0.1}, "patience"),
        ({"length_penalty": 1.5}, "length_penalty 1.5 found, expected 0 to 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        WHISPER_DEFAULTS.replace(**wrong)
    assert all(field.default is dataclasses.MISSING for field in dataclasses.fields(DecodingOptions))


def test_options_must_fit_the_decoder(both):
    for wrong, message in [
        ({"suppress_tokens": (60_000,)}, "suppress_tokens 60000 found"),
        ({"prefix": "word " * 60}, "prompt of 64 tokens found, expected at most the decoder's context, 48"),
    ]:
        with pytest.raises(InputError, match=message):
            both.transcriber(WHISPER_DEFAULTS.replace(**wrong))


def test_batches_of_a_size_share_a_program(both):
    options = WHISPER_DEFAULTS.replace(sample_len=5)
    both.ours(options, both.states[:4])
    compiled = decoding_loop.sample.compiled_programs()
    for language in ("en", "vi"):
        both.ours(dataclasses.replace(options, language=language), both.states[1:])
    both.transcriber(options)(jax.numpy.asarray(both.states[:4]), ["de"] * 3, [9, 8, 7])
    assert decoding_loop.sample.compiled_programs() == compiled
