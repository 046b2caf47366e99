"""PyTorch's pickled files, opened only by the loader that runs no code from them."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from converters.engine import TensorInfo
from ichigo_jax.errors import InputError

# From here on ``weights_only=True`` holds what it promises; earlier versions had ways around it.
OLDEST_TORCH = (2, 10)

_DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "bool": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class Tensor(TensorInfo):
    """A tensor of an opened file; its pages come into memory as they are used."""

    value: Any

    def read(self) -> np.ndarray:
        value = self.value.detach().contiguous()
        if self.dtype == ml_dtypes.bfloat16:  # which torch does not hand to NumPy
            return value.view(_torch().int16).numpy().view(ml_dtypes.bfloat16)
        return value.numpy()


def load(file: Path) -> dict[str, Any]:
    """The dictionary that a file holds.

    Raises:
      InputError: torch is missing or too old; the file is no PyTorch file, or holds more than tensors and plain values.
    """
    torch = _torch()
    try:
        # Only the newer format, a zip archive, can be mapped; the older one is read whole.
        contents = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # whatever is wrong with a file, torch has a different exception for it
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"{refused[1]}, which is code" if refused else type(error).__name__
        raise InputError(
            f"{file}: expected a PyTorch file of tensors and plain values and nothing else, found {reason}"
        ) from None
    if not isinstance(contents, Mapping):
        raise InputError(f"{file}: expected a dictionary, found {type(contents).__name__}")
    return dict(contents)


def tensors(state_dict: Any, where: str) -> dict[str, Tensor]:
    """The tensors of a state dict by name.

    Raises:
      InputError: naming everything in it that is no ordinary tensor.
    """
    torch = _torch()
    if not isinstance(state_dict, Mapping):
        raise InputError(f"{where}: expected a dictionary of tensors, found {type(state_dict).__name__}")
    found, faults = {}, []
    for key, value in state_dict.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            faults.append(f"{key} is no dense tensor but {type(value).__name__}")
        elif (dtype := str(value.dtype).removeprefix("torch.")) not in _DTYPES:
            faults.append(f"{key} has dtype {dtype}, expected one of {', '.join(_DTYPES)}")
        else:
            found[str(key)] = Tensor(np.dtype(_DTYPES[dtype]), tuple(value.shape), value)
    if faults:
        raise InputError(f"{where}: {'; '.join(faults)}")
    return found


def save(file: Path, contents: Mapping[str, Any]) -> None:
    """Writes a dictionary of plain values and (nested) NumPy arrays, which become tensors."""
    torch = _torch()

    def convert(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: convert(item) for key, item in value.items()}
        if not isinstance(value, np.ndarray):
            return value
        array = np.array(value, order="C")  # a copy of its own: torch warns of arrays that cannot be written to
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    with open(file, "wb") as stream:  # given a name, torch would write that into the archive
        torch.save(convert(contents), stream)


def _torch() -> Any:
    if importlib.util.find_spec("torch") is None:
        raise InputError("PyTorch files need torch, which is not installed; pip install 'ichigo_jax[convert]'")
    import torch

    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        raise InputError(
            f"torch {torch.__version__} found, expected {'.'.join(map(str, OLDEST_TORCH))} or newer to open pickled files "
            "safely; pip install 'ichigo_jax[convert]'"
        )
    return torch
