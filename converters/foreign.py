"""What a foreign file holds that the model here does not, kept in the model folder so that an export can give it back.

``foreign.json`` has a section a part ("whisper", "quantizer"): the format it came in and that format's settings as they were.
``foreign.safetensors`` has the quantiser's bookkeeping tensors under the foreign names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters import safetensors_files
from converters.engine import TensorInfo
from converters.sources import read_object
from ichigo_jax.storage import write_json

SECTIONS, TENSORS = "foreign.json", "foreign.safetensors"


def write(folder: Path, sections: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Adds both files to a model folder; nothing where there is nothing to keep."""
    if sections:
        write_json(folder / SECTIONS, sections)
    if tensors:
        infos = {key: TensorInfo(array.dtype, array.shape) for key, array in tensors.items()}
        safetensors_files.write_file(folder / TENSORS, infos, tensors.__getitem__)


def read_sections(folder: Path) -> dict[str, Any]:
    """The sections of a model folder, which has none when it was trained here."""
    return read_object(folder / SECTIONS) if (folder / SECTIONS).exists() else {}


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """The bookkeeping tensors of a model folder, if any."""
    if not (folder / TENSORS).exists():
        return {}
    return {key: tensor.read() for key, tensor in safetensors_files.read_header(folder / TENSORS).items()}


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that come back from JSON as they were: numbers, text and groups of them, but no tensors."""

    def fits(value: Any) -> bool:
        try:
            return json.loads(json.dumps(value)) == value
        except (TypeError, ValueError):
            return False

    return {key: value for key, value in values.items() if fits(value)}
