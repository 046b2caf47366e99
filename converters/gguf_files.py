"""GGUF files, which llama.cpp runs: their metadata and tensors, none of them read before it is asked for.

Format, versions 2 and 3, little-endian: ``GGUF``; ``uint32`` version; ``uint64`` number of tensors and of metadata entries; each
entry's name, ``uint32`` type and value; each tensor's name, ``uint32`` number of axes, ``uint64`` sizes (the fastest first),
``uint32`` type and ``uint64`` place in the data; then, aligned, the data, tensor after tensor, each aligned. A string is a
``uint64`` length and UTF-8. The package ``gguf`` knows the types of tensors and turns few bits back into floats.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from converters.binary_files import BinaryReader, open_binary
from converters.engine import Weight, duplicates
from converters.safetensors_files import Tensor
from ichigo_jax.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32  # the format's, where ``general.alignment`` says no other
MAX_AXES = 4
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}

# Types of metadata values: those of ``struct``, then text and lists.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class GgufWeight(Weight):
    """A tensor as floats, in ``dtype``.

    Attributes:
      type: the file's name for how it is stored, such as "Q4_K".
      stored: its bytes, [rows, bytes of a row].
    """

    type: str
    stored: Tensor

    def read(self) -> np.ndarray:
        return self._floats(self.stored.read())

    def blocks(self) -> Iterator[np.ndarray]:
        return map(self._floats, self.stored.blocks())

    def _floats(self, rows: np.ndarray) -> np.ndarray:
        if self.type in FLOATS:
            floats = rows.view(FLOATS[self.type])
        else:
            floats = _gguf().dequantize(rows, _gguf().GGMLQuantizationType[self.type])
        return floats.reshape(-1, *self.shape[1:]).astype(self.dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A file whose structure was checked.

    Attributes:
      file: where it is.
      metadata: by name; lists of numbers are arrays.
      tensors: by name, shapes with the slowest axis first.
    """

    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufWeight]

    @property
    def types(self) -> dict[str, int]:
        """How many tensors of each type there are."""
        return dict(sorted(collections.Counter(tensor.type for tensor in self.tensors.values()).items()))


def is_gguf(file: Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    with open_binary(file) as reader:
        return reader.size >= len(MAGIC) and reader.numbers("4s", "the start")[0] == MAGIC


def read_gguf(file: Path) -> GgufFile:
    """Everything that a file says; no weight is read.

    Raises:
      InputError: the package ``gguf`` is missing; another version; one part of a model that was split; a truncated file; and,
        all at once, names that occur twice, types that cannot be read, tensors that overlap or leave holes.
    """
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{file}: GGUF files need the package gguf, which is not installed; pip install 'ichigo_jax[gguf]'")
    with open_binary(file) as reader:
        reader.skip(len(MAGIC), "the start")
        version = reader.number("I", "the version")
        if version not in VERSIONS:
            found = "big-endian numbers" if version & 0xFFFF == 0 else f"version {version}"
            raise InputError(f"{file}: {found} found, expected a little-endian GGUF file of version 2 or 3; convert it anew")
        tensor_count, entry_count = reader.numbers("QQ", "the number of tensors and of metadata entries")
        entries = [_entry(reader) for _ in _counted(reader, entry_count, 13, "metadata entries")]
        metadata = dict(entries)
        if metadata.get("split.count", 1) != 1:
            raise InputError(
                f"{file}: one of {metadata['split.count']} parts of a model found, expected a whole one; "
                "join them with llama-gguf-split --merge"
            )
        infos = [_tensor_info(reader) for _ in _counted(reader, tensor_count, 24, "tensors")]
        doubled = duplicates([name for name, _ in entries] + [info.name for info in infos])
        faults = [f"{name} occurs more than once" for name in doubled]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise InputError(f"{file}: general.alignment {alignment!r} found, expected a power of two; download it anew")
        start = _aligned(reader.position, alignment)
        tensors = _tensors(file, infos, start, alignment, reader.size - start, faults)
    return GgufFile(file, metadata, tensors)


# ---------------------------------------------------------------------------------------------------------------------
# Metadata
# ---------------------------------------------------------------------------------------------------------------------


def _counted(reader: BinaryReader, count: int, smallest: int, what: str) -> range:
    """As many steps as the file says, which it must have room for: each takes at least ``smallest`` bytes."""
    reader.require(count * smallest, f"a list of {count} {what}")
    return range(count)


def _text(reader: BinaryReader, what: str) -> str:
    return reader.text(reader.number("Q", f"the length of {what}"), what)


def _entry(reader: BinaryReader) -> tuple[str, Any]:
    name = _text(reader, "a metadata name")
    return name, _value(reader, reader.number("I", f"the type of {name}"), name)


def _value(reader: BinaryReader, code: int, name: str) -> Any:
    if code in _NUMBERS:
        return reader.number(_NUMBERS[code], name)
    if code == _STRING:
        return _text(reader, name)
    if code == _ARRAY:
        code, count = reader.numbers("IQ", f"the length of {name}")
        if code in _NUMBERS:
            return reader.array(np.dtype(_NUMBERS[code]).newbyteorder("<"), count, name)
        if code == _STRING:
            return [_text(reader, name) for _ in _counted(reader, count, 8, f"texts of {name}")]
        name = f"the list {name}"
    raise InputError(f"{reader.file}: {name} has type {code}, expected a number, text or a list of these; download it anew")


# ---------------------------------------------------------------------------------------------------------------------
# Tensors
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Info:
    name: str
    shape: tuple[int, ...]
    code: int
    offset: int


def _tensor_info(reader: BinaryReader) -> _Info:
    name = _text(reader, "a tensor's name")
    axes = reader.number("I", f"the number of axes of {name}")
    if not 1 <= axes <= MAX_AXES:
        raise InputError(f"{reader.file}: {name} has {axes} axes, expected 1 to {MAX_AXES}; download it anew")
    shape = reader.numbers("Q" * axes, f"the shape of {name}")[::-1]
    code, offset = reader.numbers("IQ", f"the place of {name}")
    return _Info(name, shape, code, offset)


def _tensors(
    file: Path, infos: list[_Info], start: int, alignment: int, data_size: int, faults: list[str]
) -> dict[str, GgufWeight]:
    tensors, reached = {}, 0
    for info in sorted(infos, key=lambda info: info.offset):
        kind = _type(info, faults)
        if kind is None:
            continue
        name, row_bytes = kind
        size = math.prod(info.shape[:-1]) * row_bytes
        if not faults and info.offset != reached:  # after a fault the places that follow cannot be told
            fault = "overlaps the tensor before it" if info.offset < reached else "leaves a hole before it"
            faults.append(f"{info.name} {fault} (begins at byte {info.offset}, expected {reached})")
        reached = _aligned(info.offset + size, alignment)
        end = info.offset + size
        stored = Tensor(np.dtype(np.uint8), (math.prod(info.shape[:-1]), row_bytes), file, start + info.offset)
        dtype = FLOATS.get(name, np.dtype(np.float32))
        tensors[info.name] = GgufWeight(dtype, info.shape, name, stored)
    if faults:
        raise InputError(f"{file}: {'; '.join(faults)}")
    end = max((tensor.stored.start + math.prod(tensor.stored.shape) - start for tensor in tensors.values()), default=0)
    if end > data_size:
        raise InputError(f"{file}: truncated: {max(data_size, 0)} bytes of data found, its tensors take {end}; download it anew")
    if data_size > reached:
        raise InputError(f"{file}: {data_size} bytes of data found, its tensors account for {reached}; download it anew")
    return tensors


def _type(info: _Info, faults: list[str]) -> tuple[str, int] | None:
    """The name of a tensor's type and the bytes of a row, or None and a fault more."""
    gguf = _gguf()
    try:
        kind = gguf.GGMLQuantizationType(info.code)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if kind.name not in FLOATS:
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except ValueError:
        faults.append(f"{info.name} has type {info.code}, which the package gguf does not know")
    except NotImplementedError:
        faults.append(f"{info.name} has type {kind.name}, which the package gguf cannot turn into floats")
    else:
        if info.shape[-1] % block == 0:
            return kind.name, info.shape[-1] // block * block_bytes
        faults.append(f"{info.name} has rows of {info.shape[-1]} numbers, expected a multiple of {block} for {kind.name}")
    return None


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _gguf() -> Any:
    import gguf  # an optional extra

    return gguf
