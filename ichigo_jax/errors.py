"""Errors that a user can act on."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from ichigo_jax import jaxlib_faults


class InputError(ValueError):
    """Something the user gave (a file, a flag, a config field) cannot be used.

    The message is one line that says what was found, what was expected and what to do. Commands print it and exit
    with code 2; library callers catch it as a ``ValueError``.
    """


def check_jaxlib() -> None:
    """Makes sure that JAX computes right results on this machine; to be called before JAX looks for devices.

    Raises:
      InputError: a build of jaxlib that computes wrong ones, and it is too late to set the flag that mends it.
    """
    if (fault := jaxlib_faults.avoid()) is not None:
        raise InputError(fault)


def command(main: Callable[..., int | None]) -> Callable[..., None]:
    """Turns ``main`` into a command: an ``InputError`` becomes one line on standard error and exit code 2."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        try:
            check_jaxlib()
            code = main(*args, **kwargs)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = 130
        sys.exit(code or 0)

    return run
