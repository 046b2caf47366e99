"""Which audio a command is to read, and reading it: one bad file is told of and the others go on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ichigo_jax.audio.decode import SAMPLE_RATE, AudioError, load_audio
from ichigo_jax.errors import InputError
from ichigo_jax.storage import read_json_lines

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au"})
MANIFEST_SUFFIX = ".jsonl"

Row = dict[str, Any]


def list_audio(paths: Iterable[str | os.PathLike]) -> list[Row]:
    """Expands what a user names to rows with a ``path``, in that order and each file once.

    A folder stands for the audio files in and below it, sorted; a manifest (``.jsonl``, a ``path`` in every line, relative
    to the manifest) for the files that it lists, whether they exist or not, with its other fields; any other file for
    itself. Whether a file really holds audio is found out when it is decoded.

    Raises:
      InputError: a path that does not exist, a manifest line without ``path``, or no audio file in all of it.
    """
    rows: list[Row] = []
    for path in map(Path, paths):
        if path.is_dir():
            files = (file for file in path.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES and file.is_file())
            rows += [{"path": str(file)} for file in sorted(files)]
        elif not path.exists():
            raise InputError(f"{path}: no such file or folder")
        elif path.suffix == MANIFEST_SUFFIX:
            rows += read_manifest(path)
        else:
            rows.append({"path": str(path)})
    if not rows:
        raise InputError(f"no audio files found, expected names ending in {', '.join(sorted(AUDIO_SUFFIXES))}")
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row["path"], row)
    return list(first.values())


def read_manifest(manifest: str | os.PathLike, fields: Sequence[str] = ()) -> list[Row]:
    """Rows of a manifest: JSON lines with ``path`` (relative to the manifest, resolved here) and the ``fields`` asked for.

    Raises:
      InputError: no rows, or a row where ``path`` or a field is not a string.
    """
    rows = read_json_lines(manifest)
    if not rows:
        raise InputError(f"{manifest}: expected a manifest with at least one row, found none")
    for number, row in enumerate(rows, 1):
        for field in ("path", *fields):
            if not isinstance(row.get(field), str):
                raise InputError(
                    f"{manifest}: row {number} has no {field!r}, expected a string; it has {', '.join(row) or 'nothing'}"
                )
        row["path"] = str(Path(manifest).parent / row["path"])
    return rows


def for_each_clip(
    rows: Iterable[Row],
    function: Callable[[list[np.ndarray]], Sequence[Row]],
    *,
    batch_size: int,
    max_seconds: float,
    max_bytes: int,
) -> Iterator[Row]:
    """Decodes every row's file, a batch at a time, and joins to the row what ``function`` says of the clip.

    Args:
      rows: from ``list_audio``.
      function: clips, float32 [T] at 16 kHz, to one row of results each.
      batch_size: clips at a time.
      max_seconds, max_bytes: bounds of one file, see ``audio.load_audio``.

    Yields:
      In order, the row with ``seconds`` and the results, or with ``error`` where the file could not be read.

    Raises:
      InputError: a batch size below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch size {batch_size} found, expected at least 1")
    rows = iter(rows)
    while batch := list(itertools.islice(rows, batch_size)):
        done: list[Row] = []
        clips = []
        for row in batch:
            try:
                clips.append(load_audio(row["path"], max_seconds, max_bytes))
                done.append({**row, "seconds": round(len(clips[-1]) / SAMPLE_RATE, 4)})
            except AudioError as error:
                done.append({**row, "error": str(error)})
        results = iter(function(clips) if clips else [])
        yield from (row if "error" in row else {**row, **next(results)} for row in done)
