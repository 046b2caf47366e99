"""Output files that appear under their name only when they are complete, and streams, which are written as they go."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ichigo_jax.errors import InputError, ReaderGone, system_fault

STANDARD_OUTPUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
_STANDARD_ERROR = ("/dev/stderr", "/dev/fd/2", "/proc/self/fd/2")
_DESCRIPTOR = re.compile(r"(?:/dev|/proc/self)/fd/(\d+)")

_LONGEST_STEM = 100  # bytes of a name that its partial file keeps: the whole name may be as long as the disk allows
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def atomic_write(target: str | os.PathLike, replace: bool = False) -> Iterator[Path]:
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
            raise _cannot_write(target, error) from error
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
      InputError: what ``atomic_write`` refuses, or a stream that cannot be opened.
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
        with atomic_write(target, replace) as partial, partial.open("w", encoding="utf-8") as file:
            yield file


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
