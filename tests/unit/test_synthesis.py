"""The world of spoken requests, the voices, and the corpus that they make."""

import filecmp
import itertools
import json
import random
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import soundfile

from ichigo_jax import synthesize as command
from ichigo_jax.audio.decode import SAMPLE_RATE, load_audio
from ichigo_jax.errors import InputError
from ichigo_jax.synthesis import espeak, spoken_corpus
from ichigo_jax.synthesis.espeak import MARGIN_SECONDS, Voice, synthesize
from ichigo_jax.synthesis.spoken_requests import DIGITS, Request, requests

SPLITS = ("train", "heldout", "heldout_voice")
PLAIN = Voice("plain", "en-us", "", rate_wpm=190, pitch=50)
needs_espeak = pytest.mark.skipif(find_spec("espeakng_loader") is None, reason="needs espeakng-loader")


# The requests


def test_there_are_enough_requests_of_enough_kinds_and_words():
    everything = requests()
    assert 1000 <= len(everything) <= 2500
    assert len({request.kind for request in everything}) == 5
    assert len({word for request in everything for word in request.text.split()}) >= 45


def test_requests_are_distinct_plain_and_short():
    everything = requests()
    assert len({request.text for request in everything}) == len(everything)
    for request in everything:
        assert f"{request.text} {request.answer}".replace(" ", "").isalpha()
        assert request.text == request.text.lower() and request.answer == request.answer.lower()
        assert 1 <= len(request.answer.split()) <= 8


def test_requests_are_always_the_same():
    assert requests() == requests()


def test_every_fact_is_asked_for_in_several_wordings():
    facts = sorted((request.kind, request.answer) for request in requests())
    assert all(len(list(wordings)) >= 2 for _, wordings in itertools.groupby(facts))


@pytest.mark.parametrize(
    "text, answer, kind",
    [
        ("turn on the kitchen light", "okay the kitchen light is on", "device"),
        ("please switch the garden radio off", "okay the garden radio is off", "device"),
        ("what is three plus four", "three plus four is seven", "sum"),
        ("add zero and nine", "zero plus nine is nine", "sum"),
        ("tell me the opposite of cold", "the opposite of cold is hot", "opposite"),
    ],
)
def test_what_is_answered(text, answer, kind):
    assert Request(text, answer, kind) in requests()


def test_sums_and_digit_strings_are_right():
    for request in requests():
        words = request.text.split()
        numbers = [DIGITS.index(word) for word in words if word in DIGITS]
        answered = [DIGITS.index(word) for word in request.answer.split() if word in DIGITS]
        if request.kind == "repeat":
            assert answered == numbers
        if request.kind == "backwards":
            assert answered == numbers[::-1]
        if request.kind == "sum":
            a, b, result = answered
            assert result == a + b
            assert numbers == [a, b]


# The split


def test_heldout_sentences_are_not_in_training_but_their_facts_are():
    training, heldout = spoken_corpus.split_requests(200, seed=1)
    assert len(heldout) == 200 and len(training) + len(heldout) == len(requests())
    assert not {request.text for request in training} & {request.text for request in heldout}
    facts = {(request.kind, request.answer) for request in training}
    assert all((request.kind, request.answer) in facts for request in heldout)


def test_the_split_follows_the_seed():
    assert spoken_corpus.split_requests(20, seed=1) == spoken_corpus.split_requests(20, seed=1)
    assert spoken_corpus.split_requests(20, seed=1) != spoken_corpus.split_requests(20, seed=2)


@pytest.mark.parametrize("number", [0, -1, 5000])
def test_too_few_or_too_many_heldout_sentences(number):
    with pytest.raises(InputError, match=f"--heldout-sentences: found {number}, expected 1 to"):
        spoken_corpus.split_requests(number, seed=0)


# The voices


def spectrum(samples):
    """Mean power in 32 bands of 250 Hz, in decibels."""
    power = np.square(np.abs(np.fft.rfft(samples, 2 * SAMPLE_RATE)))[: 32 * 500]
    return 10 * np.log10(power.reshape(32, 500).mean(1))


@needs_espeak
def test_speech_has_the_length_level_and_band_of_speech():
    samples = synthesize("turn on the kitchen light", PLAIN)
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert 0.8 < len(samples) / SAMPLE_RATE < 2.0
    assert 0.02 < np.sqrt(np.square(samples).mean()) < 0.3 and np.abs(samples).max() <= 1.0
    bands = spectrum(samples)
    assert bands[1:4].mean() > bands[24:].mean() + 20  # vowels far above the top


def test_silence_is_trimmed_to_the_margin(monkeypatch):
    sound = 0.5 * np.ones(4000, np.float32)
    margin = round(MARGIN_SECONDS * SAMPLE_RATE)
    for before, after, expected in ((9000, 5000, 4000 + 2 * margin), (300, 5000, 4300 + margin), (0, 0, 4000)):
        spoken = np.concatenate([np.full(before, 1e-3, np.float32), sound, np.full(after, 1e-3, np.float32)])
        monkeypatch.setattr(espeak, "_speak", lambda text, voice, spoken=spoken: (spoken, SAMPLE_RATE))
        trimmed = synthesize("anything", PLAIN)
        assert len(trimmed) == expected
        np.testing.assert_array_equal(trimmed[trimmed > 0.1], sound)


@needs_espeak
def test_the_same_words_sound_the_same_whatever_came_before():
    first = synthesize("say four seven two backwards", spoken_corpus.TRAINING_VOICES[1])
    for voice in spoken_corpus.TRAINING_VOICES:
        synthesize("what is three plus four", voice)
    np.testing.assert_array_equal(synthesize("say four seven two backwards", spoken_corpus.TRAINING_VOICES[1]), first)


@needs_espeak
def test_voices_differ():
    voices = [*spoken_corpus.TRAINING_VOICES, spoken_corpus.HELDOUT_VOICE]
    assert spoken_corpus.HELDOUT_VOICE not in spoken_corpus.TRAINING_VOICES
    spectra = [spectrum(synthesize("what is the opposite of happy", voice)) for voice in voices]
    for one, other in itertools.combinations(spectra, 2):
        assert np.abs(one - other).mean() > 1.5  # dB


@needs_espeak
def test_rate_and_pitch_are_heard():
    def with_(**changes):
        return synthesize("what is three plus four", Voice(**{**vars(PLAIN), **changes}))

    assert len(with_(rate_wpm=160)) > 1.1 * len(with_(rate_wpm=220))
    assert not np.array_equal(with_(pitch=30)[:8000], with_(pitch=70)[:8000])


@needs_espeak
def test_every_request_is_short_at_the_plain_rate():
    longest = sorted(requests(), key=lambda request: len(request.text))[-12:]
    spoken = [request for request in requests() if request.kind == "backwards"][-12:]
    for request in longest + spoken:
        assert len(synthesize(request.text, PLAIN)) / SAMPLE_RATE < 2.2, request.text


@needs_espeak
@pytest.mark.parametrize("voice", [Voice("x", "klingon-x", "", 190, 50), Voice("x", "", "", 190, 50)])
def test_a_voice_that_does_not_exist(voice):
    with pytest.raises(InputError, match="espeak-ng has no voice"):
        synthesize("hello", voice)
    assert len(synthesize("hello", PLAIN))  # and the engine goes on


@needs_espeak
def test_a_text_that_cannot_be_spoken():
    with pytest.raises(InputError, match="'plain' says nothing for the text ' '"):
        synthesize(" ", PLAIN)


def test_without_the_engine_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(InputError, match="pip install espeakng-loader"):
        synthesize("hello", PLAIN)


# The corpus


def read(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    folder = tmp_path_factory.mktemp("synthesis") / "corpus"
    spoken_corpus.write_corpus(folder, utterances=40, heldout_sentences=8, seed=5)
    return folder


def test_rows_and_clips_agree(corpus):
    answers = {request.text: (request.answer, request.kind) for request in requests()}
    paths = [row["path"] for split in SPLITS for row in read(corpus, split)]
    assert sorted(paths) == sorted(f"audio/{file.name}" for file in (corpus / "audio").iterdir())
    for row in (row for split in SPLITS for row in read(corpus, split)):
        assert list(row) == ["path", "seconds", "text", "answer", "kind", "voice"]
        assert (row["answer"], row["kind"]) == answers[row["text"]]
        information = soundfile.info(corpus / row["path"])
        assert (information.samplerate, information.channels, information.subtype) == (SAMPLE_RATE, 1, "PCM_16")
        samples = load_audio(corpus / row["path"], 2.6, 1 << 20)
        assert row["seconds"] == pytest.approx(len(samples) / SAMPLE_RATE, abs=1e-4)
        assert np.sqrt(np.square(samples).mean()) > 0.02


def test_sentences_and_one_voice_are_held_out(corpus):
    train, heldout, heldout_voice = (read(corpus, split) for split in SPLITS)
    assert (len(train), len(heldout), len(heldout_voice)) == (40, 8, 8)
    assert not {row["text"] for row in train} & {row["text"] for row in heldout}
    assert [row["text"] for row in heldout] == [row["text"] for row in heldout_voice]
    training_voices = {voice.name for voice in spoken_corpus.TRAINING_VOICES}
    assert {row["voice"] for row in train} == training_voices
    assert {row["voice"] for row in heldout} <= training_voices
    assert {row["voice"] for row in heldout_voice} == {spoken_corpus.HELDOUT_VOICE.name}


def test_the_summary(corpus):
    summary = json.loads((corpus / "corpus.json").read_text())
    rows = [row for split in SPLITS for row in read(corpus, split)]
    assert summary["seed"] == 5
    assert summary["utterances"] == {"train": 40, "heldout": 8, "heldout_voice": 8}
    assert summary["words"] == len({word for row in rows for word in row["text"].split()})
    assert summary["longest_seconds"] == max(row["seconds"] for row in rows)
    assert summary["seconds"] == pytest.approx(sum(row["seconds"] for row in rows), abs=0.1)
    assert [voice["name"] for voice in summary["training_voices"]] == [voice.name for voice in spoken_corpus.TRAINING_VOICES]


def test_the_same_seed_gives_the_same_bytes(corpus, tmp_path):
    spoken_corpus.write_corpus(tmp_path / "again", utterances=40, heldout_sentences=8, seed=5)
    names = [str(file.relative_to(corpus)) for file in sorted(corpus.rglob("*")) if file.is_file()]
    assert filecmp.cmpfiles(corpus, tmp_path / "again", names, shallow=False) == (names, [], [])
    assert len(list((tmp_path / "again").rglob("*.*"))) == len(names)
    spoken_corpus.write_corpus(tmp_path / "other", utterances=4, heldout_sentences=2, seed=6)
    assert read(tmp_path / "other", "train") != read(corpus, "train")[:4]


@needs_espeak
def test_sentences_come_again_when_there_are_more_utterances(monkeypatch, tmp_path):
    few = random.Random(0).sample(requests(), 6)
    monkeypatch.setattr(spoken_corpus, "requests", lambda: list(few))
    spoken_corpus.write_corpus(tmp_path / "corpus", utterances=10, heldout_sentences=1, seed=0)
    texts = [row["text"] for row in read(tmp_path / "corpus", "train")]
    assert len(texts) == 10 and len(set(texts)) == 5 and texts[:5] == texts[5:]


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        command.main([str(argument) for argument in arguments])
    return end.value.code


@needs_espeak
def test_the_command(tmp_path, capsys):
    assert run("--output", tmp_path / "corpus", "--smoke", "--heldout-sentences", 5) == 0
    assert "250 clips, " in capsys.readouterr().out  # 240 of --smoke, and twice 5
    assert run("--output", tmp_path / "corpus", "--smoke") == 2
    assert "corpus: exists already" in capsys.readouterr().err
    assert run("--output", tmp_path / "none", "--utterances", 0) == 2
    assert "error: --utterances: found 0, expected at least 1" in capsys.readouterr().err


@needs_espeak
def test_nothing_is_left_of_a_corpus_that_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(spoken_corpus, "TRAINING_VOICES", [Voice("x", "klingon-x", "", 190, 50)])
    assert run("--output", tmp_path / "corpus", "--smoke") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: espeak-ng has no voice 'klingon-x'")
    assert list(tmp_path.iterdir()) == []
