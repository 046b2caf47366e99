"""Data sets encoded once, before training: ids on disk, memory-mapped, and their lengths, which packing needs.

A run of millions of conversations holds none of them in memory, starts again in seconds, and its steps wait for no text
tokenizer. What is on disk belongs to one state of the files, the tokenizer and the options, and is made anew for another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ichigo_jax.data.row_files import Chunk, find_row_files, read_chunks
from ichigo_jax.data.row_formats import Example, RowEncoder
from ichigo_jax.errors import InputError
from ichigo_jax.storage import atomic_write, writing

VERSION = 1  # of what is written; another one makes every run encode anew
ROWS_PER_CHUNK = 1000
CHUNKS_ALONE = 4  # what this process encodes before it is worth starting others
MOST_PROCESSES = 32  # each imports what the command imports, some hundred MiB

SKIPPED = -1  # in place of a number of dropped ids


class Summary(NamedTuple):
    """Of a data set: rows, those that could not be used, those that were cut, and how many ids that took."""

    rows: int
    skipped: int
    cut: int
    dropped_ids: int


class EncodedExamples:
    """Examples on disk; a random-access source that costs no memory and can be sent to other processes.

    Two rows ``([7, 8, 9], [F, T, T])`` and ``([5, 6], [T, T])`` with one between them that could not be used are ::

        ids      [~7, 8, 9, 5, 6]     int32; ~id = -1 - id where it is not to be predicted
        lengths  [[3, 0, 2],          int32 [2, rows]: ids of each row,
                  [0, -1, 0]]         and how many of them were cut off, -1 where the row was skipped

    Args:
      ids: the file of all ids.
      lengths: the file of the lengths.
    """

    def __init__(self, ids: Path, lengths: Path):
        self._path = ids
        kept, dropped = np.load(lengths)
        used = kept > 0
        self.lengths = kept[used]
        self._starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        if ids.stat().st_size != 4 * self._starts[-1]:
            raise InputError(f"{ids}: {ids.stat().st_size} bytes found, expected {4 * self._starts[-1]}; delete the file")
        skipped = int((dropped == SKIPPED).sum())
        self.summary = Summary(int(used.sum()) + skipped, skipped, int((dropped > 0).sum()), int(dropped[dropped > 0].sum()))
        self._open()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        stored = np.asarray(self._ids[self._starts[index] : self._starts[index + 1]])
        return Example(np.where(stored < 0, ~stored, stored), stored >= 0)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_ids"}  # a memory map would travel whole

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._open()

    def _open(self) -> None:
        self._ids = np.memmap(self._path, np.int32, "r") if len(self) else np.zeros(0, np.int32)


def encode_rows(
    path: str,
    encoder: RowEncoder,
    folder: Path,
    faults: Callable[[str, str], None],
    processes: int | None = None,
    progress: bool = False,
) -> EncodedExamples:
    """The rows of a file or folder, from ``folder`` where they have been encoded before, or else encoded now.

    Args:
      path: see ``row_files.find_row_files``.
      encoder: what becomes of a row.
      folder: where encoded rows are kept; made when there is something to keep.
      faults: told of each row that cannot be used, while encoding.
      processes: that encode at once; None: one for each CPU, up to 32.
      progress: whether a bar is shown.

    Raises:
      InputError: files that are not what the format needs, no row that could be used, a process that was killed meanwhile, or
        a ``folder`` that cannot be written.
    """
    files = find_row_files(path)
    key = _key(Path(path), files, encoder)
    ids, lengths = folder / f"ids-{key}.bin", folder / f"lengths-{key}.npy"
    if not (ids.exists() and lengths.exists()):
        chunks = read_chunks(files, encoder.format.columns, ROWS_PER_CHUNK)
        bar = tqdm(desc=f"encoding {path}", unit=" rows", disable=None if progress else True)
        with bar, atomic_write(ids, replace=True) as partial_ids, atomic_write(lengths, replace=True) as partial_lengths:
            first_fault, tables = None, []
            with writing(ids), partial_ids.open("wb") as file:
                for encoded in _encode_chunks(_numbered(chunks), encoder, processes or _cpus()):
                    file.write(encoded.ids.tobytes())
                    tables.append(encoded.lengths)
                    for where, fault in encoded.faults:
                        first_fault = first_fault or f"{where}: {fault}"
                        faults(where, fault)
                    bar.update(encoded.lengths.shape[1])
                empty = file.tell() == 0
            if empty:
                reason = f"no row can be used, the first because of {first_fault}" if first_fault else "no rows found"
                raise InputError(f"{path}: {reason}")
            with partial_lengths.open("wb") as file:
                np.save(file, np.concatenate(tables, axis=1))
    return EncodedExamples(ids, lengths)


class _Encoded(NamedTuple):
    """Of one chunk: what ``EncodedExamples`` documents, and where which fault was found."""

    ids: np.ndarray
    lengths: np.ndarray
    faults: list[tuple[str, str]]


def _numbered(chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, int]]:
    """Each chunk with the number of its first row in the whole data set: a chunk is full unless it ends a file."""
    passed, file, end = 0, None, 0
    for chunk in chunks:
        if chunk.file != file:
            passed, file = passed + end, chunk.file
        end = chunk.first + len(chunk.content)
        yield chunk, passed + chunk.first


def _encode_chunks(chunks: Iterator[tuple[Chunk, int]], encoder: RowEncoder, processes: int) -> Iterator[_Encoded]:
    """In order, by other processes as soon as there is enough to do."""
    alone = None if processes == 1 else CHUNKS_ALONE
    for chunk, number in itertools.islice(chunks, alone):
        yield _encode_chunk(chunk, number, encoder)
    more = next(chunks, None)
    if more is None:
        return
    # Spawned rather than forked: the threads of an accelerator's runtime do not survive a fork.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(processes, context, _start_worker, (encoder,)) as pool:
            waiting: deque = deque()
            for chunk, number in itertools.chain([more], chunks):
                waiting.append(pool.submit(_encode_in_worker, chunk, number))
                if len(waiting) > 3 * processes:  # bounds what is read ahead
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool:
        raise InputError(
            f"{more[0].file}: one of {processes} processes that encode rows has died, which is what the system does when memory "
            "runs out; nothing of it is kept: start again on fewer CPUs (taskset) or with more memory"
        ) from None


def _encode_chunk(chunk: Chunk, number: int, encoder: RowEncoder) -> _Encoded:
    pieces, lengths, faults = [np.zeros(0, np.int32)], [], []
    for offset, row in enumerate(chunk.rows()):
        kept = dropped = 0
        try:
            if isinstance(row, InputError):
                raise row
            if row is not None:
                example, dropped = encoder(row, number + offset)
                pieces.append(np.where(example.predicted, example.ids, ~example.ids))
                kept = len(example.ids)
        except InputError as error:
            dropped = SKIPPED
            faults.append((f"{chunk.file}: row {chunk.first + offset + 1}", str(error)))
        lengths.append((kept, dropped))
    return _Encoded(np.concatenate(pieces), np.array(lengths, np.int32).T, faults)


def _cpus() -> int:
    """Those that this process may use, where the system tells, up to ``MOST_PROCESSES``."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, MOST_PROCESSES)


_worker_encoder: RowEncoder | None = None


def _start_worker(encoder: RowEncoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder  # once for each process: a text tokenizer is megabytes


def _encode_in_worker(chunk: Chunk, number: int) -> _Encoded:
    return _encode_chunk(chunk, number, _worker_encoder)


def _key(root: Path, files: Sequence[Path], encoder: RowEncoder) -> str:
    """Of everything that what is written depends on."""
    stats = [(str(file.relative_to(root)) if file != root else file.name, file.stat()) for file in files]
    described = {
        "version": VERSION,
        "files": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        "format": dataclasses.asdict(encoder.format),
        "tokenizer": encoder.tokenizer.fingerprint,
        "length": encoder.length,
        "predict": encoder.predict,
    }
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
