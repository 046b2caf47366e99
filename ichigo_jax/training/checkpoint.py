"""Checkpoints of a run: written aside, renamed when whole, the newest kept until a newer one is whole (Orbax)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from ichigo_jax.errors import InputError
from ichigo_jax.training.state import TrainState


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      folder: ``WORKDIR/checkpoints``.
      kept: how many of the newest are kept.
    """

    def __init__(self, folder: Path, kept: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=kept, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, state: TrainState, step: int, data: dict[str, Any]) -> None:
        """Saves in the background. ``data`` is what the loader needs to go on, as JSON."""
        if step not in self._manager.all_steps():
            arguments = ocp.args.Composite(state=ocp.args.StandardSave(vars(state)), data=ocp.args.JsonSave(data))
            self._manager.save(step, args=arguments)

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step, or None."""
        return self._manager.latest_step()

    def data(self) -> dict[str, Any]:
        """What ``save`` was given as ``data`` for the newest checkpoint."""
        return self._manager.restore(self.latest_step(), args=ocp.args.Composite(data=ocp.args.JsonRestore())).data

    def restore(self, target: TrainState) -> TrainState:
        """The newest checkpoint in the shapes, dtypes and shardings of ``target``.

        Raises:
          InputError: what was saved is of other shapes; the workdir belongs to another model.
        """
        step = self.latest_step()
        try:
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(vars(target)))
            return TrainState(**self._manager.restore(step, args=arguments).state)
        except ValueError as error:
            raise InputError(
                f"{self._manager.directory}/{step} does not fit this config: {str(error).splitlines()[0]}"
            ) from error

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()
