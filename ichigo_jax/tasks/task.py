"""What ``train`` asks of a thing that it can train."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import grain
import jax
from flax import nnx
from jax.sharding import Mesh

from ichigo_jax.errors import InputError
from ichigo_jax.training.run_config import RunConfig

Scalars = dict[str, jax.Array]


class Task(Protocol):
    """One of ``tasks``; built from the whole config and the run's folder, where it may record faults in the data.

    Without a folder it reads no data and no weights and knows shapes alone: ``make_model``, ``batch_shapes``, ``loss``.
    """

    def __init__(self, config: RunConfig, workdir: Path | None): ...

    def make_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """A model with random parameters."""

    def load_model(self, folder: str, mesh: Mesh) -> nnx.Module:
        """The model of a model folder, laid over the mesh; InputError where it is not the config's model."""

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of a batch of all hosts; of a mixture, among them the number of each row's source (``data.sources``)."""

    def tokens_per_step(self) -> int:
        """Tokens in a batch: ids of a language model, sound codes of a speech tokenizer, padding among them."""

    def examples(self) -> grain.MapDataset:
        """Example 0, 1, 2, …, without end: so many in a row are a batch."""

    def data_sizes(self) -> list[int]:
        """Examples in each source; a resumed run must find the same."""

    def rows_of_batch(self, number: int) -> dict[str, list[int]]:
        """Which rows of each source batch ``number`` of all hosts is made of, from 0, not counting rows that cannot be used."""

    def totals(self, batch: Mapping[str, jax.Array]) -> Scalars:
        """What the sums over a whole batch are divided by."""

    def loss(
        self, model: nnx.Module, batch: Mapping[str, jax.Array], totals: Scalars, key: jax.Array
    ) -> tuple[jax.Array, Scalars]:
        """A part of a batch's share of the loss and of the metrics: shares of all parts add up to the whole batch's.

        May update the model's buffers in place.
        """

    def report(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Metrics as scalars for the log; those of several numbers (counts of codes, losses of sources) are summed up here."""

    def evaluate(self, model: nnx.Module) -> dict[str, float]:
        """Metrics on held-out data."""

    def save(self, model: nnx.Module, folder: Path) -> None:
        """Writes the model folder."""


def check_equal(folder: str, found: Any, expected: Any, but: tuple[str, ...] = ()) -> None:
    """Refuses a model folder whose dataclass differs from the config's in other fields than ``but``."""
    names = [field.name for field in dataclasses.fields(expected) if field.name not in but]
    differ = [name for name in names if getattr(found, name) != getattr(expected, name)]
    if differ:
        faults = ", ".join(f"{name} {getattr(found, name)!r} (config: {getattr(expected, name)!r})" for name in differ)
        raise InputError(f"{folder}: found {faults}; change config.model or give another init_from")
