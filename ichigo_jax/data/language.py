"""Rows of batches for the language model: one example each, or several that share it."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from ichigo_jax.data.loading import IGNORE
from ichigo_jax.data.row_formats import Example

PACKING_WINDOW = 4096  # examples that are fitted together at a time


def collate(examples: Sequence[Example], length: int, pad_id: int) -> dict[str, np.ndarray]:
    """One row of a batch from one or several examples, each its own segment.

    Examples ``([7, 8, 9], [F, T, T])`` and ``([5, 6], [T, T])`` in a row of 7, ``pad_id`` 0::

        tokens      [7, 8,    9,    5, 6,    0,    0]
        targets     [8, 9, -100,    6, -100, -100, -100]    # what follows within the segment, if it is to be predicted
        positions   [0, 1,    2,    0, 1,    0,    1]
        segment_ids [1, 1,    1,    2, 2,    0,    0]
    """
    row = {
        "tokens": np.full(length, pad_id, np.int32),
        "targets": np.full(length, IGNORE, np.int32),
        "positions": np.zeros(length, np.int32),
        "segment_ids": np.zeros(length, np.int32),
    }
    start = 0
    for segment, (ids, predicted) in enumerate(examples, 1):
        end = start + len(ids)
        row["tokens"][start:end] = ids
        row["targets"][start : end - 1] = np.where(predicted[1:], ids[1:], IGNORE)
        row["positions"][start:end] = np.arange(len(ids))
        row["segment_ids"][start:end] = segment
        start = end
    row["positions"][start:] = np.arange(length - start)
    return row


def pack(lengths: np.ndarray, capacity: int, seed: int) -> list[np.ndarray]:
    """Groups of examples that share a row, each at most ``capacity`` ids together.

    The examples are taken in a shuffled order, some thousands at a time; of these each in turn, the longest first, joins the
    group that it leaves the least room in, or begins one (best fit decreasing).

    ``pack(np.array([3, 4, 2, 1]), 5, seed)`` is ``[[1, 3], [0, 2]]``.

    Args:
      lengths: ids of each example, none above ``capacity``.
      capacity: ids in a row.
      seed: of the order in which examples are taken.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    groups: list[list[int]] = []
    for first in range(0, len(order), PACKING_WINDOW):
        window = order[first : first + PACKING_WINDOW]
        window = window[np.argsort(-lengths[window], kind="stable")]
        shortest = int(lengths[window[-1]])
        rooms: list[tuple[int, int]] = []  # of the groups that something may still fit into: room and number, ascending
        for example, length in zip(window.tolist(), lengths[window].tolist()):
            place = bisect.bisect_left(rooms, (length, 0))
            if place < len(rooms):
                room, group = rooms.pop(place)
                groups[group].append(example)
            else:
                room, group = capacity, len(groups)
                groups.append([example])
            if room - length >= shortest:
                bisect.insort(rooms, (room - length, group))
    return [np.array(group) for group in groups]


class Rows:
    """Rows of batches, one example each or packed; a random-access source for Grain.

    Args:
      examples: what the rows are made of.
      groups: which examples share a row, from ``pack``; None: one example a row.
      length: ids in a row.
      pad_id: what a row is filled with.
    """

    def __init__(self, examples: Sequence[Example], groups: list[np.ndarray] | None, length: int, pad_id: int):
        self._examples, self._groups, self._length, self._pad_id = examples, groups, length, pad_id

    def __len__(self) -> int:
        return len(self._examples) if self._groups is None else len(self._groups)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return collate([self._examples[member] for member in self.members(index)], self._length, self._pad_id)

    def members(self, index: int) -> list[int]:
        """Which examples a row is made of."""
        return [index] if self._groups is None else self._groups[index].tolist()
