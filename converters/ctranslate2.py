"""CTranslate2's ``model.bin``, which faster-whisper runs: what it holds, none of it read before it is asked for.

Format, version 6, little-endian: ``uint32`` version; the model's spec (a string) and its ``uint32`` revision; ``uint32`` number
of variables, each with its name, ``uint8`` rank, ``uint32`` dimensions, ``uint8`` code of the dtype, ``uint32`` bytes, and the
bytes; ``uint32`` number of aliases, each a new name and the name that it stands for. A string is a ``uint16`` length and that
many bytes, the last of them zero.

A weight in int8 or int16 has a companion, ``NAME_scale``: the weight is the integer divided by the scale, which is one number
or one for each row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from converters.binary_files import BinaryReader, open_binary
from converters.engine import Weight, duplicates
from converters.safetensors_files import Tensor
from ichigo_jax.errors import InputError

FILE = "model.bin"
VERSION = 6
DTYPES = tuple(map(np.dtype, (np.float32, np.int8, np.int16, np.int32, np.float16, ml_dtypes.bfloat16)))  # by their codes
QUANTIZED = (np.dtype(np.int8), np.dtype(np.int16))
FLOATS = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))
SCALE = "_scale"


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """A ``model.bin`` whose structure was checked.

    Attributes:
      spec: which model, such as "WhisperSpec".
      revision: of the spec's names and layouts.
      tensors: every variable by name, as it is stored; aliases too.
      faults: names that occur twice, and aliases that stand for nothing. The caller tells them with what it finds itself.
    """

    spec: str
    revision: int
    tensors: Mapping[str, Tensor]
    faults: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Dequantized(Weight):
    """A weight that is stored as integers; it reads as float32.

    Attributes:
      integers: int8 or int16.
      scale: a single number, or one for each row of ``integers``.
    """

    integers: Tensor
    scale: Tensor

    def read(self) -> np.ndarray:
        scale = self.scale.read().astype(np.float32)
        return self.integers.read().astype(np.float32) / scale.reshape(scale.shape + (1,) * (len(self.shape) - 1))


@dataclasses.dataclass(frozen=True)
class Rows(Weight):
    """Rows of a weight, from ``begin`` on, as many as ``shape`` says."""

    source: Weight
    begin: int

    def read(self) -> np.ndarray:
        return self.source.read()[self.begin : self.begin + self.shape[0]]


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_spec(folder: Path) -> tuple[str, int]:
    """Which model a folder holds: its spec and the spec's revision.

    Raises:
      InputError: no ``model.bin``, only pieces of it, or another format than version 6 of CTranslate2's.
    """
    file = _model_file(folder)
    with open_binary(file) as reader:
        return _read_start(reader)


def read_model(folder: Path) -> ModelFile:
    """Everything that a folder's ``model.bin`` holds; no weight is read.

    Raises:
      InputError: as ``read_spec``; a file that is truncated or goes on after its end; a dtype that is unknown, or bytes that
        do not fit a shape, of all variables at once.
    """
    file = _model_file(folder)
    with open_binary(file) as reader:
        spec, revision = _read_start(reader)
        variables: list[tuple[str, Tensor]] = []
        faults = []
        for _ in range(reader.number("I", "the number of variables")):
            name = _string(reader, "a variable's name")
            rank = reader.number("B", f"the rank of {name}")
            shape = reader.numbers("I" * rank, f"the shape of {name}")
            code = reader.number("B", f"the dtype of {name}")
            size = reader.number("I", f"the size of {name}")
            start = reader.skip(size, name)
            if code >= len(DTYPES):
                faults.append(f"{name} has dtype code {code}, expected 0 to {len(DTYPES) - 1}")
            elif size != math.prod(shape) * DTYPES[code].itemsize:
                expected = math.prod(shape) * DTYPES[code].itemsize
                faults.append(f"{name} has {size} bytes, {DTYPES[code]} of shape {list(shape)} takes {expected}")
            else:
                variables.append((name, Tensor(DTYPES[code], shape, file, start)))
        count = reader.number("I", "the number of aliases")
        aliases = [(_string(reader, "an alias"), _string(reader, "what an alias stands for")) for _ in range(count)]
        if reader.left:
            faults.append(f"{reader.left} bytes found after the last alias, expected the end of the file")
    if faults:
        raise InputError(f"{file}: broken: {'; '.join(faults)}; download it anew")

    tensors = dict(variables)
    doubled = duplicates([name for name, _ in variables] + [alias for alias, _ in aliases])
    told = [f"{name} occurs more than once" for name in doubled]
    for alias, name in aliases:
        if name in tensors:
            tensors.setdefault(alias, tensors[name])
        else:
            told.append(f"{alias} stands for {name}, which is missing")
    for alias, name in aliases:  # an alias of integers stands for their scale as well
        if name + SCALE in tensors:
            tensors.setdefault(alias + SCALE, tensors[name + SCALE])
    return ModelFile(spec, revision, tensors, tuple(told))


def dequantize(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Weight], list[str]]:
    """Joins integers and their scales.

    Returns:
      Every tensor under its name, without the scales that were used, and what is wrong with scales.
    """
    found: dict[str, Weight] = dict(tensors)
    faults = []
    for name, tensor in tensors.items():
        if tensor.dtype not in QUANTIZED or not tensor.shape:  # single integers are settings
            continue
        scale = tensors.get(name + SCALE)
        if scale is None:
            faults.append(f"{name}{SCALE} is missing, expected it beside {tensor.dtype} weights")
            continue
        del found[name + SCALE]
        if scale.shape not in ((), tensor.shape[:1]) or scale.dtype not in FLOATS:
            faults.append(
                f"{name}{SCALE} has shape {list(scale.shape)} and dtype {scale.dtype}, "
                f"expected one float, or {tensor.shape[0]} for the rows"
            )
            continue
        values = scale.read().astype(np.float32)
        if not (np.isfinite(values).all() and (values > 0).all()):
            faults.append(f"{name}{SCALE} has numbers that are not positive, expected what integers are divided by")
        found[name] = Dequantized(np.dtype(np.float32), tensor.shape, tensor, scale)
    return found, faults


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


def holds_model(folder: Path) -> bool:
    """Whether a folder has a ``model.bin``, whole or in pieces."""
    return (folder / FILE).is_file() or bool(_pieces(folder))


def _pieces(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(f"{FILE}.*"))


def _model_file(folder: Path) -> Path:
    file = folder / FILE
    if not file.is_file():
        pieces = _pieces(folder)
        if pieces:
            raise InputError(
                f"{folder}: {FILE} in pieces ({', '.join(pieces)}) found, expected one file; "
                f"join all of them: cat {FILE}.* > {FILE}"
            )
        raise InputError(f"{folder}: no {FILE} found, expected a CTranslate2 folder")
    return file


def _read_start(reader: BinaryReader) -> tuple[str, int]:
    version = reader.number("I", "the version")
    if version != VERSION:
        raise InputError(
            f"{reader.file}: version {version} found, expected a CTranslate2 file of version {VERSION}; "
            "convert the model anew with CTranslate2 4"
        )
    return _string(reader, "the spec"), reader.number("I", "the revision")


def _string(reader: BinaryReader, what: str) -> str:
    """Text with a zero byte at its end, after its length."""
    length = reader.number("H", f"the length of {what}")
    text = reader.text(length, what)
    if not text.endswith("\0"):
        raise InputError(
            f"{reader.file}: {text[:40]!r} found as {what}, expected text that ends with a zero byte; download it anew"
        )
    return text[:-1]
