"""Safetensors files and sharded folders, one tensor at a time in both directions.

Format: 8 bytes of header length (little-endian), a JSON header (name -> dtype, shape, begin and end of the data), the data.
Headers come from outside and are checked before a byte of data is touched.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from converters.engine import TensorInfo, Weight, duplicates, row_blocks
from converters.sources import is_file
from ichigo_jax.errors import InputError
from ichigo_jax.storage import read_json, write_json
from ichigo_jax.storage.stored_arrays import rows_per_block

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # what transformers writes by default
LFS_POINTER = b"version https://git-lfs"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}

Read = Callable[[str], np.ndarray | Iterable[np.ndarray]]


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tensor(Weight):
    """A tensor in a file; ``start`` is its first byte there."""

    file: Path
    start: int

    def read(self) -> np.ndarray:
        """The tensor, mapped from disk: pages come into memory as they are used."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        # Offsets need not be aligned to the dtype, so the bytes are mapped and then seen as the dtype.
        size = math.prod(self.shape) * self.dtype.itemsize
        mapped = np.memmap(self.file, np.uint8, mode="r", offset=self.start, shape=(size,))
        return np.asarray(mapped).view(self.dtype).reshape(self.shape)

    def blocks(self) -> Iterator[np.ndarray]:
        step = rows_per_block(self.shape, self.dtype.itemsize)
        return (self.rows(begin, begin + step) for begin in range(0, self.shape[0], step))

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows ``begin`` to ``end``, or to the last one. Copied from the file, not mapped, so that no others are resident."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        shape = (min(end, self.shape[0]) - begin, *self.shape[1:])
        block = np.fromfile(self.file, np.uint8, shape[0] * row_bytes, offset=self.start + begin * row_bytes)
        return block.view(self.dtype).reshape(shape)


def same_values(one: Tensor, other: Tensor, dtype: np.dtype | None) -> bool:
    """Whether two tensors hold the same numbers, cast to ``dtype`` unless that is None; some megabytes of each are held."""
    if one.shape != other.shape:
        return False
    step = rows_per_block(one.shape, max(one.dtype.itemsize, other.dtype.itemsize))
    for begin in range(0, one.shape[0], step):
        # Without a cast, tensors of two dtypes are compared as the numbers that they are, for which float64 has room.
        common = dtype or (one.dtype if one.dtype == other.dtype else np.dtype(np.float64))
        parts = [tensor.rows(begin, begin + step).astype(common, copy=False) for tensor in (one, other)]
        if not np.array_equal(*parts):
            return False
    return True


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file.

    Raises:
      InputError: not a safetensors file, a truncated one, or one whose header contradicts itself.
    """
    try:
        size = os.path.getsize(file)
        with open(file, "rb") as stream:
            start = stream.read(8)
            if start == LFS_POINTER[:8]:
                raise InputError(f"{file}: a pointer of Git LFS found, expected the file itself; run git lfs pull in its folder")
            length = int.from_bytes(start, "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise InputError(f"{file}: expected a safetensors file, found a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length), object_pairs_hook=_unique_keys)
        if not isinstance(header, dict):
            raise InputError(f"{file}: expected a safetensors header, found JSON of type {type(header).__name__}")
        header.pop("__metadata__", None)
        return _tensors(file, header, data_start=8 + length, data_size=size - 8 - length)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{file}: expected a safetensors header, found {error}") from None
    except _DuplicateKeys as error:
        raise InputError(f"{file}: keys occur more than once in the header: {error}") from None


def read_folder(folder: Path, may_differ: Callable[[str], bool] = lambda key: False) -> dict[str, Tensor]:
    """The tensors of a Hugging Face model folder, sharded or not.

    Args:
      folder: its files may be links to anywhere.
      may_differ: tensors, by name, that an index may list though no shard has them, or not list though one has them. What
        the shards hold is taken.

    Raises:
      InputError: no weights; a shard that is missing, broken or outside the folder; an index that disagrees with its shards.
    """
    single, index = folder / SINGLE, folder / INDEX
    has_single, has_index = is_file(single), is_file(index)
    if has_single and has_index:
        raise InputError(f"{folder}: {SINGLE} and {INDEX} found, expected one of them; remove the one that is out of date")
    if not has_index:
        if not has_single:
            raise InputError(
                f"{folder}: no {SINGLE} and no {INDEX} found, expected the model's weights in one of them{_other_weights(folder)}"
            )
        return read_header(single)

    contents = read_json(index)
    weight_map = contents.get("weight_map") if isinstance(contents, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: expected a weight_map from tensor names to file names")
    shards = {name: _inside(folder, name) for name in sorted(set(weight_map.values()))}
    missing = [name for name, file in shards.items() if not is_file(file)]
    if missing:
        raise InputError(f"{folder}: shards missing: {', '.join(missing)} ({INDEX} names them); download the folder anew")

    headers = {name: read_header(file) for name, file in shards.items()}
    faults = [f"{key} is in more than one shard" for key in duplicates(key for header in headers.values() for key in header)]
    for key, name in weight_map.items():
        if key not in headers[name] and not may_differ(key):
            faults.append(f"{key} is not in {name}")
    for name, header in headers.items():
        faults += [f"{key} of {name} is not in the index" for key in header if key not in weight_map and not may_differ(key)]
    if faults:
        raise InputError(f"{index}: does not fit the shards: {'; '.join(faults)}")
    return {key: tensor for header in headers.values() for key, tensor in header.items()}


def _other_weights(folder: Path) -> str:
    """What to do with weights in a format that is not read, as the end of a sentence; nothing where there are none."""
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles:
        return f"; {pickles[0].name} found: load the folder with transformers and save it with save_pretrained, which writes them"
    others = sorted(file for ending in ("pth", "gguf", "safetensors") for file in folder.glob(f"*.{ending}"))
    return f"; {others[0].name} found, which is another format or under another name" if others else ""


class _DuplicateKeys(Exception):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = duplicates(key for key, _ in pairs)
    if repeated:
        raise _DuplicateKeys(", ".join(repeated))
    return dict(pairs)


def _inside(folder: Path, name: str) -> Path:
    """The file ``name`` of ``folder``, which may be a link.

    Whoever made the folder made its links: the hub's cache, dvc and bazel all keep the bytes elsewhere. The text of an index
    comes with a download and may name no other place.
    """
    if Path(name).name != name or name in ("", ".", ".."):
        raise InputError(f"{folder}: weights in {name!r} found, expected a file of this folder")
    return folder / name


def _tensors(file: Path, header: Mapping[str, Any], data_start: int, data_size: int) -> dict[str, Tensor]:
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            dtype_name, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise InputError(f"{file}: {name}: expected dtype, shape and data_offsets in the header") from None
        numbers = (*shape, begin, end)
        if any(type(number) is not int or number < 0 for number in numbers):
            raise InputError(f"{file}: {name}: shape or offsets {list(numbers)} found, expected whole numbers from 0")
        if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
            raise InputError(f"{file}: {name}: dtype {dtype_name!r} found, expected one of {', '.join(DTYPES)}")
        dtype = np.dtype(DTYPES[dtype_name])
        size = math.prod(shape) * dtype.itemsize
        if end - begin != size:
            raise InputError(f"{file}: {name}: {end - begin} bytes found, {dtype_name} of shape {list(shape)} takes {size}")
        spans.append((begin, end, name))
        tensors[name] = Tensor(dtype, shape, file, data_start + begin)

    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            fault = "overlaps the tensor before it" if begin < reached else "leaves a hole before it"
            raise InputError(f"{file}: {name} {fault} (begins at byte {begin}, expected {reached})")
        reached = end
    if reached > data_size:
        raise InputError(f"{file}: truncated: {data_size} bytes of data found, its header promises {reached}; download it anew")
    if reached < data_size:
        raise InputError(f"{file}: {data_size} bytes of data found, its header accounts for {reached}")
    return tensors


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, infos: Mapping[str, TensorInfo], read: Read, shard_bytes: int) -> None:
    """Writes ``model.safetensors``, or shards and their index when one file would pass ``shard_bytes``.

    Args:
      folder: exists already.
      infos: every tensor in the order of writing; a single tensor larger than ``shard_bytes`` has a shard of its own.
      read: gives a tensor by name, whole or as blocks of its rows in order; one tensor, or one block, at a time is held.
      shard_bytes: bytes of data a file.
    """
    shards = shards_of(infos, shard_bytes)
    for file, shard in shards.items():
        write_file(folder / file, shard, read)
    write_index(folder, shards)


def shards_of(infos: Mapping[str, TensorInfo], shard_bytes: int) -> dict[str, dict[str, TensorInfo]]:
    """The files that ``write_folder`` makes, by name: the tensors of each."""
    shards: list[dict[str, TensorInfo]] = [{}]
    for name, info in infos.items():
        if shards[-1] and sum(map(_size, shards[-1].values())) + _size(info) > shard_bytes:
            shards.append({})
        shards[-1][name] = info
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def write_index(folder: Path, shards: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """The index of several files; a single one has none."""
    if len(shards) > 1:
        weight_map = {name: file for file, shard in shards.items() for name in shard}
        total = sum(_size(info) for shard in shards.values() for info in shard.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _size(info: TensorInfo) -> int:
    return math.prod(info.shape) * info.dtype.itemsize


def write_file(file: Path, infos: Mapping[str, TensorInfo], read: Read) -> None:
    """Writes one file; arguments as ``write_folder``."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file that does not say so
    position = 0
    for name, info in infos.items():
        offsets = [position, position + _size(info)]
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, info in infos.items():
            found, written = read(name), 0
            for part in [found] if isinstance(found, np.ndarray) else found:
                assert part.dtype == info.dtype and part.shape[1:] == info.shape[1:], (
                    f"{name}: {part.shape} {part.dtype}, not {info}"
                )
                # Rows by rows, because a transposed view is copied to be contiguous.
                for rows in row_blocks(part) if part.ndim else [part]:
                    written += stream.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
            assert written == _size(info), f"{name}: {written} bytes, not {info}"
