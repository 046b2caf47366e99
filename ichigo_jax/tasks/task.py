"""What ``train`` asks of a thing that it can train."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
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

    Without a folder it reads no data and no weights and knows shapes alone: ``make_model``, ``batch_shapes``, ``loss``. After
    ``read_model`` it also knows how to ``save``.

    Attributes:
      faults_file: where examples that cannot be used are recorded.
      measures: the names of what ``evaluate`` measures; empty where nothing is evaluated.
    """

    faults_file: Path
    measures: tuple[str, ...]

    def __init__(self, config: RunConfig, workdir: Path | None):
        """Reads the data and every held-out row or clip, when there is a folder.

        Raises:
          InputError: what the config names is not there, or a held-out row or clip cannot be used.
        """

    def read_model(self) -> None:
        """Reads what a model folder holds beside the arrays, for a task without a folder: its config, its text tokenizer."""

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

    def save(self, model: nnx.Module, folder: Path, origin: Mapping[str, Any]) -> None:
        """Writes the model folder.

        Args:
          model: the trained model.
          folder: where to; must not exist.
          origin: goes into its provenance, see ``run_config.origin``.
        """


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


def check_best(best: str | None, measures: Sequence[str]) -> None:
    """Refuses an ``output.checkpoint_best`` that no evaluation set gives.

    Raises:
      InputError: a name with a slash, as those of evaluation sets have, that is not among ``measures``.
    """
    name = (best or "").removeprefix("-")
    if "/" in name and not name.startswith("loss/") and name not in measures:
        raise InputError(
            f"output.checkpoint_best {best!r} found, expected a metric of the log or of the evaluation sets, which measure "
            f"{', '.join(measures) or 'nothing'}"
        )


def check_equal(folder: str, found: Any, expected: Any, but: tuple[str, ...] = ()) -> None:
    """Refuses a model folder whose dataclass differs from the config's in other fields than ``but``."""
    names = [field.name for field in dataclasses.fields(expected) if field.name not in but]
    differ = [name for name in names if getattr(found, name) != getattr(expected, name)]
    if differ:
        faults = ", ".join(f"{name} {getattr(found, name)!r} (config: {getattr(expected, name)!r})" for name in differ)
        raise InputError(f"{folder}: found {faults}; change config.model or give another init_from")
