"""JSON files and files of JSON lines: one reader and one writer for all of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from ichigo_jax.errors import InputError, system_fault
from ichigo_jax.storage.files import open_output


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically unless ``path`` is a stream."""
    with open_output(path, replace=True) as file:
        file.write(_json(value, file, indent=2) + "\n")


def write_json_line(file: IO[str], value: Any) -> None:
    """Writes ``value`` as one line of JSON that every reader accepts, at once."""
    file.write(_json(value, file) + "\n")
    file.flush()


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file, with or without a byte-order mark.

    Raises:
      InputError: the file is missing, cannot be read or is not JSON.
    """
    try:
        return json.loads(_read_bytes(path, "JSON").decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: expected JSON, found {error}") from None


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads a file of one JSON object a line; see ``json_object`` for what a line may be.

    Raises:
      InputError: the file is missing or cannot be read, or a line is not a JSON object; the message names the line.
    """
    rows = []
    for number, line in enumerate(json_lines(_read_bytes(path, "a file of JSON lines")), 1):
        try:
            row = json_object(line)
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        if row is not None:
            rows.append(row)
    return rows


def json_lines(data: bytes) -> list[bytes]:
    """The lines of a file of JSON lines. Only ``\\n`` ends one: a text may hold U+2028, U+0085 and others that end lines."""
    return data.split(b"\n")


def json_object(line: bytes) -> dict[str, Any] | None:
    """The object on one line, or None where nothing is on it: ``b'{"path": "a.wav"}\\r'`` -> ``{"path": "a.wav"}``.

    The line is UTF-8. A byte-order mark before it is passed over, and control characters inside texts stay as they are.

    Raises:
      InputError: something else is on the line.
    """
    try:
        text = line.decode("utf-8-sig").strip(" \t\r\n")
        row = json.loads(text, strict=False) if text else {}
    except (ValueError, RecursionError):  # of the first a UnicodeDecodeError is one
        row = text = None
    if not isinstance(row, dict):
        raise InputError(f"expected a JSON object, found {line[:60]!r}")
    return row if text else None


def _json(value: Any, file: IO[str], indent: int | None = None) -> str:
    """JSON that ``file`` can hold: as text where its encoding has all characters, else with the others escaped."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode(getattr(file, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def _read_bytes(path: str | os.PathLike, expected: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected {expected}") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = system_fault(error) if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be read: {reason}; expected {expected}") from None
