"""From examples to batches, as a function of the batch's number.

Batch ``k`` depends on the seed and on ``k`` alone, whatever was read before it and on however many hosts: resuming at
step ``k`` starts reading there at once and reads the same. Shuffling, repeating and mixing are Grain's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ichigo_jax.errors import InputError
from ichigo_jax.parallel import partition_spec

IGNORE = -100  # a target that carries no loss, as in torch.nn.CrossEntropyLoss(ignore_index=-100)


class _HostRows(grain.MapDataset):
    """Of every ``batch_size`` consecutive examples, the equal part that one host reads."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, host: int, hosts: int):
        super().__init__(parent)
        self._batch_size, self._rows, self._first = batch_size, batch_size // hosts, batch_size // hosts * host

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * self._rows

    def __getitem__(self, index: int) -> Any:
        batch, row = divmod(index, self._rows)
        return self._parent[batch * self._batch_size + self._first + row]


def training_batches(
    sources: Sequence[grain.MapDataset], weights: Sequence[float], batch_size: int, seed: int
) -> grain.MapDataset:
    """This host's part of an endless row of batches, shuffled anew each epoch and mixed in the proportion of ``weights``.

    Args:
      sources: data sets of examples, each a dictionary of equally shaped arrays.
      weights: how often each source is drawn, relative to the others.
      batch_size: examples in a batch of all hosts together.
      seed: of the shuffles.

    Raises:
      InputError: an empty source, a weight that is not positive, or a batch size that the hosts do not divide.
    """
    hosts = jax.process_count()
    if batch_size % hosts:
        raise InputError(f"batch_size {batch_size} found, expected a multiple of the {hosts} hosts")
    if not sources or any(len(source) == 0 for source in sources):
        raise InputError("a data source without examples found, expected at least one example in each")
    if any(weight <= 0 for weight in weights):
        raise InputError(f"source weights {list(weights)} found, expected positive numbers")
    shuffled = [source.seed(seed + number).shuffle().repeat() for number, source in enumerate(sources)]
    mixed = shuffled[0] if len(shuffled) == 1 else grain.MapDataset.mix(shuffled, weights)
    return _HostRows(mixed, batch_size, jax.process_index(), hosts).batch(batch_size // hosts)


def read_batches(dataset: grain.MapDataset, start: int, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    """Batches ``start``, ``start + 1``, … read ahead by threads and laid over the mesh."""
    iterator = iter(dataset.slice(slice(start, None)).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))
    sharding = NamedSharding(mesh, PartitionSpec(partition_spec(["batch"])[0]))
    for batch in iterator:
        yield {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}
