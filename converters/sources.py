"""Reading what conversions start from: JSON objects, companions of the weights, hashes for the provenance."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ichigo_jax.errors import InputError
from ichigo_jax.storage import read_json


def read_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
      InputError: no such file, or another content.
    """
    values = read_json(file)
    if not isinstance(values, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values


def copy_files(names: Iterable[str], source: Path, target: Path) -> None:
    """Copies those files of a folder that are there."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def sha256(file: str | os.PathLike) -> str:
    """Of a file's contents, hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
