"""From examples to batches, as a function of the batch's number.

Batch ``k`` depends on the seed and on ``k`` alone, whatever was read before it and on however many hosts: resuming at
step ``k`` starts reading there at once and reads the same. Shuffling, repeating and mixing are Grain's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ichigo_jax.errors import InputError
from ichigo_jax.parallel import batch_sharding, mesh_axes

IGNORE = -100  # a target that carries no loss, as in torch.nn.CrossEntropyLoss(ignore_index=-100)


class _SomeRows(grain.MapDataset):
    """Of every ``batch_size`` consecutive examples, those of ``rows``."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: range):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, rows

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> Any:
        batch, row = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + self._rows[row]]


def training_examples(sources: Sequence[grain.MapDataset], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """An endless row of examples, shuffled anew each epoch and mixed in the proportion of ``weights``.

    Args:
      sources: data sets of examples, each a dictionary of equally shaped arrays.
      weights: how often each source is drawn, relative to the others.
      seed: of the shuffles.

    Raises:
      InputError: an empty source, or a weight that is not positive.
    """
    if not sources or any(len(source) == 0 for source in sources):
        raise InputError("a data source without examples found, expected at least one example in each")
    if not all(0 < weight < math.inf for weight in weights):
        raise InputError(f"source weights {list(weights)} found, expected positive numbers")
    shuffled = [source.seed(seed + number).shuffle().repeat() for number, source in enumerate(sources)]
    return shuffled[0] if len(shuffled) == 1 else grain.MapDataset.mix(shuffled, weights)


class _Places:
    """For a source of ``size`` examples, (``source``, index) of each."""

    def __init__(self, source: int, size: int):
        self._source, self._size = source, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self._source, index


def places_in_batch(
    sizes: Sequence[int], weights: Sequence[float], seed: int, batch_size: int, number: int
) -> list[tuple[int, int]]:  # fmt: skip
    """Which examples batch ``number`` of all hosts is made of, as (source, index), without reading any.

    Args:
      sizes: examples of each source.
      weights, seed: as for ``training_examples``.
      batch_size: examples in a batch.
      number: of the batch, from 0.
    """
    places = training_examples([grain.MapDataset.source(_Places(*each)) for each in enumerate(sizes)], weights, seed)
    return [places[row] for row in range(number * batch_size, (number + 1) * batch_size)]


def host_batches(examples: grain.MapDataset, batch_size: int, rows: range) -> grain.MapDataset:
    """Batch 0, 1, 2, …: the examples of ``rows`` out of every ``batch_size``."""
    return _SomeRows(examples, batch_size, rows).batch(len(rows))


def rows_of_host(sharding: NamedSharding, batch_size: int, host: int) -> range:
    """The rows of a batch that a host's devices hold. Hosts that share the rows (a model split over them) hold the same.

    Raises:
      InputError: a batch that the devices cannot share evenly, or a host whose rows are not next to each other.
    """
    devices = math.prod(sharding.mesh.shape[axis] for axis in mesh_axes(sharding.spec[0]))
    if batch_size % devices:
        raise InputError(
            f"train.batch_size {batch_size} found, expected a multiple of the {devices} devices of the mesh axes data and fsdp"
        )
    parts = sharding.devices_indices_map((batch_size,)).items()
    rows = sorted({row for device, (part,) in parts if device.process_index == host for row in range(*part.indices(batch_size))})
    if rows != list(range(rows[0], rows[-1] + 1)):
        raise InputError(
            f"mesh {dict(sharding.mesh.shape)}: host {host} holds rows {rows} of a batch, expected ones next to each other; make "
            "the product of tensor and context a divisor or a multiple of the devices of a host"
        )
    return range(rows[0], rows[-1] + 1)


def read_batches(examples: grain.MapDataset, batch_size: int, start: int, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    """Batches ``start``, ``start + 1``, … read ahead by threads and laid over the mesh; each host reads its own rows.

    Args:
      examples: from ``training_examples``.
      batch_size: examples in a batch of all hosts together.
      start: the first batch's number.
      mesh: of the run.

    Raises:
      InputError: as ``rows_of_host``.
    """
    sharding = batch_sharding(mesh)
    batches = host_batches(examples, batch_size, rows_of_host(sharding, batch_size, jax.process_index()))
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    iterator = iter(batches.slice(slice(start, None)).to_iter_dataset(options))

    def laid_out(value: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, value, (batch_size, *value.shape[1:]))

    return ({name: laid_out(value) for name, value in batch.items()} for batch in iterator)
