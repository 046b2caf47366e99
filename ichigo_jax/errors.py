"""Errors that a user can act on."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator


class InputError(ValueError):
    """Something the user gave (a file, a flag, a config field) cannot be used.

    The message is one line that says what was found, what was expected and what to do. Commands print it and exit
    with code 2; library callers catch it as a ``ValueError``.
    """


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """The block writes ``path``: an ``OSError`` (a full disk, no permission) becomes an ``InputError`` that names it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}; make room or choose another place") from error


def command(main: Callable[..., int | None]) -> Callable[..., None]:
    """Turns ``main`` into a command: an ``InputError`` becomes one line on standard error and exit code 2."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        try:
            code = main(*args, **kwargs)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = 130
        sys.exit(code or 0)

    return run
