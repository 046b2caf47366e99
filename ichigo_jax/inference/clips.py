"""Clips on their way to the device: read ahead, cut into pieces, put together in batches, and their results in order again."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ichigo_jax.audio.ahead import map_ahead
from ichigo_jax.audio.decode import SAMPLE_RATE, check_clip
from ichigo_jax.audio.split import SEARCH_SECONDS, TARGET_SECONDS, WINDOW_SECONDS, split_at_silences
from ichigo_jax.data.audio_files import read_clip
from ichigo_jax.errors import InputError
from ichigo_jax.inference.sizes import power_of_two

Audio = np.ndarray | str | os.PathLike

TARGET_OF_CONTEXT = 2 / 3  # long clips are cut near it: at 20 s of Whisper's 30

# Files are bounded before they are decoded whole.
MAX_SECONDS, MAX_BYTES = 4 * 3600.0, 2 << 30

Started = TypeVar("Started")
Result = TypeVar("Result")


def is_file(audio: Audio) -> bool:
    """Whether a clip is given by its file's name and not by its samples."""
    return isinstance(audio, str | os.PathLike)


def read_clips(audio: Iterable[Audio], max_seconds: float, max_bytes: int) -> Iterator[np.ndarray]:
    """Samples of clips that come one by one, in order.

    Threads decode files ahead of their use. Arrays are only checked, when their turn comes: whoever makes them from files
    (``data.audio_files.for_each_clip``) has read ahead already.

    Args:
      audio: 1-D float arrays at 16 kHz, or files.
      max_seconds, max_bytes: bounds of one file, see ``audio.load_audio``.

    Yields:
      float32 [T] at 16 kHz.

    Raises:
      AudioError: a clip that cannot be used.
    """

    def read(clip: tuple[int, Audio]) -> np.ndarray:
        return read_clip(clip[1], max_seconds, max_bytes)

    for files, clips in itertools.groupby(enumerate(audio), lambda clip: is_file(clip[1])):
        if files:
            yield from map_ahead(read, clips)
        else:
            yield from (check_clip(samples, f"clip {index}") for index, samples in clips)


class Piece(NamedTuple):
    """A clip, or a part of a long one."""

    samples: np.ndarray
    first: bool
    last: bool


class Batch(NamedTuple):
    """Pieces on their way to the device: samples [B, S] and lengths [B], of which rows after the last piece have 0."""

    pieces: list[Piece]
    samples: np.ndarray
    lengths: np.ndarray


@dataclasses.dataclass(frozen=True)
class ClipBatches:
    """How clips of any length become batches of one length.

    Batches are full, whatever the next clips are, but for the last, which is filled up to a power of two. So at most
    ``log2(batch_size) + 2`` programs are compiled for any number of clips.

    Attributes:
      context_samples: samples in a row of a batch, the most that run at once.
      samples_per_code: a long clip is cut at multiples of it, so that its pieces have as many codes as the clip.
      batch_size: the most pieces in a batch.
    """

    context_samples: int
    samples_per_code: int
    batch_size: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch size {self.batch_size} found, expected at least 1")

    @property
    def context_seconds(self) -> float:
        return self.context_samples / SAMPLE_RATE

    def pieces(self, clips: Iterable[np.ndarray], longest_seconds: float) -> Iterator[Piece]:
        """Cuts clips that are longer than ``longest_seconds`` where they are quiet. Nothing is left out."""
        target = min(TARGET_OF_CONTEXT * self.context_seconds, TARGET_SECONDS)
        for clip in clips:
            pieces = split_at_silences(
                clip,
                target_seconds=target,
                search_seconds=SEARCH_SECONDS / TARGET_SECONDS * target,
                window_seconds=WINDOW_SECONDS / TARGET_SECONDS * target,
                max_seconds=longest_seconds,
                multiple=self.samples_per_code,
            )
            for index, piece in enumerate(pieces):
                yield Piece(piece, first=index == 0, last=index == len(pieces) - 1)

    def batches(self, clips: Iterable[np.ndarray], longest_seconds: float) -> Iterator[Batch]:
        """The pieces of all clips, in order, a batch at a time."""
        pieces = self.pieces(clips, longest_seconds)
        while batch := list(itertools.islice(pieces, self.batch_size)):
            rows = min(power_of_two(len(batch)), self.batch_size)
            samples = np.zeros((rows, self.context_samples), np.float32)
            lengths = np.zeros(rows, np.int32)
            for row, piece in enumerate(batch):
                samples[row, : len(piece.samples)] = piece.samples
                lengths[row] = len(piece.samples)
            yield Batch(batch, samples, lengths)

    def run(
        self,
        clips: Iterable[np.ndarray],
        longest_seconds: float,
        start: Callable[[Batch], Started],
        finish: Callable[[Batch, Started], Iterable[Result]],
    ) -> Iterator[list[Result]]:
        """Runs all pieces, batch by batch.

        Args:
          clips: float32 [T] at 16 kHz, of any length.
          longest_seconds: the longest piece.
          start: sets the device to work on a batch. The next batch is made ready before ``finish`` waits for this one.
          finish: gives a result for every piece of the batch, in order.

        Yields:
          For each clip, in order, the results of its pieces.
        """

        def results() -> Iterator[tuple[Piece, Result]]:
            running: tuple[Batch, Any] | None = None
            for batch in self.batches(clips, longest_seconds):
                started = batch, start(batch)
                if running is not None:
                    yield from zip(running[0].pieces, finish(*running))
                running = started
            if running is not None:
                yield from zip(running[0].pieces, finish(*running))

        of_clip = []
        for piece, result in results():
            of_clip.append(result)
            if piece.last:
                yield of_clip
                of_clip = []
