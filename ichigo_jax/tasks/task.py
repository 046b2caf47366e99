"""The parts of a thing that can be trained: each is built whole, or not at all.

``Task`` is the model, the shapes of a batch and the loss; planning needs it alone. ``ModelFiles`` is what the model folder holds
beside the parameters; it also opens the data (``mixture.Mixture``) and the ``Evaluation``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from flax import nnx
from jax.sharding import Mesh

from ichigo_jax.errors import InputError
from ichigo_jax.tasks.mixture import Mixture
from ichigo_jax.training.losses import Scalars


class Task(Protocol):
    """What is trained. It reads no data, and no files but the weights in ``load_model``.

    Attributes:
      model_config: of the model that is trained.
    """

    model_config: Any

    def make_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """A model with random parameters."""

    def load_model(self, folder: str, mesh: Mesh) -> nnx.Module:
        """The model of a model folder, laid over the mesh; InputError where it is not the config's model."""

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of a batch of all hosts; of a mixture, among them the number of each row's source (``data.sources``)."""

    def tokens_per_step(self) -> int:
        """Tokens in a batch: ids of a language model, sound codes of a speech tokenizer, padding among them."""

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


class Evaluation(Protocol):
    """Held-out data, all of it read and checked when it is opened.

    Attributes:
      measures: the names of what it measures; empty where nothing is evaluated.
    """

    measures: tuple[str, ...]

    def __call__(self, model: nnx.Module) -> dict[str, float]:
        """Metrics of a model on the held-out data, by the names in ``measures``."""


class ModelFiles(Protocol):
    """What a run's model folder holds beside the parameters: config, text tokenizer, provenance.

    Built from the run's config. It reads the files before the run begins and writes them beside the trained parameters.

    Attributes:
      task: what is trained.

    Raises:
      InputError: a section of the config is wrong, or a file that it names is missing or of another model.
    """

    task: Task

    def open_evaluation(self) -> Evaluation:
        """Reads every held-out row or clip.

        Raises:
          InputError: one of them is missing or cannot be used.
        """

    def open_data(self, workdir: Path) -> Mixture:
        """Opens the training data; the workdir takes what is prepared of it and the record of examples that cannot be used.

        Raises:
          InputError: a source is missing or cannot be read.
        """

    def save(self, model: nnx.Module, folder: Path, origin: Mapping[str, Any]) -> None:
        """Writes the model folder.

        Args:
          model: the trained model.
          folder: where to; must not exist.
          origin: goes into its provenance, see ``run_config.origin``.
        """


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
