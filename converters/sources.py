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


def is_file(file: Path) -> bool:
    """Whether there is such a file. A link counts as what it leads to: the folder is the user's own, and so are its links.

    Raises:
      InputError: a link that leads nowhere.
    """
    if file.is_symlink() and not file.exists():
        raise InputError(
            f"{file}: a link to {os.readlink(file)} found, where nothing is; fetch that file (from a hub: download the model "
            "again) or remove the link"
        )
    return file.is_file()


def read_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
      InputError: no such file, a link that leads nowhere, or another content.
    """
    is_file(file)
    values = read_json(file)
    if not isinstance(values, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values


def copy_files(names: Iterable[str], source: Path, target: Path) -> None:
    """Copies those files of a folder that are there; of a link, what it leads to.

    Raises:
      InputError: a link that leads nowhere.
    """
    for name in names:
        if is_file(source / name):
            shutil.copyfile(source / name, target / name)


def sha256(file: str | os.PathLike) -> str:
    """Of a file's contents, hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
