"""Which audio a command is to read, and reading it: one bad file is told of and the others go on."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ichigo_jax.audio.ahead import map_ahead
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
    function: Callable[[Iterable[np.ndarray]], Iterator[Row]],
    *,
    max_seconds: float,
    max_bytes: int,
) -> Iterator[Row]:
    """Decodes every row's file, ahead of their use, and joins to the row what ``function`` says of the clip.

    Args:
      rows: from ``list_audio``.
      function: clips one by one, float32 [T] at 16 kHz, to one row of results each, in order; it may take many clips before
        it gives the first result.
      max_seconds, max_bytes: bounds of one file, see ``audio.load_audio``.

    Yields:
      In order, the row with ``seconds`` and the results, or with ``error`` where the file could not be read.
    """
    waiting: deque[Row] = deque()  # rows that were read and whose results are to come, and the faults among them

    def read(row: Row) -> tuple[Row, np.ndarray | None]:
        try:
            clip = load_audio(row["path"], max_seconds, max_bytes)
        except AudioError as error:
            return {**row, "error": str(error)}, None
        return {**row, "seconds": round(len(clip) / SAMPLE_RATE, 4)}, clip

    def clips() -> Iterator[np.ndarray]:
        for row, clip in map_ahead(read, rows):
            waiting.append(row)
            if clip is not None:
                yield clip

    for result in function(clips()):
        while "error" in waiting[0]:
            yield waiting.popleft()
        yield {**waiting.popleft(), **result}
    yield from waiting
