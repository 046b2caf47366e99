"""The checkpoints of a run as another command reads them: nothing is changed, and the run may still be going on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from ichigo_jax.errors import InputError
from ichigo_jax.storage.array_faults import reason
from ichigo_jax.training.checkpoint import BUCKET, COMMIT, check_address, check_fits

NEWEST, BEST = "newest", "best"
PARTS = ("params", "frozen", "buffers")  # of a state, those that a model is made of


class ModelArrays(NamedTuple):
    """What a checkpoint has of a model, by the names of ``PARTS``, and the data that was saved with it."""

    arrays: dict[str, Any]
    data: dict[str, Any]


class SavedCheckpoints:
    """The whole checkpoints of a run, read only.

    Args:
      folder: where they lie, or gs://BUCKET/FOLDER.
      best: the run's ``output.checkpoint_best``.

    Attributes:
      steps: of the checkpoints, ascending.

    Raises:
      InputError: they cannot be listed, or there are none.
    """

    def __init__(self, folder: str | os.PathLike, best: str | None):
        check_address(str(folder))
        in_bucket = str(folder).startswith(BUCKET)
        self._best = best
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        try:
            options = ocp.CheckpointManagerOptions(read_only=True)
            where = folder if in_bucket else Path(folder).absolute()
            self._manager = ocp.CheckpointManager(where, options=options, item_handlers=handlers)
            self.folder = self._manager.directory
            found = sorted(self._manager.all_steps()) if self.folder.exists() else []
            self.steps = [step for step in found if not in_bucket or (self.folder / str(step) / COMMIT).exists()]
        except Exception as error:  # each library below has its own
            raise InputError(f"{folder}: checkpoints cannot be listed: {reason(error)}") from error
        if not self.steps:
            raise InputError(f"{folder}: no checkpoint found, expected at least one; train further, or name another workdir")

    def choose(self, which: str) -> int:
        """A step from what a user types.

        Args:
          which: a step, "newest", or "best" by the run's ``output.checkpoint_best``.

        Raises:
          InputError: no such checkpoint; the message names those that are there.
        """
        there = f"{self.folder}: the checkpoints are of steps {', '.join(map(str, self.steps))}"
        if which == NEWEST:
            return self.steps[-1]
        if which == BEST:
            return self._best_step(there)
        if not which.isdecimal():
            raise InputError(f"--step {which} found, expected a step, {NEWEST} or {BEST}; {there}")
        if int(which) not in self.steps:
            raise InputError(f"--step {which} found; {there}, or {NEWEST} or {BEST}")
        return int(which)

    def _best_step(self, there: str) -> int:
        if self._best is None:
            raise InputError(f"--step {BEST} found, but the run's output.checkpoint_best names no metric; {there}")
        name, sign = self._best.removeprefix("-"), -1.0 if self._best.startswith("-") else 1.0
        measured = {step: (self._manager.metrics(step) or {}).get(name) for step in self.steps}
        ranked = [(sign * value, step) for step, value in measured.items() if value is not None]
        if not ranked:
            raise InputError(f"--step {BEST} found, but no checkpoint has the run's metric {name!r}; {there}")
        return min(ranked)[1]

    def restore(self, step: int, target: dict[str, Any], device: jax.Device) -> ModelArrays:
        """The arrays of a model as they were saved, without the optimizer's.

        Args:
          step: one of ``steps``.
          target: nested arrays or shapes of each of ``PARTS``.
          device: where the arrays are put.

        Raises:
          InputError: a checkpoint that is damaged, or of another model.
        """
        path = self.folder / str(step)
        place = jax.sharding.SingleDeviceSharding(device)
        try:
            stored = self._manager.item_metadata(step).state
            stored = {part: stored.get(part) or {} for part in PARTS}
            check_fits(stored, target, path)
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), stored)
            wanted = {part: tree for part, tree in shapes.items() if tree}
            state = ocp.args.PyTreeRestore(
                wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
            )
            found = self._manager.restore(step, args=ocp.args.Composite(state=state, data=ocp.args.JsonRestore()))
        except InputError:
            raise
        except Exception as error:  # a damaged file shows in as many ways as there are libraries below
            raise InputError(f"{path} cannot be read ({reason(error)}); choose another --step") from error
        return ModelArrays({part: found.state.get(part, {}) for part in PARTS}, found.data)

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._manager.close()
