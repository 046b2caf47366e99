"""The weights of a language model's Hugging Face folder as people have them, under the names that the table knows.

Merge tools store a tied head a second time, old programs store buffers, and a model without its head drops the prefix of its
names. ``transformers`` loads all of these, so they are read here as it reads them, and what was done is told.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from converters import llama, safetensors_files
from converters.safetensors_files import Tensor
from ichigo_jax.errors import InputError
from ichigo_jax.models.llama import LanguageModelConfig

MODEL = "model."  # before the names of all tensors but the head's

# Rotary tables that older programs stored with the weights. They follow from the config.
_BUFFER = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


def read(
    folder: Path, config: LanguageModelConfig, dtype: np.dtype | None
) -> tuple[LanguageModelConfig, dict[str, Tensor], list[str]]:
    """The tensors of a folder by the names of ``llama.table``; nothing of them is read but a head that is stored as well.

    Args:
      folder: a Hugging Face folder.
      config: what its ``config.json`` says.
      dtype: what the weights will be cast to, or None.

    Returns:
      The config, which is untied if the folder has a head of its own; the tensors; and what the user should know.

    Raises:
      InputError: weights that are missing or broken.
    """
    known = {*llama.keys(config), llama.HEAD}
    is_tied = config.llama.tie_word_embeddings

    def may_differ(key: str) -> bool:
        return is_buffer(key) or (is_tied and _known_name(key, known) == llama.HEAD)

    tensors, notes = without_buffers(safetensors_files.read_folder(folder, may_differ))
    tensors = _renamed(tensors, known, folder)
    if is_tied:
        tensors, has_head, said = _tied(tensors, dtype)
        notes += said
        if has_head:
            config = dataclasses.replace(config, llama=dataclasses.replace(config.llama, tie_word_embeddings=False))
    return config, tensors, notes


def is_buffer(key: str) -> bool:
    """Whether a tensor is a table that follows from the config, which no model here needs."""
    return _BUFFER.search(key) is not None


def without_buffers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors that are weights, and a line about the others if there are any."""
    buffers = sorted(filter(is_buffer, tensors))
    kept = {key: tensor for key, tensor in tensors.items() if key not in buffers}
    more = f" and {len(buffers) - 1} more" if len(buffers) > 1 else ""
    return kept, [f"left out: {buffers[0]}{more}, which follow from the config"] if buffers else []


def _renamed(tensors: Mapping[str, Tensor], known: Collection[str], folder: Path) -> dict[str, Tensor]:
    """Tensors under the names of the whole model, as which a model without its head may be loaded."""
    names: dict[str, str] = {}
    for key in tensors:
        name = _known_name(key, known)
        if name in names:
            raise InputError(f"{folder}: {names[name]} and {key} found, which are the same weight; remove one of them")
        names[name] = key
    return {name: tensors[key] for name, key in names.items()}


def _known_name(key: str, known: Collection[str]) -> str:
    """``key`` with or without the model's prefix, whichever is known."""
    candidates = (key, MODEL + key, key.removeprefix(MODEL))
    return next((name for name in candidates if name in known), key)


def _tied(tensors: dict[str, Tensor], dtype: np.dtype | None) -> tuple[dict[str, Tensor], bool, list[str]]:
    """Of a model whose config ties its head to its embedding: the tensors, whether it has a head of its own, what to say."""
    embedding, head = tensors.get(llama.EMBEDDING), tensors.get(llama.HEAD)
    if head is None:
        return tensors, False, []
    without = {key: tensor for key, tensor in tensors.items() if key != llama.HEAD}
    if embedding is None:
        return without | {llama.EMBEDDING: head}, False, [f"{llama.HEAD} alone is stored; it is the embedding as well"]
    if safetensors_files.same_values(embedding, head, dtype):
        return without, False, [f"left out: {llama.HEAD}, which is stored as well and equals the embedding that it is tied to"]
    said = (
        f"the head and the embedding differ, though config.json ties them (tie_word_embeddings): read as a model with a head of "
        f"its own, as transformers does; if {llama.HEAD} is out of date, remove it from the weights"
    )
    return tensors, True, [said]
