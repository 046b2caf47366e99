import numpy as np
import pytest

from ichigo_jax.audio.decode import SAMPLE_RATE
from ichigo_jax.audio.split import MAX_SECONDS, SEARCH_SECONDS, TARGET_SECONDS, WINDOW_SECONDS, split_at_silences

TOKEN = 640  # samples of one sound token


def split(samples, max_seconds=MAX_SECONDS):
    return split_at_silences(
        samples,
        target_seconds=TARGET_SECONDS,
        search_seconds=SEARCH_SECONDS,
        window_seconds=WINDOW_SECONDS,
        max_seconds=max_seconds,
        multiple=TOKEN,
    )


def noise(seconds):
    return np.random.default_rng(0).normal(0, 0.1, round(seconds * SAMPLE_RATE)).astype(np.float32)


@pytest.mark.parametrize("seconds", [0.001, 19.0, 30.0])
def test_what_is_not_too_long_stays_whole(seconds):
    samples = noise(seconds)
    (piece,) = split(samples)
    np.testing.assert_array_equal(piece, samples)


@pytest.mark.parametrize("seconds, max_seconds", [(30.01, 30.0), (61.7, 30.0), (20.0001, 20.0), (20.7, 20.0), (100.003, 20.0)])
def test_pieces_put_together_are_the_clip_and_have_as_many_tokens(seconds, max_seconds):
    samples = noise(seconds)
    pieces = split(samples, max_seconds)
    np.testing.assert_array_equal(np.concatenate(pieces), samples)
    assert len(pieces) >= 2
    assert all(len(piece) % TOKEN == 0 for piece in pieces[:-1])
    assert sum(len(piece) // TOKEN for piece in pieces) == len(samples) // TOKEN
    assert all(19.0 <= len(piece) / SAMPLE_RATE <= 21.04 for piece in pieces[:-1])
    assert 0.95 < len(pieces[-1]) / SAMPLE_RATE <= max_seconds  # never so little that nothing could be heard in it


def test_cuts_lie_in_the_silences_counted_from_the_last_cut():
    samples = noise(60.0)
    first, second = 19.3, 39.1  # 19.8 s after the first
    for start in (first, second):
        samples[round(start * SAMPLE_RATE) :][: round(0.3 * SAMPLE_RATE)] = 0
    pieces = split(samples, max_seconds=20.0)
    cuts = np.cumsum([len(piece) for piece in pieces]) / SAMPLE_RATE
    assert first < cuts[0] < first + 0.3
    assert second < cuts[1] < second + 0.3


def test_the_middle_of_the_quietest_window_is_cut():
    samples = np.ones(31 * SAMPLE_RATE, np.float32)
    cut = 500 * TOKEN  # at 20 s
    samples[cut - 800 : cut + 800] = 0.5  # one window that is quieter
    assert len(split(samples)[0]) == cut


def test_a_silence_out_of_reach_is_not_used():
    samples = noise(31.0)
    samples[15 * SAMPLE_RATE : 17 * SAMPLE_RATE] = 0
    assert 19.0 <= len(split(samples)[0]) / SAMPLE_RATE <= 21.0


def test_numbers_that_never_end_are_refused():
    with pytest.raises(AssertionError):
        split_at_silences(noise(1), target_seconds=1, search_seconds=2, window_seconds=0.1, max_seconds=3, multiple=TOKEN)
