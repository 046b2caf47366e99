"""What ``train`` asks of a thing that it can train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import grain
import jax
from flax import nnx
from jax.sharding import Mesh

from ichigo_jax.training.run_config import RunConfig

Scalars = dict[str, jax.Array]


class Task(Protocol):
    """One of ``tasks``; built from the whole config and the run's folder, where it may record faults in the data."""

    def __init__(self, config: RunConfig, workdir: Path): ...

    def make_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """A model with random parameters."""

    def load_model(self, folder: str, mesh: Mesh) -> nnx.Module:
        """The model of a model folder, laid over the mesh; InputError where it is not the config's model."""

    def batches(self) -> grain.MapDataset:
        """This host's part of batch 0, 1, 2, …, without end."""

    def data_sizes(self) -> list[int]:
        """Examples in each source; a resumed run must find the same."""

    def totals(self, batch: Mapping[str, jax.Array]) -> Scalars:
        """What the sums over a whole batch are divided by."""

    def loss(
        self, model: nnx.Module, batch: Mapping[str, jax.Array], totals: Scalars, key: jax.Array
    ) -> tuple[jax.Array, Scalars]:
        """A part of a batch's share of the loss and of the metrics: shares of all parts add up to the whole batch's.

        May update the model's buffers in place.
        """

    def report(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Metrics as scalars for the log; those of several numbers (counts of codes) are summed up here."""

    def evaluate(self, model: nnx.Module) -> dict[str, float]:
        """Metrics on held-out data."""

    def save(self, model: nnx.Module, folder: Path) -> None:
        """Writes the model folder."""
