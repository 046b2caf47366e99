"""Which source of a mixture an example comes from, told by the example itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

SOURCE = "source"  # the field of a batch, int32 [B]: the number of each row's source, where there are several


class Examples(Protocol):
    """A random-access source of examples, dictionaries of arrays."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class MadeOfRows(Protocol):
    """Examples that know what they are made of."""

    def members(self, index: int) -> list[int]:
        """Which rows of its data an example is made of, from 0."""


class NumberedExamples:
    """The same examples in the same order, each with the number of its source in the field ``source``.

    ``NumberedExamples([{"x": 7}], 2)[0]`` is ``{"x": 7, "source": 2}``.
    """

    def __init__(self, examples: Examples, number: int):
        self._examples, self._number = examples, np.int32(number)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._examples[index], SOURCE: self._number}


def rows_of_places(
    places: Sequence[tuple[int, int]], sources: Sequence[MadeOfRows], paths: Sequence[str]
) -> dict[str, list[int]]:
    """For each source's path the rows that examples, as (source, index), are made of."""
    rows: dict[str, list[int]] = {}
    for source, index in places:
        rows.setdefault(paths[source], []).extend(sources[source].members(index))
    return rows


def numbered(sources: Sequence[Examples]) -> list[Examples]:
    """Of a mixture every source with its number; a single source as it is."""
    return [NumberedExamples(source, number) for number, source in enumerate(sources)] if len(sources) > 1 else [*sources]


def source_names(paths: Sequence[str]) -> list[str]:
    """What sources are called in the log: the stem of the path, and the number as well where several have the same.

    ``["data/a.parquet", "data/b.parquet", "old/b.jsonl"]`` -> ``["a", "b-1", "b-2"]``. No two have one name: a stem that
    already looks like one with a number is numbered too, ``["b-1.parquet", "data/b.parquet", "old/b.jsonl"]`` ->
    ``["b-1-0", "b-1-1", "b-2"]``.
    """
    names = [Path(path).stem for path in paths]
    while len(set(names)) < len(names):
        count = Counter(names)
        names = [name if count[name] == 1 else f"{name}-{number}" for number, name in enumerate(names)]
    return names
