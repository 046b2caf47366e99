"""A checkpoint of a run as a model folder: the best one, one in between, the last one of a run that was stopped."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from ichigo_jax import configuration
from ichigo_jax.errors import InputError
from ichigo_jax.storage import read_json
from ichigo_jax.tasks import open_files
from ichigo_jax.training import run_config
from ichigo_jax.training.run_config import RunConfig
from ichigo_jax.training.saved import SavedCheckpoints
from ichigo_jax.training.state import split

CONFIG = "config.json"


def is_workdir(folder: str | os.PathLike) -> bool:
    """Whether a folder is a training run's: its ``config.json`` is that of a run and not of a model."""
    path = Path(folder) / CONFIG
    values = read_json(path) if path.is_file() else None
    return isinstance(values, dict) and {"task", "train", "output"} <= values.keys()


def open_checkpoints(workdir: str | os.PathLike) -> tuple[RunConfig, SavedCheckpoints]:
    """The config of a run and its checkpoints, wherever the config says that they are.

    Raises:
      InputError: not a run's folder, or no checkpoint.
    """
    if not is_workdir(workdir):
        raise InputError(f"{workdir}: no {CONFIG} of a training run found; expected the --workdir of ichigo_jax.train")
    config = configuration.from_dict(RunConfig, read_json(Path(workdir) / CONFIG), str(Path(workdir) / CONFIG))
    where = config.output.checkpoints_in or Path(workdir) / "checkpoints"
    return config, SavedCheckpoints(where, config.output.checkpoint_best)


def save_checkpoint_model(workdir: str | os.PathLike, which: str, folder: str | os.PathLike) -> int:
    """Writes the model folder of a checkpoint, as training writes that of its last step; the checkpoint stays as it is.

    Its provenance holds the workdir, the step and the run's config. What the run read beside its data must still be there: text
    tokenizer, ``init_from`` and the provenance of the speech tokenizer, from the same current folder where paths are relative.

    Args:
      workdir: of a run, which may be going on, or have been stopped.
      which: a step, "newest", or "best" by the run's ``output.checkpoint_best``.
      folder: where to; must not exist.

    Returns:
      The step.

    Raises:
      InputError: not a workdir, no such checkpoint, one that is damaged or of another config, or ``folder`` exists.
    """
    if Path(folder).exists():
        raise InputError(f"{folder}: exists already; remove it or choose another name")
    config, checkpoints = open_checkpoints(workdir)
    with contextlib.closing(checkpoints):
        step = checkpoints.choose(which)
        files = open_files(config)
        abstract = nnx.eval_shape(lambda: files.task.make_model(nnx.Rngs(config.seed)))
        graphdef, *parts = split(abstract, config.optimizer.frozen)
        params, frozen, buffers = parts
        target: dict[str, Any] = {"params": params, "frozen": frozen, "buffers": buffers}
        found = checkpoints.restore(step, target, _host_device())
    what = f"{checkpoints.folder}/{step}: another config wrote this checkpoint than {workdir}/{CONFIG}"
    run_config.check_same(found.data["config"], config, what, "name the workdir of its run")
    model = nnx.merge(graphdef, *(found.arrays[part] for part in target))
    files.save(model, Path(folder), run_config.origin(config, Path(workdir), step))
    return step


@contextlib.contextmanager
def model_folder(folder: str, step: str | None) -> Iterator[str]:
    """The model folder that a command is to load: ``folder`` itself, or that of a run's checkpoint, which goes with the block.

    Args:
      folder: a model folder; with a ``step`` a run's workdir.
      step: see ``save_checkpoint_model``; None: none.

    Raises:
      InputError: a workdir without a step, or what ``save_checkpoint_model`` refuses.
    """
    if step is None:
        if is_workdir(folder):
            raise InputError(
                f"{folder}: the workdir of a training run found; add --step N, newest or best, or name {folder}/model"
            )
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="checkpoint-model-") as temporary:
        model = Path(temporary) / "model"
        save_checkpoint_model(folder, step, model)
        yield str(model)


def _host_device() -> jax.Device:
    """The host's first CPU, whose memory is larger than an accelerator's; where JAX was told to use none, an accelerator."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]
