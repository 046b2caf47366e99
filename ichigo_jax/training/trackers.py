"""Metrics for those who look at them elsewhere than in ``metrics.jsonl``: TensorBoard and Weights & Biases, by choice."""

from __future__ import annotations

import dataclasses
import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from ichigo_jax.errors import InputError
from ichigo_jax.parallel import hosts
from ichigo_jax.storage import read_json, write_json
from ichigo_jax.training.run_config import OutputConfig, RunConfig


class Tracker(Protocol):
    """Somewhere that metrics go."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the metrics of a step."""

    def close(self) -> None:
        """Nothing more comes."""


class TensorBoard:
    """Event files in ``WORKDIR/tensorboard``; steps that an interrupted run takes again are purged from them.

    Args:
      folder: where they lie.
      step: the step that the run resumes from.
    """

    def __init__(self, folder: Path, step: int):
        from tensorboardX import SummaryWriter

        # A file's name is that of a second; a start within the second of another would overwrite the other's.
        options = {"filename_suffix": f".{uuid.uuid4().hex[:8]}", "purge_step": step + 1 if step else None}
        self._writer = SummaryWriter(logdir=str(folder), **options)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, one for the workdir however often it is resumed; its id is in ``WORKDIR/wandb.json``.

    Steps that an interrupted run takes again are the same, and W&B keeps those that it has. Whether it sends, writes files
    (``WANDB_MODE=offline``) or does nothing is up to its own environment variables.

    Args:
      project: its name there.
      workdir: whose name the run has; holds the id and W&B's own files.
      config: of the run, shown beside the metrics.

    Raises:
      InputError: W&B does not begin.
    """

    def __init__(self, project: str, workdir: Path, config: RunConfig):
        import wandb

        path = workdir / "wandb.json"
        if not path.exists():
            write_json(path, {"id": uuid.uuid4().hex[:12]})
        options = {"id": read_json(path)["id"], "resume": "allow", "name": workdir.name, "dir": str(workdir)}
        try:
            self._run = wandb.init(project=project, config=dataclasses.asdict(config), **options)
        except Exception as error:  # its own exceptions are many, and a network's are more
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(
                f"output.wandb {project!r} found, but W&B does not begin ({reason:.200}); run: wandb login, or set "
                "WANDB_MODE=offline, or output.wandb to null"
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def check_trackers(output: OutputConfig) -> None:
    """Refuses a config whose trackers are not installed, before anything else is done for it.

    Raises:
      InputError: names the package.
    """
    wanted = {"tensorboardX": ("output.tensorboard", output.tensorboard), "wandb": ("output.wandb", output.wandb)}
    for package, (field, value) in wanted.items():
        if value and importlib.util.find_spec(package) is None:
            raise InputError(f"{field} {value!r} found without the package {package}; run: pip install {package}, or unset it")


def make_trackers(config: RunConfig, workdir: Path, step: int) -> list[Tracker]:
    """Those that the config asks for, on the first process; the others have none."""
    trackers: list[Tracker] = []
    if hosts.is_first():
        if config.output.tensorboard:
            trackers.append(TensorBoard(workdir / "tensorboard", step))
        if config.output.wandb:
            trackers.append(WeightsAndBiases(config.output.wandb, workdir, config))
    return trackers
