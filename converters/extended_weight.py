"""An embedding or a head with rows for new tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from converters.engine import Weight
from ichigo_jax.storage.stored_arrays import rows_per_block


@dataclasses.dataclass(frozen=True)
class ExtendedWeight(Weight):
    """[V, D] of ``source`` with new rows from ``first`` on in place of what is there, and old ones after them, if any.

    Attributes:
      source: the embedding or the head, [V, D].
      first: id of the first new row; the rows before it are in use.
      count: new rows.
      noise: standard deviation, as a fraction of that of the rows in use, column by column.
      seed: of the noise.
    """

    source: Weight
    first: int
    count: int
    noise: float
    seed: tuple[int, ...]

    def read(self) -> np.ndarray:
        return np.concatenate(list(self.blocks()))

    def blocks(self) -> Iterator[np.ndarray]:
        yield from _rows(self.source, 0, self.first)
        mean, deviation = _statistics(_rows(self.source, 0, self.first))
        rng = np.random.default_rng(self.seed)
        step = rows_per_block(self.shape, self.dtype.itemsize)
        for begin in range(0, self.count, step):
            noise = rng.standard_normal((min(step, self.count - begin), self.shape[1]), np.float32)
            yield (mean + self.noise * deviation * noise).astype(self.dtype)
        yield from _rows(self.source, self.first + self.count, self.source.shape[0])


def _rows(weight: Weight, begin: int, end: int) -> Iterator[np.ndarray]:
    """Rows ``begin`` to ``end`` of a weight, in blocks."""
    position = 0
    for block in weight.blocks():
        part = block[max(begin - position, 0) : max(end - position, 0)]
        if len(part):
            yield part
        position += len(block)


def _statistics(blocks: Iterator[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, float32 [D]."""
    count, total, squares = 0, 0.0, 0.0
    for block in blocks:
        values = block.astype(np.float32)
        count += len(values)
        total = total + values.sum(axis=0, dtype=np.float64)
        squares = squares + np.einsum("vd,vd->d", values, values)
    mean = total / count
    return mean.astype(np.float32), np.sqrt(np.maximum(squares / count - mean**2, 0)).astype(np.float32)
