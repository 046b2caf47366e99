"""A checkpoint of a training run to a model folder; ``ichigo_jax.tasks.checkpoint_model`` does it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ichigo_jax.tasks.checkpoint_model import open_checkpoints, save_checkpoint_model

FORMAT = "training run"


def import_checkpoint(workdir: Path, which: str, target: Path) -> list[str]:
    """Writes the model folder of the checkpoint that ``which`` names; gives notes for the user.

    Raises:
      InputError: see ``save_checkpoint_model``.
    """
    return [f"step: {save_checkpoint_model(workdir, which, target)}"]


def describe(workdir: Path) -> Mapping[str, str]:
    """What ``inspect`` says of a run's folder.

    Raises:
      InputError: no checkpoint in it.
    """
    config, checkpoints = open_checkpoints(workdir)
    checkpoints.close()
    steps = ", ".join(map(str, checkpoints.steps))
    return {"checkpoints": f"{checkpoints.folder}", "steps": steps, "best by": str(config.output.checkpoint_best)}
