"""The things that ``train`` can train, by the name that a config gives in ``task``."""

from __future__ import annotations

import importlib
from pathlib import Path

from ichigo_jax.tasks.task import Task
from ichigo_jax.training.run_config import RunConfig

_TASKS = {
    "speech_tokenizer": ("ichigo_jax.tasks.speech_tokenizer", "SpeechTokenizerTask"),
    "language_model": ("ichigo_jax.tasks.language_model", "LanguageModelTask"),
}


def make_task(config: RunConfig, workdir: Path | None) -> Task:
    """The task that ``config.task`` names."""
    module, name = _TASKS[config.task]
    return getattr(importlib.import_module(module), name)(config, workdir)


__all__ = ["Task", "make_task"]
