"""Which audio a command is to read, and reading it: one bad file is told of and the others go on."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ichigo_jax.audio.ahead import map_ahead
from ichigo_jax.audio.decode import SAMPLE_RATE, AudioError, load_audio
from ichigo_jax.data.folders import files_below, on_disk
from ichigo_jax.errors import InputError, one_line, system_fault, unicode_only
from ichigo_jax.storage import read_json_lines

# What looks like audio. Some of it may not be decodable here, which is then told of file by file.
AUDIO_SUFFIXES = frozenset(
    """
    .wav .wave .bwf .rf64 .w64 .flac .mp3 .mp2 .mpga .ogg .oga .ogv .opus .spx .aiff .aif .aifc .au .snd .caf .voc .sph .pcm
    .m4a .m4b .aac .ac3 .amr .awb .3gp .3g2 .wma .asf .wmv .ape .wv .tta .mp4 .m4v .mov .mkv .mka .webm .avi .mpg .mpeg
    """.split()
)
MANIFEST_SUFFIX = ".jsonl"

SHOWN = 3  # manifests that a message names
GIVEN = "manifest_"  # before the name of a manifest's field that is also one of the program's own

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one row. The row is as the user gave it, whatever its fields are called.

    Attributes:
      row: from ``list_audio``.
      seconds: of the clip; None where the file could not be read.
      results: what was found in the clip; None where the file could not be read.
      error: why the file could not be read; None where it could.
    """

    row: Mapping[str, Any]
    seconds: float | None = None
    results: Mapping[str, Any] | None = None
    error: str | None = None

    @property
    def path(self) -> str:
        """The row's path as text that every format can hold: bytes of it that are not Unicode are spelled ``\\xff``."""
        return unicode_only(self.row["path"])


def list_audio(paths: Iterable[str | os.PathLike], tell: Callable[[str], None] | None = None) -> list[Row]:
    """Expands what a user names to rows with a ``path``, in that order.

    A folder stands for the audio files in and below it (``folders.files_below``), sorted; a manifest (``.jsonl``, a ``path``
    in every line, relative to the manifest) for its rows, with their other fields, whether the files exist or not; any other
    file for itself. A file that is named twice, or by itself and by a manifest too, is taken once, and so is a manifest. All
    rows of a manifest stay: two of one clip may differ in their other fields. Whether a file really holds audio is found out
    when it is decoded.

    Args:
      paths: files, folders and manifests.
      tell: is given a line about manifests that lie in a folder and are not read.

    Raises:
      InputError: a path that does not exist, a manifest that cannot be used, or no audio file in all of it.
    """
    rows: list[tuple[Row, bool]] = []  # and whether a manifest has it
    manifests: set[str] = set()
    unread: list[Path] = []
    for path in (Path(on_disk(os.fspath(path))) for path in paths):
        if os.path.isdir(path):
            found, locked = files_below(path, AUDIO_SUFFIXES | {MANIFEST_SUFFIX})
            # A folder that cannot be listed stands for its files: reading it fails, and that is told of as with a file.
            rows += [(_row(error.filename), False) for error in locked]
            unread += [file for file in found if _is_manifest(file)]
            rows += [(_row(file), False) for file in found if not _is_manifest(file)]
        elif not _is_there(path):
            raise InputError(f"{path}: no such file or folder")
        elif not _is_manifest(path):
            rows.append((_row(path), False))
        elif _place(path) not in manifests:
            manifests.add(_place(path))
            rows += [(row, True) for row in read_manifest(path)]
    unread = [file for file in unread if _place(file) not in manifests]
    shown = ", ".join(map(str, unread[:SHOWN])) + (", …" if len(unread) > SHOWN else "")
    advice = f"manifests inside folders are not read ({shown}); name those that are to be read" if unread else ""
    if not rows:
        raise InputError(f"no audio files found, expected names such as one.wav or one.mp3{'; ' if advice else ''}{advice}")
    if advice and tell is not None:
        tell(advice)
    return _each_name_once(rows)


def read_manifest(manifest: str | os.PathLike, fields: Sequence[str] = ()) -> list[Row]:
    """Rows of a manifest: JSON lines with ``path`` (relative to the manifest, resolved here) and the ``fields`` asked for.

    A path is looked for in the spellings that ``folders.on_disk`` tries.

    Raises:
      InputError: no rows, a row where ``path`` or a field is not a string, or one whose ``seconds`` are no length.
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
        seconds = row.get("seconds")
        if isinstance(seconds, int | float) and not 0 <= seconds < math.inf:
            raise InputError(f"{manifest}: row {number} has seconds {seconds}, expected 0 or more; mend it or leave it out")
        row["path"] = on_disk(str(Path(manifest).parent / row["path"]))
    return rows


def with_other_names(rows: Sequence[Row], own: Collection[str]) -> list[Row]:
    """The rows with other names for those of their fields that are called like the program's ``own``.

    ``[{"path": "a.wav", "seconds": 3}]`` with own ``{"seconds"}`` -> ``[{"path": "a.wav", "manifest_seconds": 3}]``. A field
    has one name in all rows, and no two have the same.
    """
    taken = {name for row in rows for name in row} | set(own)
    names: dict[str, str] = {}
    for name in sorted(taken & set(own)):
        other = GIVEN + name
        while other in taken:
            other = GIVEN + other
        taken.add(other)
        names[name] = other
    return [{names.get(name, name): value for name, value in row.items()} for row in rows]


def for_each_clip(
    rows: Iterable[Row],
    function: Callable[[Iterable[np.ndarray]], Iterator[Mapping[str, Any]]],
    *,
    max_seconds: float,
    max_bytes: int,
) -> Iterator[Outcome]:
    """Decodes every row's file, ahead of their use, and tells what ``function`` finds in each clip.

    Args:
      rows: from ``list_audio``.
      function: clips one by one, float32 [T] at 16 kHz, to one mapping of results each, in order; it may take many clips
        before it gives the first result.
      max_seconds, max_bytes: bounds of one file, see ``audio.load_audio``.

    Yields:
      In order, what became of each row.
    """
    waiting: deque[Outcome] = deque()  # rows that were read and whose results are to come, and the faults among them

    def read(row: Row) -> tuple[Outcome, np.ndarray | None]:
        try:
            clip = read_clip(row["path"], max_seconds, max_bytes)
        except AudioError as error:
            return Outcome(row, error=one_line(error)), None
        return Outcome(row, seconds=round(len(clip) / SAMPLE_RATE, 4)), clip

    def clips() -> Iterator[np.ndarray]:
        for outcome, clip in map_ahead(read, rows):
            waiting.append(outcome)
            if clip is not None:
                yield clip

    for results in function(clips()):
        while waiting[0].error is not None:
            yield waiting.popleft()
        yield dataclasses.replace(waiting.popleft(), results=results)
    yield from waiting


def read_clip(path: str | os.PathLike, max_seconds: float, max_bytes: int) -> np.ndarray:
    """Decodes a file, as ``audio.load_audio``, and names it in every fault.

    Returns:
      float32 [T] at 16 kHz.

    Raises:
      AudioError: no usable audio, or a file that the system does not let us read.
    """
    try:
        if os.path.isdir(path):
            os.listdir(path)  # fails for a folder that is among the rows because it could not be listed
        return load_audio(path, max_seconds, max_bytes)
    except OSError as error:
        raise AudioError(f"{path}: cannot be read: {system_fault(error)}; expected an audio file") from None


def _is_there(path: Path) -> bool:
    """Whether the path exists, as far as the system tells: a file behind a locked folder fails when it is read."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:
        return True
    return True


def _is_manifest(path: Path) -> bool:
    return path.suffix.lower() == MANIFEST_SUFFIX


def _row(path: str | os.PathLike) -> Row:
    return {"path": os.fspath(path)}


def _place(path: str | os.PathLike, folders: dict[str, str] | None = None) -> str:
    """Where a file lies, the same for all ways to its folder. A link to a file is a place of its own."""
    folder, name = os.path.split(path)
    try:
        if folders is None:
            return os.path.join(os.path.realpath(folder), name)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        return os.path.join(folders[folder], name)
    except ValueError:  # a name with a zero byte or half a character
        return os.fspath(path)


def _each_name_once(rows: Sequence[tuple[Row, bool]]) -> list[Row]:
    folders: dict[str, str] = {}
    places = [_place(row["path"], folders) for row, _ in rows]
    taken = {place for place, (_, listed) in zip(places, rows) if listed}
    kept = []
    for place, (row, listed) in zip(places, rows):
        if listed or place not in taken:
            kept.append(row)
            taken.add(place)
    return kept
