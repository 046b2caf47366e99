"""Errors that a user can act on."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable


class InputError(ValueError):
    """Something the user gave (a file, a flag, a config field) cannot be used.

    The message is one line that says what was found, what was expected and what to do. Commands print it and exit
    with code 2; library callers catch it as a ``ValueError``.
    """


class InputWarning(UserWarning):
    """Something the user gave is used although it looks wrong.

    The message is one line that names it. Commands print it on standard error, once.
    """


def show_input_warnings() -> None:
    """From now on an ``InputWarning`` is shown as its one line, without the place in the code where it was raised."""
    others = warnings.showwarning

    def show(message, category, *place) -> None:
        if issubclass(category, InputWarning):
            print(f"warning: {message}", file=sys.stderr)
        else:
            others(message, category, *place)

    warnings.showwarning = show


def command(main: Callable[..., int | None]) -> Callable[..., None]:
    """Turns ``main`` into a command: an ``InputError`` becomes one line on standard error and exit code 2."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        show_input_warnings()
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
