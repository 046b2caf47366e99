"""What the tasks' data sections have in common: weighted sources and named evaluation sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from ichigo_jax.errors import InputError


def check_weights(weights: Sequence[float]) -> None:
    """Refuses weights of data sources that say nothing of how often each is drawn.

    Raises:
      InputError: no source, or a weight that is not positive or not finite.
    """
    if not weights or not all(0 < weight < math.inf for weight in weights):
        raise InputError(f"sources with weights {[*weights]} found, expected at least one, each with a positive finite number")


class NamedSet(Protocol):
    """An evaluation set, of either task."""

    name: str
    limit: int


def check_evaluation(sets: Sequence[NamedSet]) -> None:
    """Refuses evaluation sets whose results could not be told apart, or that are of no rows.

    Raises:
      InputError: a name that is empty or there twice, or a limit below 1.
    """
    names = [each.name for each in sets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or "" in names:
        raise InputError(f"evaluation sets named {', '.join(map(repr, names))} found, expected a name of its own for each")
    for each in sets:
        if each.limit < 1:
            raise InputError(f"evaluation set {each.name!r} with limit {each.limit} found, expected at least 1 row")
