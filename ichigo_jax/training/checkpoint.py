"""Checkpoints of a run: taken only when whole, the newest kept until a newer one is whole (Orbax).

In a folder one is written aside and renamed when it is whole. A bucket has no such rename: there it is written in its place,
and the file ``COMMIT`` is added when it is whole.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from ichigo_jax.errors import InputError
from ichigo_jax.parallel import hosts
from ichigo_jax.storage.array_faults import reason, say_once
from ichigo_jax.storage.shapes import shape_faults
from ichigo_jax.training.state import TrainState

BUCKET = "gs://"  # how the address of a folder in a bucket begins
COMMIT = "commit_success.txt"  # the file that Orbax adds to a checkpoint in a bucket when it is whole
METRICS = "metrics"  # the folder in a checkpoint, and the file in that, where Orbax looks for what ranks it
UNREADABLE = ".unreadable"  # what is added to the name of a checkpoint that is damaged


def check_address(address: str | None) -> None:
    """Refuses an ``output.checkpoints_in`` that cannot be used, before anything else is done for the run.

    Raises:
      InputError: neither a folder nor gs://BUCKET/FOLDER, the package that reaches buckets is missing, or the bucket cannot be
        reached.
    """
    scheme, separator, rest = (address or "").partition("://")
    if not separator:
        return
    found = f"output.checkpoints_in {address!r} found"
    bucket, _, folder = rest.partition("/")
    if scheme + separator != BUCKET or not bucket or not folder.strip("/"):
        raise InputError(f"{found}, expected a folder or gs://BUCKET/FOLDER; mount a bucket of another kind as a folder")
    if set("*?[") & set(folder):
        raise InputError(f"{found}, expected a name without * ? [ in it: gcsfs takes them for patterns, also when it deletes")
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f"{found} without the package gcsfs; run: pip install gcsfs, or choose a folder")
    from fsspec.config import conf
    from google.cloud import storage

    conf.setdefault("gcs", {})["use_listings_cache"] = False  # it knows nothing of what tensorstore and others write
    try:
        storage.Client().get_bucket(bucket)
    except Exception as error:  # of the network, of credentials, of the bucket's rights: each library's own
        raise InputError(f"{found}, but the bucket cannot be reached: {reason(error)}") from error


class Resumed(NamedTuple):
    """What a run goes on from: the state after ``step`` steps, and what ``Checkpoints.save`` was given as ``data``."""

    step: int
    state: TrainState
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run; a context manager, which waits at its end until what was saved is whole.

    Args:
      folder: where they lie, or gs://BUCKET/FOLDER, which ``check_address`` has seen.
      kept: how many of the newest are kept.
      keep_every: a checkpoint whose step is a multiple of it is kept for good; 0: none is.
      best: a metric whose lowest value keeps its checkpoint, its highest after "-"; None: none does.
    """

    def __init__(self, folder: str | os.PathLike, kept: int, keep_every: int, best: str | None):
        say_once()
        policies = [managers.LatestN(kept)]
        if keep_every:
            policies.append(managers.EveryNSteps(keep_every))
        self._best = best and best.removeprefix("-")
        value = lambda metrics: metrics[self._best]  # noqa: E731
        if best:
            lowest = not best.startswith("-")
            policies.append(managers.BestN(get_metric_fn=value, reverse=lowest, n=1, keep_checkpoints_without_metrics=False))
        in_bucket = str(folder).startswith(BUCKET)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            best_fn=value if best else None,  # so that metrics are saved
            enable_async_checkpointing=True,
            cleanup_tmp_directories=not in_bucket,  # of a bucket's folder that would remove whatever is no checkpoint
        )
        self._faults = Exception if in_bucket else (OSError, ValueError)  # each library below has its own for a network
        with self._told_of_faults(f"{folder}: checkpoints cannot be listed"):
            where = folder if in_bucket else Path(folder).absolute()
            self._manager = ocp.CheckpointManager(where, options=options, item_handlers=_handlers())
            self._folder = self._manager.directory
            if in_bucket and hosts.is_first() and self._folder.exists():
                for path in self._folder.iterdir():
                    if path.name.isdigit() and not (path / COMMIT).exists():
                        path.rmtree()
        # Each process reads its parts without waiting for the others, since what one cannot read another may.
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**_handlers()), multiprocessing_options=alone)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, _, error: BaseException | None, *__) -> None:
        try:
            self.close()
        except InputError as fault:
            if error is None:
                raise
            if str(fault) != str(error):  # the first error ends the run, and the second is told of
                print(f"error: {fault}", file=sys.stderr)

    def save(self, state: TrainState, step: int, data: dict[str, Any], metrics: Mapping[str, Any]) -> None:
        """Saves in the background; does nothing where there is one of this step.

        Args:
          state: all of it.
          step: how many steps it has behind it.
          data: what the loader needs to go on, as JSON.
          metrics: what is known of this step already; see ``rank``.

        Raises:
          InputError: this one, or the one before it, could not be written (a full disk); those before are as they were.
        """
        if step not in self._manager.all_steps():
            arguments = ocp.args.Composite(state=ocp.args.StandardSave(vars(state)), data=ocp.args.JsonSave(data))
            with self._told_of_faults(self._not_written):
                self._manager.save(step, args=arguments, metrics=self._ranked(metrics))

    def rank(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds to a saved checkpoint what was measured after it was saved; takes effect when the next one is saved.

        Waits until it is whole. A checkpoint without the metric of ``best``, or where that is not finite, is never the best.

        Args:
          step: of the checkpoint.
          metrics: what was measured after this step; without the metric of ``best`` nothing happens.

        Raises:
          InputError: as ``save``.
        """
        ranked = self._ranked(metrics)
        if ranked is None:
            return
        with self._told_of_faults(self._not_written):
            self._manager.wait_until_finished()
            if hosts.is_first():
                folder = self._folder / str(step) / METRICS
                folder.mkdir(exist_ok=True)
                partial = folder / "partial"
                partial.write_text(json.dumps(ranked))
                partial.replace(folder / METRICS)
            hosts.wait_for_all(f"checkpoint {step} is ranked")
            self._manager.reload()

    def _ranked(self, metrics: Mapping[str, Any]) -> dict[str, float] | None:
        value = float(metrics.get(self._best, math.nan))
        return {self._best: value} if math.isfinite(value) else None

    def restore(self, target: TrainState) -> Resumed | None:
        """The newest checkpoint, in the shapes, dtypes and shardings of ``target``; None where there is none.

        One that is damaged, if only for one of several processes, is told of, renamed to ``STEP.unreadable`` and left, and
        the one before it is taken.

        Raises:
          InputError: what was saved is of other shapes, so the workdir belongs to another model; or there are checkpoints
            and none can be read; or a damaged one cannot be renamed.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            found = None
            try:
                check_fits(self._manager.item_metadata(step).state, vars(target), self._folder / str(step))
                arguments = ocp.args.Composite(state=ocp.args.StandardRestore(vars(target)), data=ocp.args.JsonRestore())
                found = self._reader.restore(self._folder / str(step), args=arguments)
            except InputError:
                raise
            except Exception as error:  # a damaged file shows in as many ways as there are libraries below
                print(f"{self._folder / str(step)} cannot be read ({reason(error)})", file=sys.stderr)
            if not hosts.max_over_hosts(found is None):
                return Resumed(step, TrainState(**found.state), found.data)
            self._set_aside(step)
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
        with self._told_of_faults(self._not_written):
            self._manager.wait_until_finished()
        steps = sorted(self._manager.all_steps())
        if not steps or steps[0] > step:
            return None
        with self._told_of_faults(f"{self._folder}: checkpoints after step {step} cannot be removed"):
            for later in (found for found in steps if found > step):
                self._manager.delete(later)
        return max(found for found in steps if found <= step)

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
          InputError: as ``save``.
        """
        with contextlib.closing(self._reader), self._told_of_faults(self._not_written):
            self._manager.close()

    def _set_aside(self, step: int) -> None:
        folder = self._folder / str(step)
        if hosts.is_first():
            print(f"{folder} is renamed and the one before it taken", file=sys.stderr)
            names = (folder.with_name(f"{folder.name}{UNREADABLE}{number or ''}") for number in itertools.count())
            with self._told_of_faults(f"{folder} cannot be read and cannot be renamed"):
                folder.rename(next(name for name in names if not name.exists()))
        hosts.wait_for_all(f"checkpoint {step} is set aside")
        self._manager.reload()

    @property
    def _not_written(self) -> str:
        return f"{self._folder}: a checkpoint could not be written; the same command goes on from the newest, which is whole"

    @contextlib.contextmanager
    def _told_of_faults(self, what: str) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except self._faults as error:
            raise InputError(f"{what}: {reason(error)}") from error


def check_fits(stored: Mapping[str, Any], target: Mapping[str, Any], where: Any) -> None:
    """Refuses a checkpoint whose arrays are not those of ``target``.

    Args:
      stored: what Orbax says of them.
      target: what they should be, by the same names.
      where: the checkpoint.

    Raises:
      InputError: arrays missing, unknown or of another shape; the message names the first few.
    """
    if faults := shape_faults(_shapes(stored), _shapes(target)):
        raise InputError(f"{where} does not fit this config: {'; '.join(faults[:4])}")


def _handlers() -> dict[str, Any]:
    return {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Dotted name to shape of every array."""
    return {
        ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
