"""What the commands that go over audio files share: their arguments, progress, faults and speed."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from ichigo_jax.arguments import above_zero, whole_number
from ichigo_jax.data.audio_files import Outcome, Row, for_each_clip, list_audio
from ichigo_jax.errors import one_line
from ichigo_jax.inference.clips import MAX_BYTES, MAX_SECONDS


def add_arguments(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """``--batch-size`` with its default, the bounds of a file, and the paths."""
    clips = whole_number("batch size", 1)
    parser.add_argument("--batch-size", type=clips, default=batch_size, metavar="N", help=f"clips at a time ({batch_size})")
    parser.add_argument(
        "--max-seconds", type=above_zero("length"), default=MAX_SECONDS, metavar="S", help="longest file that is decoded (4 h)"
    )
    parser.add_argument(
        "--max-bytes",
        type=whole_number("size", 1),
        default=MAX_BYTES,
        metavar="N",
        help="most memory for one decoded file (2 GiB)",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="audio files, folders, manifests (.jsonl)")


def list_files(arguments: argparse.Namespace) -> list[Row]:
    """The rows that the arguments name, to be asked for before a model is loaded; see ``data.audio_files.list_audio``."""
    return list_audio(arguments.paths, tell=lambda line: print(one_line(line), file=sys.stderr))


def go_over_files(
    arguments: argparse.Namespace,
    files: Sequence[Row],
    function: Callable[[Iterable[np.ndarray]], Iterator[Mapping[str, Any]]],
) -> Iterator[Outcome]:
    """What ``data.audio_files.for_each_clip`` tells of each file, with a progress bar, and at the end a line about the speed.

    Each fault is told of on standard error as it comes.
    """
    outcomes = for_each_clip(files, function, max_seconds=arguments.max_seconds, max_bytes=arguments.max_bytes)
    start, good, spoken = time.perf_counter(), 0, 0.0
    for outcome in tqdm(outcomes, total=len(files), unit="file", disable=None):
        if outcome.error is not None:
            tqdm.write(outcome.error, file=sys.stderr)
        else:
            good += 1
            spoken += outcome.seconds
        yield outcome
    spent = time.perf_counter() - start
    speed = f"{spoken:.0f} s of speech in {spent:.1f} s: {spoken / spent:.0f}x real time"
    print(f"{good} of {len(files)} files, {speed}", file=sys.stderr)
