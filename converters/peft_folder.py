"""What a PEFT folder holds beside its adapter: the name of its base model, a text tokenizer, whole embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from converters import engine, language_model, llama
from converters.recognise import recognise
from converters.safetensors_files import Tensor
from converters.sources import copy_files, is_file, read_object
from ichigo_jax.errors import InputError
from ichigo_jax.models.llama import LanguageModelConfig
from ichigo_jax.models.lora import LoraConfig
from ichigo_jax.storage import write_json
from ichigo_jax.storage.model_folder import TOKENIZER_FOLDER
from ichigo_jax.text.tokenizer import TextTokenizer

CONFIG = "adapter_config.json"
BASE_NAME = "base_model_name_or_path"
PREFIX = "base_model.model."
TEMPLATE = "chat_template"
TEMPLATES = ("chat_template.jinja", "chat_template.json")

# ---------------------------------------------------------------------------------------------------------------------
# The base model
# ---------------------------------------------------------------------------------------------------------------------


def find_base(source: Path, given: Path | None) -> tuple[Path, list[str]]:
    """The model folder of an adapter's base, and what the user should know of it.

    Args:
      source: the adapter's folder.
      given: of ``--base``. None: the folder that ``adapter_config.json`` names, where that is a model folder.

    Raises:
      InputError: no base, which says what the adapter's is called and what to do.
    """
    name = read_object(source / CONFIG).get(BASE_NAME)
    if given is not None:
        return given, _other_base(name, given)
    named = f"{CONFIG} names {name!r}" if name else f"{CONFIG} does not name it"
    advice = "import that and give the model folder by --base"
    if isinstance(name, str) and name and Path(name).is_dir():
        found = recognise(Path(name))
        if found.format == "model folder":
            return found.path, [f"base: {name}, which {CONFIG} names"]
        advice = f"python -m converters import {name} BASE, then give --base BASE"
    raise InputError(f"{source}: an adapter without its base model found ({named}); {advice}")


def _other_base(name: Any, given: Path) -> list[str]:
    """A line where the adapter was made for a model that is called otherwise than the source of the given one."""
    file = given / "provenance.json"
    source = read_object(file).get("source") if is_file(file) else None
    if not name or not source or Path(str(name)).name.lower() in (str(source).lower(), given.resolve().name.lower()):
        return []
    return [f"the adapter was made for {name}, and {given} was imported from {source}; make sure that they are the same model"]


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings
# ---------------------------------------------------------------------------------------------------------------------


class Saved(NamedTuple):
    """An adapter with the whole embeddings of its folder taken in; the base's config with as many rows; what to say."""

    base: LanguageModelConfig
    adapter: LoraConfig
    tensors: dict[str, Tensor]
    notes: list[str]


def take_embeddings(base: LanguageModelConfig, adapter: LoraConfig, tensors: Mapping[str, Tensor], source: Path) -> Saved:
    """Reads the embedding and the head that PEFT saves of its own accord as what ``modules_to_save`` would have named.

    It does so for a vocabulary that was resized (``save_embedding_layers``); then both have other rows than the base.

    Raises:
      InputError: rows that do not fit the base's, with which nothing can be done.
    """
    is_tied = base.llama.tie_word_embeddings
    paths = {"embedding": PREFIX + llama.EMBEDDING, "lm_head": PREFIX + llama.HEAD}
    found = {name: tensors[key] for name, key in paths.items() if key in tensors}
    if not found:
        return Saved(base, adapter, dict(tensors), [])
    added = [name for name in (["embedding"] if is_tied else found) if name not in adapter.train_also]
    adapter = dataclasses.replace(adapter, train_also=(*adapter.train_also, *added))
    tensors = dict(tensors)
    if is_tied:  # one is both
        for key in paths.values():
            tensors.setdefault(key, next(iter(found.values())))
    notes = [f"{' and '.join(found)} saved beside the adapter: taken as trained in full"] if added else []

    rows, vocab_size = {tensor.shape[0] for tensor in found.values()}, base.llama.vocab_size
    if rows != {vocab_size}:
        if len(rows) > 1 or not (is_tied or len(found) == len(paths)):
            shapes = ", ".join(f"{paths[name]} {list(tensor.shape)}" for name, tensor in found.items())
            raise InputError(
                f"{source}: {shapes} found, the base has {vocab_size} rows; resize the base with transformers "
                "(resize_token_embeddings), import that and give it by --base, or merge the adapter with PEFT "
                "(merge_and_unload) and import the result"
            )
        (count,) = rows
        network = dataclasses.replace(base.llama, vocab_size=count)
        base = dataclasses.replace(base, llama=network, padded_vocab_size=count)
        notes.append(f"vocabulary: {vocab_size} -> {count} rows, as many as the adapter was trained with")
    return Saved(base, adapter, tensors, notes)


def casts_to_one(pieces: list[engine.Piece], tensors: Mapping[str, Tensor]) -> bool:
    """Whether layers of an adapter have different dtypes, or such as a model folder does not keep."""
    dtypes: dict[engine.Path, set[np.dtype]] = {}
    for piece in pieces:
        dtypes.setdefault(piece.target, set()).add(tensors[piece.source].dtype)
    return any(len(found) > 1 or not found <= {*engine.WEIGHT_DTYPES} for found in dtypes.values())


# ---------------------------------------------------------------------------------------------------------------------
# The text tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def take_tokenizer(
    source: Path, base: Path, config: LanguageModelConfig, workspace: Path
) -> tuple[LanguageModelConfig, Path | None, list[str]]:
    """The text tokenizer of a merged model: the adapter's own, with which it was trained, else the base's.

    Args:
      source: the adapter's folder; its tokenizer, or its chat template alone, goes before the base's.
      base: the base's model folder.
      config: the base's.
      workspace: an empty folder to write to.

    Returns:
      The config, which ends answers where a chat template of the adapter's ends turns; the folder, or None without a
      tokenizer; what the user should know.

    Raises:
      InputError: a tokenizer with other sound tokens than the model's, or more ids than it has rows.
    """
    texts = base / TOKENIZER_FOLDER
    old = TextTokenizer.from_folder(texts) if is_file(texts / "tokenizer.json") else None
    settings = read_object(source / "tokenizer_config.json") if is_file(source / "tokenizer_config.json") else {}
    has_own = is_file(source / "tokenizer.json")
    has_template = bool(settings.get(TEMPLATE)) or any(is_file(source / name) for name in TEMPLATES)
    if not has_own and (old is None or not has_template):
        return config, texts if old else None, []

    new, what = workspace / TOKENIZER_FOLDER, "text tokenizer"
    new.mkdir()
    if old is not None:
        copy_files(language_model.COMPANIONS if not has_own else ["generation_config.json"], texts, new)
    if has_own:
        copy_files(language_model.COMPANIONS, source, new)
    else:
        what = "chat template"
        _take_template(source, settings, new)
    tokenizer = TextTokenizer.from_folder(new)
    if old is not None and tokenizer.fingerprint == old.fingerprint:
        return config, texts, []
    if tokenizer.size > config.llama.vocab_size or tokenizer.sound != config.sound:
        raise InputError(
            f"{source}: a text tokenizer of {tokenizer.size} ids with sound tokens {tokenizer.sound} found, the base has "
            f"{config.llama.vocab_size} rows and sound tokens {config.sound}; give the base that the adapter was trained on, "
            "or remove the tokenizer's files from the adapter's folder to take the base's"
        )
    notes = [f"{what}: the adapter's own"]
    turn_end = tokenizer.turn_end_id
    if turn_end is not None and turn_end not in config.eos_token_ids:
        config = dataclasses.replace(config, eos_token_ids=(*config.eos_token_ids, turn_end))
        notes.append(f"answers end at {turn_end} {tokenizer.spelling(turn_end)} as well, where its chat template ends a turn")
    return config, new, notes


def _take_template(source: Path, settings: Mapping[str, Any], folder: Path) -> None:
    """Puts the chat template of ``source``, and no other, into the tokenizer of ``folder``."""
    for name in TEMPLATES:
        (folder / name).unlink(missing_ok=True)
    if is_file(folder / "tokenizer_config.json"):
        kept = read_object(folder / "tokenizer_config.json")
        kept.pop(TEMPLATE, None)
        write_json(folder / "tokenizer_config.json", kept)
    copy_files(TEMPLATES, source, folder)
    if not any((folder / name).exists() for name in TEMPLATES):
        own = read_object(folder / "tokenizer_config.json") if is_file(folder / "tokenizer_config.json") else {}
        write_json(folder / "tokenizer_config.json", own | {TEMPLATE: settings[TEMPLATE]})
