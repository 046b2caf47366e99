"""What a folder holds, told from its contents and never from its name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from converters.llama import ARCHITECTURES
from ichigo_jax.errors import InputError
from ichigo_jax.storage import read_json


@dataclasses.dataclass(frozen=True)
class Recognised:
    """Attributes:

    path: the folder.
    format: "hf" (a Hugging Face folder) or "model folder" (ours).
    kind: which model, as a model folder's ``config.json`` calls it.
    """

    path: Path
    format: Literal["hf", "model folder"]
    kind: str


def recognise(path: Path) -> Recognised:
    """Tells what ``path`` holds.

    Raises:
      InputError: nothing there, or nothing that is known.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if not path.is_dir():
        raise InputError(f"{path}: a file found, expected a Hugging Face folder or a model folder")
    if not (path / "config.json").exists():
        raise InputError(f"{path}: no config.json in it, expected a Hugging Face folder or a model folder")
    values = read_json(path / "config.json")
    if isinstance(values, dict) and isinstance(values.get("kind"), str):
        return Recognised(path, "model folder", values["kind"])
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type in ARCHITECTURES:
        return Recognised(path, "hf", "language_model")
    raise InputError(
        f"{path}: config.json with model_type {model_type!r} found, expected a model folder (kind) "
        f"or model_type {' or '.join(map(repr, ARCHITECTURES))}"
    )
