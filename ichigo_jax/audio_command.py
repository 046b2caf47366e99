"""What the commands that go over audio files share: their arguments, progress, faults and speed."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from tqdm import tqdm

from ichigo_jax.data.audio_files import Row, for_each_clip, list_audio
from ichigo_jax.inference.speech_tokenizer import MAX_BYTES, MAX_SECONDS


def add_arguments(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """``--batch-size`` with its default, the bounds of a file, and the paths."""
    parser.add_argument("--batch-size", type=int, default=batch_size, metavar="N", help=f"clips at a time ({batch_size})")
    parser.add_argument("--max-seconds", type=float, default=MAX_SECONDS, metavar="S", help="longest file that is decoded (4 h)")
    parser.add_argument("--max-bytes", type=int, default=MAX_BYTES, metavar="N", help="most memory for one decoded file (2 GiB)")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="audio files, folders, manifests (.jsonl)")


def go_over_files(arguments: argparse.Namespace, function: Callable[[Iterable[np.ndarray]], Iterator[Row]]) -> Iterator[Row]:
    """Rows of ``data.audio_files.for_each_clip``, with a progress bar, and at the end a line about the speed.

    Each fault is told of on standard error as it comes.
    """
    files = list_audio(arguments.paths)
    rows = for_each_clip(files, function, max_seconds=arguments.max_seconds, max_bytes=arguments.max_bytes)
    start, good, spoken = time.perf_counter(), 0, 0.0
    for row in tqdm(rows, total=len(files), unit="file", disable=None):
        if "error" in row:
            tqdm.write(row["error"], file=sys.stderr)
        else:
            good += 1
            spoken += row["seconds"]
        yield row
    spent = time.perf_counter() - start
    speed = f"{spoken:.0f} s of speech in {spent:.1f} s: {spoken / spent:.0f}x real time"
    print(f"{good} of {len(files)} files, {speed}", file=sys.stderr)
