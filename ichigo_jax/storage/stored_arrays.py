"""``params/`` of a model folder: its arrays opened, read and written a piece at a time, whatever their size.

The folder is an Orbax checkpoint (zarr arrays in one OCDBT store), so Orbax restores it onto any mesh; TensorStore opens the
same arrays without loading them. An array is cut into chunks of at most ``CHUNK_BYTES``: a stacked one into layers, a layer
or a vocabulary into blocks along its longest axis.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import unflatten_dict

from ichigo_jax.errors import InputError

PARAMS = "params"
LAYERS = "layers"  # in an array's path: its leading axis is the stack of layers
CHUNK_BYTES = 1 << 23
METADATA = b"/.zarray"  # every array of the store has one

ArrayPath = tuple[str, ...]
Stores = dict[ArrayPath, ts.TensorStore]


def rows_per_block(shape: tuple[int, ...], itemsize: int) -> int:
    """How many entries along the first axis fit in ``CHUNK_BYTES``; at least one."""
    return max(1, CHUNK_BYTES // max(1, math.prod(shape[1:]) * itemsize))


def create(folder: Path, arrays: Mapping[ArrayPath, jax.ShapeDtypeStruct]) -> Stores:
    """Makes ``params/`` with empty arrays; every part of them must be written before the folder is read.

    Args:
      folder: a folder that has no ``params/`` yet.
      arrays: path to shape and dtype.
    """
    path = (folder / PARAMS).absolute()
    # Orbax writes what it needs to know of a checkpoint around one number an array; the arrays then take their places.
    with ocp.StandardCheckpointer(multiprocessing_options=_this_process_alone()) as checkpointer:
        checkpointer.save(path, unflatten_dict({key: np.zeros(1, array.dtype) for key, array in arrays.items()}))
    context = ts.Context()
    futures = {}
    for key, array in arrays.items():
        dtype = np.dtype(array.dtype)
        metadata = {"shape": array.shape, "chunks": _chunks(key, array), "compressor": None}
        spec = {**_spec(path, key), "metadata": metadata, "dtype": dtype.name}
        futures[key] = ts.open(spec, create=True, delete_existing=True, context=context)
    return {key: future.result() for key, future in futures.items()}


def open_arrays(folder: str | os.PathLike) -> Stores:
    """Opens every array of a model folder; nothing of them is read.

    Raises:
      InputError: no ``params/``, or one that is broken.
    """
    path = params_folder(folder)
    with reading(path):
        context = ts.Context()
        listing = ts.KvStore.open(_database(path), context=context).result().list().result()
        keys = [tuple(name.decode().split("/")[0].split(".")) for name in listing if name.endswith(METADATA)]
        if not keys:
            raise InputError(f"{path}: no arrays found, expected an Orbax checkpoint; write the model folder anew")
        futures = {key: ts.open(_spec(path, key), open=True, context=context) for key in keys}
        return {key: future.result() for key, future in futures.items()}


def params_folder(folder: str | os.PathLike) -> Path:
    """``params/`` of a model folder.

    Raises:
      InputError: there is none.
    """
    path = (Path(folder) / PARAMS).absolute()
    if not path.is_dir():
        raise InputError(f"{folder}: no {PARAMS}/ in it; is the folder whole?")
    return path


def write(store: ts.TensorStore, array: np.ndarray) -> None:
    """Fills a store, or a part of one, with ``array`` of its shape, cast to its dtype; a few chunks are copied at a time."""
    assert tuple(store.shape) == array.shape, f"{store.shape} is not {array.shape}"
    pending, size = [], 0
    for block in _blocks(store):
        part = array[_from_zero(store, block)].astype(store.dtype.numpy_dtype, copy=False)
        pending.append(store[block].write(part))
        size += part.nbytes
        if size >= CHUNK_BYTES:
            _wait(pending)
            pending, size = [], 0
    _wait(pending)


def read(store: ts.TensorStore) -> np.ndarray:
    """A store, or a part of one, as an array; one chunk is held beside it."""
    array = np.empty(store.shape, store.dtype.numpy_dtype)
    for block in _blocks(store):
        array[_from_zero(store, block)] = store[block].read().result()
    return array


@contextlib.contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """What TensorStore and Orbax raise on broken files becomes an ``InputError`` that names ``path``."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # Orbax wraps what TensorStore found in a bare Exception; anything else (memory, say) is not the files' fault.
        if not isinstance(error, (ValueError, OSError, KeyError)) and type(error) is not Exception:
            raise
        message = " ".join(str(error.__cause__ or error).split())[:300]
        raise InputError(f"{path}: expected a model's arrays, found them broken: {message}") from error


def _this_process_alone() -> ocp.options.MultiprocessingOptions:
    """So that Orbax waits for no other processes of the same run: they do not write."""
    this = jax.process_index()
    return ocp.options.MultiprocessingOptions(this, {this}, barrier_sync_key_prefix=PARAMS)


def _database(path: Path) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/"}}


def _spec(path: Path, key: ArrayPath) -> dict[str, Any]:
    kvstore = {**_database(path), "path": ".".join(key) + "/"}
    # As Orbax reads: a chunk that is not there is damage and not zeros, so chunks of zeros are stored as well.
    return {"driver": "zarr", "kvstore": kvstore, "store_data_equal_to_fill_value": True, "fill_missing_data_reads": False}


def _chunks(key: ArrayPath, array: jax.ShapeDtypeStruct) -> list[int]:
    chunks = [max(1, size) for size in array.shape]
    if LAYERS in key:
        chunks[0] = 1
    itemsize = np.dtype(array.dtype).itemsize
    while math.prod(chunks) * itemsize > CHUNK_BYTES:
        longest = chunks.index(max(chunks))
        chunks[longest] = rows_per_block((1, *chunks[:longest], *chunks[longest + 1 :]), itemsize)
    return chunks


def _blocks(store: ts.TensorStore) -> Iterator[tuple[slice, ...]]:
    """The store's domain along the borders of its chunks."""
    if not store.rank:  # a single number has no grid
        return iter([()])
    origin, sizes = store.chunk_layout.grid_origin, store.chunk_layout.read_chunk.shape
    axes = []
    for start, size, begin, end in zip(origin, sizes, store.domain.inclusive_min, store.domain.exclusive_max):
        borders = range(start + (begin - start) // size * size, end, size)
        axes.append([slice(max(border, begin), min(border + size, end)) for border in borders])
    return itertools.product(*axes)


def _from_zero(store: ts.TensorStore, block: tuple[slice, ...]) -> tuple[slice, ...]:
    """``block`` of a part of a store, whose indices are those of the whole, as a block of an array."""
    return tuple(slice(part.start - first, part.stop - first) for part, first in zip(block, store.domain.inclusive_min))


def _wait(pending: list[ts.WriteFutures]) -> None:
    for future in pending:
        future.result()
