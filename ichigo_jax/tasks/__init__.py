"""The things that ``train`` can train, by the name that a config gives in ``task``."""

from __future__ import annotations

import importlib
from types import ModuleType

from ichigo_jax.tasks.task import Evaluation, ModelFiles, Task
from ichigo_jax.training.run_config import RunConfig


def planned_task(config: RunConfig) -> Task:
    """What a config trains, from the config alone where it says all of the model's numbers.

    The folder that such a run starts from need not exist. Where ``config.model`` leaves the model to that folder, or the size of
    the vocabulary to a text tokenizer, these are read.

    Raises:
      InputError: a section of the config is wrong, or a file that must be read is missing.
    """
    return _module(config).planned_task(config)


def open_files(config: RunConfig) -> ModelFiles:
    """What the model folder of a run will hold beside the parameters, and through it the task, its data and its evaluation.

    Raises:
      InputError: see ``ModelFiles``.
    """
    return _module(config).open_files(config)


def _module(config: RunConfig) -> ModuleType:
    return importlib.import_module(f"ichigo_jax.tasks.{config.task}")


__all__ = ["Evaluation", "ModelFiles", "Task", "open_files", "planned_task"]
