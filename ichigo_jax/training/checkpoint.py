"""Checkpoints of a run: written aside, renamed when whole, the newest kept until a newer one is whole (Orbax)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from ichigo_jax.errors import InputError
from ichigo_jax.parallel import hosts
from ichigo_jax.training.state import TrainState

UNREADABLE = ".unreadable"  # what is added to the name of a checkpoint that is damaged


class Resumed(NamedTuple):
    """What a run goes on from: the state after ``step`` steps, and what ``Checkpoints.save`` was given as ``data``."""

    step: int
    state: TrainState
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      folder: ``WORKDIR/checkpoints``.
      kept: how many of the newest are kept.
      keep_every: a checkpoint whose step is a multiple of it is kept for good; 0: none is.
      best: a metric whose lowest value keeps its checkpoint, its highest after "-"; None: none does.
    """

    def __init__(self, folder: Path, kept: int, keep_every: int, best: str | None):
        policies = [managers.LatestN(kept)]
        if keep_every:
            policies.append(managers.EveryNSteps(keep_every))
        self._best = best and best.removeprefix("-")
        value = lambda metrics: metrics[self._best]  # noqa: E731
        if best:
            lowest = not best.startswith("-")
            policies.append(managers.BestN(get_metric_fn=value, reverse=lowest, n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            best_fn=value if best else None,  # so that metrics are saved
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self._folder = folder.absolute()
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def save(self, state: TrainState, step: int, data: dict[str, Any], metrics: Mapping[str, Any]) -> None:
        """Saves in the background.

        Args:
          state: all of it.
          step: how many steps it has behind it.
          data: what the loader needs to go on, as JSON.
          metrics: what was measured after this step; one without the metric of ``best`` is never the best.

        Raises:
          InputError: this one, or the one before it, could not be written (a full disk); those before are as they were.
        """
        if step not in self._manager.all_steps():
            arguments = ocp.args.Composite(state=ocp.args.StandardSave(vars(state)), data=ocp.args.JsonSave(data))
            with self._told_of_faults():
                ranked = {self._best: float(metrics[self._best])} if self._best in metrics else None
                self._manager.save(step, args=arguments, metrics=ranked)

    def restore(self, target: TrainState) -> Resumed | None:
        """The newest checkpoint that can be read, in the shapes, dtypes and shardings of ``target``; None where there is none.

        A damaged one is told of, renamed to ``STEP.unreadable`` and left, and the one before it is taken.

        Raises:
          InputError: what was saved is of other shapes, so the workdir belongs to another model; or there are checkpoints
            and none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                self._check_fits(self._manager.item_metadata(step).state, target, step)
                arguments = ocp.args.Composite(state=ocp.args.StandardRestore(vars(target)), data=ocp.args.JsonRestore())
                found = self._manager.restore(step, args=arguments)
                return Resumed(step, TrainState(**found.state), found.data)
            except InputError:
                raise
            except Exception as error:  # a damaged file shows in as many ways as there are libraries below
                self._set_aside(step, error)
        if steps:
            raise InputError(
                f"{self._folder}: none of the checkpoints of steps {steps[::-1]} can be read; restore one or remove all"
            )
        return None

    def go_back_to(self, step: int) -> int | None:
        """Removes the checkpoints after ``step``; the step of the newest that is left. Where none would be left, all stay: None.

        Raises:
          InputError: as ``save``.
        """
        with self._told_of_faults():
            self._manager.wait_until_finished()
        steps = sorted(self._manager.all_steps())
        if not steps or steps[0] > step:
            return None
        for later in (found for found in steps if found > step):
            self._manager.delete(later)
        return max(found for found in steps if found <= step)

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
          InputError: as ``save``.
        """
        with self._told_of_faults():
            self._manager.wait_until_finished()
        self._manager.close()

    def _check_fits(self, stored: Any, target: TrainState, step: int) -> None:
        found, expected = _shapes(stored), _shapes(vars(target))
        faults = [f"{name} is not in it" for name in sorted(expected.keys() - found.keys())]
        faults += [f"{name} is unknown" for name in sorted(found.keys() - expected.keys())]
        for name in sorted(found.keys() & expected.keys()):
            if found[name] != expected[name]:
                faults.append(f"{name} has shape {found[name]}, expected {expected[name]}")
        if faults:
            raise InputError(f"{self._folder}/{step} does not fit this config: {'; '.join(faults[:4])}")

    def _set_aside(self, step: int, error: Exception) -> None:
        folder = self._folder / str(step)
        if hosts.is_first():
            reason = (str(error) or type(error).__name__).splitlines()[0]
            print(f"{folder} cannot be read ({reason:.200}); it is renamed and the one before it taken", file=sys.stderr)
            folder.rename(folder.with_name(folder.name + UNREADABLE))
        self._manager.reload()

    @contextlib.contextmanager
    def _told_of_faults(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self._folder}: a checkpoint could not be written: {reason:.300}; those before it are whole, and the same "
                "command goes on from the newest when there is room"
            ) from error


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Dotted name to shape of every array."""
    return {
        ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
