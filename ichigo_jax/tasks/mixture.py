"""Several sources as one: what is drawn from them, and the loss of each beside the loss of the whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp

from ichigo_jax.data.loading import IGNORE, places_in_batch, training_examples
from ichigo_jax.data.sources import SOURCE, numbered, rows_of_places, source_names
from ichigo_jax.tasks.task import Scalars
from ichigo_jax.training.run_config import RunConfig

LOSSES, TARGETS = "source_losses", "source_targets"


def mixed_examples(sources: Sequence[Any], data: Any, config: RunConfig) -> grain.MapDataset:
    """``task.Task.examples`` of ``sources``, in the proportion of the weights in ``data.sources``."""
    return training_examples([grain.MapDataset.source(source) for source in numbered(sources)], _weights(data), config.seed)


def mixed_rows(sources: Sequence[Any], data: Any, config: RunConfig, number: int) -> dict[str, list[int]]:
    """``task.Task.rows_of_batch`` of what ``mixed_examples`` draws."""
    places = places_in_batch([len(source) for source in sources], _weights(data), config.seed, config.train.batch_size, number)
    return rows_of_places(places, sources, [source.path for source in data.sources])


def _weights(data: Any) -> list[float]:
    return [source.weight for source in data.sources]


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
