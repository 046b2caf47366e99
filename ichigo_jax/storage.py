"""Files that appear under their name only when whole, streams that are written as they are, and JSON."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ichigo_jax.errors import InputError, ReaderGone, system_fault

STANDARD_OUTPUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
_STANDARD_ERROR = ("/dev/stderr", "/dev/fd/2", "/proc/self/fd/2")
_DESCRIPTOR = re.compile(r"(?:/dev|/proc/self)/fd/(\d+)")

_LONGEST_STEM = 100  # bytes of a name that its partial file keeps: the whole name may be as long as the disk allows
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def whole(target: str | os.PathLike, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside ``target`` to write a file or folder at; renames it to ``target`` on success.

    On any error what was written is removed and ``target`` is as it was.

    Args:
      target: the final file or folder.
      replace: whether an existing ``target`` is replaced.

    Raises:
      InputError: ``target`` exists and ``replace`` is false, or it cannot be written, as on a full disk.
    """
    target = Path(target)
    _check_free(target, replace)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(target, error) from None
    partial = _beside(target, "partial")
    try:
        yield partial
        if partial.is_dir() and target.is_dir() and not target.is_symlink():
            old = _beside(target, "old")
            os.rename(target, old)
            os.rename(partial, target)
            shutil.rmtree(old)
        else:
            os.replace(partial, target)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise _cannot_write(target, error) from None
        raise
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """The block writes ``path`` and nothing else: what the system has against it becomes an ``InputError`` that names it."""
    try:
        yield
    except OSError as error:
        raise _cannot_write(Path(path), error) from error


def check_output(target: str | os.PathLike, replace: bool = False) -> None:
    """Refuses, before the work, an output that could not be written after it.

    Args:
      target: a file or a folder to write, or a stream (see ``open_output``).
      replace: whether an existing file ``target`` will be replaced.

    Raises:
      InputError: ``target`` is a folder, or a file and ``replace`` is false; something above it is no folder; or nothing can
        be written there.
    """
    if is_stream(target):
        return
    target = Path(target)
    _check_free(target, replace)
    if target.is_dir():
        raise InputError(f"{target}: found a folder, expected a file to replace; choose another name")
    folder = target.parent
    while not os.path.lexists(folder):
        folder = folder.parent
    try:  # by doing it, since permissions alone do not tell of disks that are read-only, full or over a quota
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise _cannot_write(target, error) from None


def is_stream(target: str | os.PathLike) -> bool:
    """Whether ``target`` is written as it goes: ``-``, ``/dev/stdout``, ``/dev/fd/3``, a named pipe, a device."""
    name = os.fspath(target)
    if name in STANDARD_OUTPUT or name in _STANDARD_ERROR or _DESCRIPTOR.fullmatch(name):
        return True
    try:
        mode = os.stat(name).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextlib.contextmanager
def open_output(target: str | os.PathLike, replace: bool = False) -> Iterator[IO[str]]:
    """Yields a text file, UTF-8, for a command's output.

    ``-`` and ``/dev/stdout`` are standard output, other streams are opened as they are, and everything else is a file that
    appears under its name when it is whole.

    Raises:
      InputError: what ``whole`` refuses, or a stream that cannot be opened.
      ReaderGone: nobody reads the pipe any longer.
    """
    name = os.fspath(target)
    if name in STANDARD_OUTPUT or name in _STANDARD_ERROR:
        file = sys.stdout if name in STANDARD_OUTPUT else sys.stderr
        if file is None:
            raise InputError(f"{target}: cannot be written: it is closed; choose another output")
        yield file
        file.flush()
    elif is_stream(name):
        try:
            numbered = _DESCRIPTOR.fullmatch(name)  # opened by its name, a file behind it would be cut to nothing
            file = open(os.dup(int(numbered[1])) if numbered else name, "w", encoding="utf-8")
        except (OSError, OverflowError) as error:
            raise InputError(f"{target}: cannot be written: {error}; choose another output") from None
        try:
            with file:
                yield file
        except BrokenPipeError:
            raise ReaderGone from None
    else:
        check_output(target, replace)
        with whole(target, replace) as partial, partial.open("w", encoding="utf-8") as file:
            yield file


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


def _check_free(target: Path, replace: bool) -> None:
    try:
        os.lstat(target)
    except (FileNotFoundError, NotADirectoryError):
        return  # a file above it is told of when it is written
    except (OSError, ValueError) as error:
        raise _cannot_write(target, error) from None
    if not replace:
        raise InputError(f"{target}: exists already; remove it or choose another name")


def _cannot_write(target: Path, error: Exception) -> InputError:
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return InputError(f"{target}: cannot be written: {system_fault(error)}; make room or choose another place")
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        file = next((above for above in target.parents if above.exists() and not above.is_dir()), "a part of it")
        return InputError(f"{target}: cannot be written: {file} is a file, expected a folder; choose another place")
    reason = system_fault(error) if isinstance(error, OSError) else error
    return InputError(f"{target}: cannot be written: {reason}; choose another place")


def _beside(target: Path, role: str) -> Path:
    stem = os.fsdecode(os.fsencode(target.name)[:_LONGEST_STEM])
    return target.with_name(f".{stem}.{role}-{uuid.uuid4().hex[:8]}")
