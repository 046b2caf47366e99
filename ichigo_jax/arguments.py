"""What a command's flags may hold: numbers in a range and Unicode text; each fault of them is one line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from ichigo_jax.errors import InputError


class ArgumentParser(argparse.ArgumentParser):
    """As argparse's own, but a wrong flag is an ``InputError``, one line instead of the usage and a line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def whole_number(name: str, at_least: int, at_most: int | None = None) -> Callable[[str], int]:
    """A ``type`` for ``add_argument``: integers from ``at_least`` to ``at_most``."""
    bounds = f"at least {at_least}" if at_most is None else f"{at_least} to {at_most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < at_least or (at_most is not None and value > at_most):
            raise argparse.ArgumentTypeError(f"{name} {text} found, expected a whole number, {bounds}")
        return value

    return parse


def above_zero(name: str) -> Callable[[str], float]:
    """A ``type`` for ``add_argument``: numbers above 0; ``inf`` is one of them, NaN is not."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{name} {text} found, expected a number above 0")
        return value

    return parse


def unicode_text(text: str) -> str:
    """A ``type`` for ``add_argument``: text whose bytes were UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("text found that is not UTF-8; check the terminal's encoding") from None
    return text
