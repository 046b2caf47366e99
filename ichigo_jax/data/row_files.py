"""Rows of data sets on disk: parquet and JSON-lines files and folders of them, read a chunk at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ichigo_jax.data.folders import files_below
from ichigo_jax.errors import InputError, system_fault
from ichigo_jax.storage import json_object

JSON_LINES = ".jsonl"
SUFFIXES = (".parquet", JSON_LINES)

Row = dict[str, Any]
T = TypeVar("T")


class Chunk(NamedTuple):
    """Rows that follow each other in one file, not decoded yet; ``first`` is the number of the first, from 0."""

    file: Path
    first: int
    content: pa.RecordBatch | list[bytes]

    def rows(self) -> Iterator[Row | InputError | None]:
        """Every row: its columns, what is wrong with it, or None for a line with nothing on it."""
        if isinstance(self.content, pa.RecordBatch):
            yield from self.content.to_pylist()
            return
        for line in self.content:
            try:
                yield json_object(line)
            except InputError as error:
                yield error


def find_row_files(path: str) -> list[Path]:
    """The file ``path``, or the parquet and JSON-lines files in and below the folder ``path``, sorted by name.

    Linked folders are followed and hidden files passed over, see ``folders.files_below``.

    Raises:
      InputError: nothing there, a folder without such files, or one that cannot be listed.
    """
    root = Path(path)
    if not root.is_dir():
        if not root.is_file():
            raise InputError(f"{path}: no such file or folder")
        return [root]
    files, locked = files_below(root, SUFFIXES)
    if locked:
        raise InputError(f"{locked[0].filename}: cannot be listed: {system_fault(locked[0])}; make it readable or remove it")
    if not files:
        raise InputError(f"{path}: no rows found in this folder, expected files ending in {' or '.join(SUFFIXES)}")
    return files


def read_chunks(files: Sequence[Path], columns: Sequence[str], rows_per_chunk: int) -> Iterator[Chunk]:
    """Chunks of at most ``rows_per_chunk`` rows, file after file; of parquet files only ``columns`` are read.

    Raises:
      InputError: a file that is no parquet, is damaged, or lacks a column. A JSON row without one is for the caller to find.
    """
    for file in files:
        if file.suffix.lower() == JSON_LINES:
            yield from _json_chunks(file, rows_per_chunk)
            continue
        try:
            with pq.ParquetFile(file) as parquet:
                missing = [name for name in columns if name not in parquet.schema_arrow.names]
                if missing:
                    raise InputError(
                        f"{file}: found columns {', '.join(parquet.schema_arrow.names)}; expected {', '.join(columns)}"
                    )
                first = 0
                for batch in parquet.iter_batches(rows_per_chunk, columns=list(columns)):
                    yield Chunk(file, first, batch)
                    first += batch.num_rows
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(f"{file}: expected a parquet file, found {error}") from None


def read_first_rows(path: str, columns: Sequence[str], limit: int, read: Callable[[Row], T] = lambda row: row) -> list[T]:
    """The first ``limit`` rows, all of which must be right.

    Args:
      path: see ``find_row_files``.
      columns: that every row has.
      limit: how many rows are read.
      read: what becomes of a row; raises InputError for one that is not right.

    Raises:
      InputError: what ``find_row_files`` and ``read_chunks`` refuse, a row that is none or lacks a column, what ``read``
        refuses, or no rows; the message names file and row.
    """
    found: list[T] = []
    for chunk in read_chunks(find_row_files(path), columns, max(1, limit)):
        for number, row in enumerate(chunk.rows(), chunk.first + 1):
            if isinstance(row, InputError):
                raise InputError(f"{chunk.file}: row {number}: {row}")
            if row is not None:
                missing = [name for name in columns if row.get(name) is None]
                if missing:
                    raise InputError(f"{chunk.file}: row {number} has no {missing[0]!r}, expected {', '.join(columns)}")
                try:
                    found.append(read(row))
                except InputError as error:
                    raise InputError(f"{chunk.file}: row {number}: {error}") from None
        if len(found) >= limit:
            break
    if not found:
        raise InputError(f"{path}: expected at least one row, found none")
    return found[:limit]


def _json_chunks(file: Path, rows_per_chunk: int) -> Iterator[Chunk]:
    try:
        with file.open("rb") as lines:
            for first in itertools.count(0, rows_per_chunk):
                content = list(itertools.islice(lines, rows_per_chunk))
                if not content:
                    return
                yield Chunk(file, first, content)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {system_fault(error)}") from None
