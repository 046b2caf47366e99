"""How close recognised or answered text is to what was expected."""

from __future__ import annotations

import re
from collections.abc import Sequence

import jiwer


def normalize(text: str) -> str:
    """Lower case, no punctuation, single spaces: ``' Turn ON, please. '`` -> ``'turn on please'``."""
    return " ".join(re.sub(r"[^\w\s']", " ", text.lower()).split())


def error_rates(expected: Sequence[str], found: Sequence[str]) -> dict[str, float]:
    """Word and character error rate over a whole set, after ``normalize``: edits divided by what was expected."""
    expected, found = [normalize(text) for text in expected], [normalize(text) for text in found]
    return {"wer": jiwer.wer(expected, found), "cer": jiwer.cer(expected, found)}


def exact_fraction(expected: Sequence[str], found: Sequence[str]) -> float:
    """Share of texts that are equal after ``normalize``."""
    return sum(normalize(a) == normalize(b) for a, b in zip(expected, found, strict=True)) / max(len(expected), 1)
