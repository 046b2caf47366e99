"""Several sources as one: what is drawn from them, and the loss of each beside the loss of the whole batch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp

from ichigo_jax.data.loading import IGNORE, places_in_batch, training_examples
from ichigo_jax.data.sources import SOURCE, numbered, rows_of_places, source_names
from ichigo_jax.errors import InputError
from ichigo_jax.training.losses import Scalars
from ichigo_jax.training.run_config import RunConfig

LOSSES, TARGETS = "source_losses", "source_targets"


class Mixture:
    """The training data of a run: what is drawn from its sources, in the proportion of their weights.

    Args:
      examples: of each source; each knows which rows of its file an example is made of (``data.sources.MadeOfRows``).
      data: the config's section, whose ``sources`` have a ``path`` and a ``weight`` each.
      config: of the run, for its seed and batch size.
      faults_file: see below.

    Attributes:
      sizes: number of examples in each source; a resumed run must find the same.
      faults_file: where examples that cannot be used are recorded.
    """

    def __init__(self, examples: Sequence[Any], data: Any, config: RunConfig, faults_file: Path):
        self.faults_file = faults_file
        self.sizes = [len(source) for source in examples]
        self._sources, self._config = examples, config
        self._paths = [source.path for source in data.sources]
        self._weights = [source.weight for source in data.sources]

    def check_sizes(self, before: Sequence[int], accept: bool) -> None:
        """Refuses to resume on changed data: batches are read by number, which means the same batches on the same data alone.

        Args:
          before: the sizes when the run began.
          accept: whether other sizes are told of on standard error, and no error.

        Raises:
          InputError: they were others than now.
        """
        if list(before) == self.sizes:
            return
        found = f"the data sources had {before} examples when this run began, now {self.sizes}"
        if not accept:
            raise InputError(f"{found}; restore them, choose another --workdir, or go on with --accept-changed-data")
        print(f"{found}; from here on batches are of what is there now", file=sys.stderr)

    def examples(self) -> grain.MapDataset:
        """Example 0, 1, 2, …, without end: so many in a row are a batch."""
        datasets = [grain.MapDataset.source(source) for source in numbered(self._sources)]
        return training_examples(datasets, self._weights, self._config.seed)

    def rows_of_batch(self, number: int) -> dict[str, list[int]]:
        """Which rows of each source batch ``number`` of all hosts is made of, from 0, not counting rows that cannot be used."""
        config = self._config
        places = places_in_batch(self.sizes, self._weights, config.seed, config.train.batch_size, number)
        return rows_of_places(places, self._sources, self._paths)


def source_shapes(sources: Sequence[Any], batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What batches of these sources have beside their other fields: int32 [B], where there are several."""
    return {SOURCE: jax.ShapeDtypeStruct((batch_size,), jnp.int32)} if len(sources) > 1 else {}


def source_totals(batch: Mapping[str, jax.Array], data: Any) -> Scalars:
    """Of a whole batch, the targets of each of ``data.sources``, at least 1: float32 [S]. Empty for a single source."""
    return {TARGETS: jnp.maximum(_by_source(_targets(batch), batch, len(data.sources)), 1.0)} if SOURCE in batch else {}


def source_metrics(batch: Mapping[str, jax.Array], of_tokens: jax.Array, totals: Scalars) -> dict[str, jax.Array]:
    """A part of a batch's share of each source's cross-entropy and its number of targets, float32 [S] each.

    Args:
      batch: the part.
      of_tokens: cross-entropy of each target, float32 [B, T], 0 where there is none.
      totals: of the whole batch, from ``source_totals``.
    """
    if SOURCE not in batch:
        return {}
    count = len(totals[TARGETS])
    losses = _by_source(of_tokens.sum(-1), batch, count) / totals[TARGETS]
    return {LOSSES: losses, TARGETS: _by_source(_targets(batch), batch, count)}


def source_report(metrics: Mapping[str, Any], paths: Sequence[str]) -> dict[str, float]:
    """The metrics, with ``loss/NAME`` of each source that the batch had targets of in place of ``source_metrics``."""
    values = dict(metrics)
    losses, targets = values.pop(LOSSES, ()), values.pop(TARGETS, ())
    found = zip(source_names(paths), losses, targets)
    return {**values, **{f"loss/{name}": float(loss) for name, loss, count in found if count > 0}}


def _targets(batch: Mapping[str, jax.Array]) -> jax.Array:
    """[B]"""
    return (batch["targets"] != IGNORE).sum(-1).astype(jnp.float32)


def _by_source(values: jax.Array, batch: Mapping[str, jax.Array], count: int) -> jax.Array:
    """Sums over the rows of each of ``count`` sources. [B] -> [S]."""
    return jnp.where(batch[SOURCE][:, None] == jnp.arange(count), values[:, None], 0.0).sum(0)
