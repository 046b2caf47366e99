"""Files that appear under their name only when whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ichigo_jax.errors import InputError


@contextlib.contextmanager
def whole(target: str | os.PathLike, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside ``target`` to write a file or folder at; renames it to ``target`` on success.

    On any error what was written is removed and ``target`` is as it was.

    Args:
      target: the final file or folder.
      replace: whether an existing ``target`` is replaced.

    Raises:
      InputError: ``target`` exists and ``replace`` is false.
    """
    target = Path(target)
    if target.exists() and not replace:
        raise InputError(f"{target}: exists already; remove it or choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        yield partial
        if target.is_dir() and not target.is_symlink():
            old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
            os.rename(target, old)
            os.rename(partial, target)
            shutil.rmtree(old)
        else:
            os.replace(partial, target)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically."""
    with whole(path, replace=True) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file.

    Raises:
      InputError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, IsADirectoryError) as error:
        raise InputError(f"{path}: expected JSON, found {error}") from None


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads a file of one JSON object a line.

    Raises:
      InputError: the file is missing, or a line is not a JSON object; the message names the line.
    """
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a file of JSON lines, found {type(error).__name__}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: expected a JSON object, found {line[:60]!r}")
            rows.append(row)
    return rows
