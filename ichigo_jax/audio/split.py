"""Long clips to pieces that an encoder of 30 seconds can take, cut where it is quiet."""

from __future__ import annotations

import math

import numpy as np

from ichigo_jax.audio.decode import SAMPLE_RATE

# What the original package cuts at (``ichigo.asr.transcriber``); callers pass them on.
TARGET_SECONDS = 20.0
SEARCH_SECONDS = 1.0
WINDOW_SECONDS = 0.1
MAX_SECONDS = 30.0  # for sound tokens; transcription, whose quality falls near the 30 s edge, passes TARGET_SECONDS


def split_at_silences(
    samples: np.ndarray,
    *,
    target_seconds: float,
    search_seconds: float,
    window_seconds: float,
    max_seconds: float,
    multiple: int,
) -> list[np.ndarray]:
    """Cuts a clip into pieces; put together again they are the clip, sample for sample.

    A clip that is too long is cut in the middle of the quietest window around the target mark, and the same is done to
    the rest. Where several windows are equally quiet the first is taken.

    Args:
      samples: [T] at 16 kHz.
      target_seconds: the mark, counted from the last cut.
      search_seconds: how far from the mark to look, less than ``target_seconds``; also the shortest last piece.
      window_seconds: length of the windows whose energy is compared.
      max_seconds: a clip no longer than this stays whole; at least ``target_seconds``.
      multiple: every piece but the last has a multiple of so many samples; with the samples of one sound token, the
        pieces have as many tokens as the clip.

    Returns:
      the pieces, views of ``samples``.
    """
    assert search_seconds < target_seconds <= max_seconds, f"{search_seconds=} {target_seconds=} {max_seconds=}"
    pieces = []
    while len(samples) > max_seconds * SAMPLE_RATE:
        first = (target_seconds - search_seconds) * SAMPLE_RATE
        last = min((target_seconds + search_seconds) * SAMPLE_RATE, len(samples) - search_seconds * SAMPLE_RATE)
        cut = _quietest(samples, first, last, round(window_seconds * SAMPLE_RATE), multiple)
        pieces.append(samples[:cut])
        samples = samples[cut:]
    return [*pieces, samples]


def _quietest(samples: np.ndarray, first: float, last: float, window: int, multiple: int) -> int:
    """The multiple of ``multiple`` in [first, last] with the least energy in the window around it."""
    start = math.ceil(first / multiple) * multiple
    cuts = range(start, max(int(last), start) + 1, multiple)
    energies = [np.square(samples[cut - window // 2 : cut + window // 2], dtype=np.float64).mean() for cut in cuts]
    return cuts[int(np.argmin(energies))]
