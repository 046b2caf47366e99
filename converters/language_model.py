"""Language models: Hugging Face folders to model folders and back."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from converters import engine, eos, hf_weights, llama, logits, safetensors_files, stored_weights
from converters.extended_weight import ExtendedWeight
from converters.sources import copy_files, is_file, read_object, sha256
from ichigo_jax.errors import InputError
from ichigo_jax.models.llama import LanguageModelConfig, Llama
from ichigo_jax.storage import atomic_write, stored_arrays, write_json
from ichigo_jax.storage.model_folder import TOKENIZER_FOLDER, load_config, new_model
from ichigo_jax.text.tokenizer import TextTokenizer

KIND = "language_model"
PARTS = ".parts"  # after a target's name: the folder of what hosts have written of it
COMPARE_BYTES = safetensors_files.SHARD_BYTES  # so that the comparison holds no more than writing a large model may

# The text tokenizer's files and what belongs to them. They travel together, so that whatever trains or copies a model
# folder's tokenizer keeps the chat template and the defaults of generation.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)

# ---------------------------------------------------------------------------------------------------------------------
# Import
# ---------------------------------------------------------------------------------------------------------------------


class Opened(NamedTuple):
    """A language model on disk: its config, its weights under their Hugging Face names, and what the user should know."""

    config: LanguageModelConfig
    weights: Mapping[str, engine.Weight]
    notes: list[str]


def read_hf_config(source: Path) -> LanguageModelConfig:
    """The config of a Hugging Face folder: the network from ``config.json``, sound tokens from the tokenizer.

    Raises:
      InputError: what the model here cannot express, or a tokenizer with ids that the embedding has no rows for, unless they
        are of special tokens that no chat has (``[PAD]``), which ``open_hf`` gives rows to.
    """
    return _read_hf_config(source, _read_tokenizer(source))


def _read_tokenizer(source: Path) -> TextTokenizer | None:
    return TextTokenizer.from_folder(source) if is_file(source / "tokenizer.json") else None


def _read_hf_config(source: Path, tokenizer: TextTokenizer | None) -> LanguageModelConfig:
    file = source / "config.json"
    values = read_object(file)
    network = llama.config_from_hf(values, str(file))
    if tokenizer is not None and tokenizer.size > network.vocab_size and not unused_tokens(tokenizer, network.vocab_size):
        raise InputError(
            f"{source}: the tokenizer has ids up to {tokenizer.size - 1}, expected ids below vocab_size "
            f"{network.vocab_size} of config.json; the tokenizer is another model's"
        )
    sound, ends = None if tokenizer is None else tokenizer.sound, eos.of_folder(source)
    try:
        return LanguageModelConfig(network, sound, ends, padded_vocab_size=network.vocab_size)
    except InputError as error:
        raise InputError(f"{source}: {error}; correct config.json or generation_config.json") from None


def unused_tokens(tokenizer: TextTokenizer, vocab_size: int) -> list[str]:
    """The tokens from id ``vocab_size`` on where no text and no chat has any of them; an empty list where one may occur."""
    beyond = {name: index for name, index in tokenizer.added.items() if index >= vocab_size}
    used = {*tokenizer.chat_ids, *tokenizer.eos_ids, *tokenizer.bos_ids}
    if tokenizer.sound is not None:
        used |= {*range(tokenizer.sound.first_id, tokenizer.sound.first_id + tokenizer.sound.size)}
    is_unused = tokenizer.has_only_added_from(vocab_size) and not used & {*beyond.values()}
    return list(beyond) if is_unused else []


def open_hf(source: Path, dtype: np.dtype | None = None, keeps_dtypes: bool = True) -> Opened:
    """A Hugging Face folder, checked but not read.

    Args:
      source: the folder.
      dtype: what its weights will be cast to, or None.
      keeps_dtypes: whether they will be stored here as they are, where layers are stacked and must share a dtype.

    Raises:
      InputError: whatever is wrong with the source, in one line.
    """
    tokenizer = _read_tokenizer(source)
    config, tensors, notes = hf_weights.read(source, _read_hf_config(source, tokenizer), dtype)
    advice = {llama.HEAD: "if it is the embedding, set tie_word_embeddings to true in config.json"}
    engine.check(pieces_of(config), tensors, str(source), keeps_dtypes=keeps_dtypes, advice=advice)
    weights: Mapping[str, engine.Weight] = tensors
    if tokenizer is not None and tokenizer.size > config.llama.vocab_size:
        names = unused_tokens(tokenizer, config.llama.vocab_size)
        notes.append(f"rows for {', '.join(names)} added, which the embedding lacks: the mean of the others")
        config, weights = _with_rows(config, weights, tokenizer.size)
    unread = llama.unread_rope(read_object(source / "config.json"))
    notes += [*([unread] if unread else []), *_tokenizer_notes(source, tokenizer), *eos.notes(source, config, tokenizer)]
    return Opened(config, weights, notes)


def _with_rows(
    config: LanguageModelConfig, weights: Mapping[str, engine.Weight], size: int
) -> tuple[LanguageModelConfig, dict[str, engine.Weight]]:
    """With ``size`` rows in the vocabulary; the new ones are the mean of the others."""
    extended = dict(weights)
    for key in {llama.EMBEDDING, llama.HEAD} & weights.keys():
        old = weights[key]
        extended[key] = ExtendedWeight(
            old.dtype, (size, *old.shape[1:]), old, old.shape[0], size - old.shape[0], noise=0.0, seed=(0,)
        )
    network = dataclasses.replace(config.llama, vocab_size=size)
    return dataclasses.replace(config, llama=network, padded_vocab_size=size), extended


def _tokenizer_notes(source: Path, tokenizer: TextTokenizer | None) -> list[str]:
    if tokenizer is not None:
        return []
    others = [name for name in ("tokenizer.model", "vocab.json") if is_file(source / name)]
    advice = "chats need one: put its files into the folder tokenizer of the model folder"
    if others:
        advice = f"{others[0]} found: AutoTokenizer.from_pretrained and save_pretrained of transformers make one of it"
    return [f"no text tokenizer (tokenizer.json) in it, so the model takes token ids only; {advice}"]


def import_hf(source: Path, target: Path, dtype: str | None, vocab_multiple: int = 1) -> list[str]:
    """Writes a model folder from a Hugging Face folder, whole or not at all, one tensor at a time.

    Args:
      source: ``config.json``, safetensors, and a tokenizer where there is one.
      target: must not exist.
      dtype: "float32", "bfloat16", or None to keep each weight's own.
      vocab_multiple: rows of zeros are added to the embedding up to a multiple of this, so that a mesh divides them.

    Returns:
      What the user should know.

    Raises:
      InputError: whatever is wrong with the source, in one line.
    """
    with atomic_write(target) as partial, tempfile.TemporaryDirectory() as companions:
        cast = engine.IMPORT_DTYPES[dtype] if dtype else None
        config, weights, notes = open_hf(source, cast, keeps_dtypes=cast is None)
        config = pad_vocabulary(config, vocab_multiple)
        provenance = {**hf_origin(source), **heard_in_training(source)}
        copy_files(COMPANIONS, source, Path(companions))
        has_tokenizer = is_file(source / "tokenizer.json")
        write_folder(partial, config, weights, cast, provenance, companions if has_tokenizer else None, source)
    return notes


def write_folder(
    target: Path,
    config: LanguageModelConfig,
    weights: Mapping[str, engine.Weight],
    dtype: np.dtype | None,
    provenance: Mapping[str, Any],
    tokenizer_folder: str | os.PathLike | None,
    source: Path,
) -> None:
    """Writes a model folder from weights under their Hugging Face names; ``dtype`` None keeps each weight's own.

    Raises:
      InputError: a weight of ``source`` that holds NaN or infinity.
    """
    targets, pieces = target_shapes(config), pieces_of(config)
    arrays = stored_weights.new_arrays(pieces, targets, weights, dtype)
    with new_model(target, KIND, config, arrays, provenance, tokenizer_folder) as stores:
        stored_weights.fill(stores, pieces, weights, source)


def hf_origin(source: Path) -> dict[str, Any]:
    """What a provenance says of a Hugging Face folder: its name and the hashes of its config and weights."""
    files = sorted({tensor.file for tensor in safetensors_files.read_folder(source, lambda key: True).values()})
    hashes = {file.name: sha256(file) for file in [source / "config.json", *files]}
    return {"source": source.resolve().name, "source_format": "hf", "source_sha256": hashes}


def pad_vocabulary(config: LanguageModelConfig, multiple: int) -> LanguageModelConfig:
    """``LanguageModelConfig.padded_to`` a command's ``--vocab-multiple``.

    Raises:
      InputError: one below 1.
    """
    if multiple < 1:
        raise InputError(f"--vocab-multiple {multiple} found, expected at least 1")
    return config.padded_to(multiple)


def pieces_of(config: LanguageModelConfig) -> list[engine.Piece]:
    """Every Hugging Face tensor of the model and its place here."""
    return engine.expand(llama.table(config), target_shapes(config))


def target_shapes(config: LanguageModelConfig) -> dict[engine.Path, tuple[int, ...]]:
    """Path to shape of every array of our model."""
    return engine.target_shapes(lambda rngs: Llama(config, rngs))


# ---------------------------------------------------------------------------------------------------------------------
# Export
# ---------------------------------------------------------------------------------------------------------------------


def open_folder(source: Path) -> tuple[LanguageModelConfig, Mapping[str, engine.Weight]]:
    """The config of a model folder and its weights under their Hugging Face names, checked but not read.

    Raises:
      InputError: not a whole folder of a language model.
    """
    config = load_config(source, KIND, LanguageModelConfig)
    stores = stored_arrays.open_arrays(source)
    engine.check_stored(stores, target_shapes(config), source)
    return config, stored_weights.open_weights(pieces_of(config), stores, source)


def export_part(
    source: Path,
    target: Path,
    part: int,
    parts: int,
    shard_bytes: int = safetensors_files.SHARD_BYTES,
    dtype: str | None = None,
) -> list[str]:
    """Writes every ``parts``-th weight file of an export beside it, on one of as many hosts that share a disk.

    ``export_hf`` then takes the files that are there and writes what is missing. Files are whole or not there at all, and
    those that are there already stay, so a host that was interrupted can begin again.

    Args:
      source, target, shard_bytes, dtype: as for ``export_hf``.
      part: which part, from 0.
      parts: how many there are.

    Returns:
      The names of the files of this part.

    Raises:
      InputError: a source that is broken, a target that exists, or parts there of another source.
    """
    if target.exists():
        raise InputError(f"{target}: exists already; remove it or choose another name")
    weights = engine.cast(open_folder(source)[1], dtype)
    folder = _claimed_parts(target, source)
    mine = dict(itertools.islice(safetensors_files.shards_of(weights, shard_bytes).items(), part, None, parts))
    with _reading(weights, source, sum(map(len, mine.values()))) as read:
        for file, shard in mine.items():
            if not (folder / file).exists():
                with atomic_write(folder / file) as partial:
                    safetensors_files.write_file(partial, shard, read)
    return [*mine]


def _parts_folder(target: Path) -> Path:
    return target.with_name(target.name + PARTS)


def _claimed_parts(target: Path, source: Path) -> Path:
    """The folder of a target's parts, made or checked to be of this source as it is now."""
    folder = _parts_folder(target)
    folder.mkdir(parents=True, exist_ok=True)
    claim, files = folder / "source.json", sorted(file for file in source.rglob("*") if file.is_file())
    stats = [(str(file.relative_to(source)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    now = {"source": source.resolve().name, "state": hashlib.sha256(repr(stats).encode()).hexdigest()}
    if not claim.exists():
        write_json(claim, now)  # by several hosts at once, it is the same
    elif read_object(claim) != now:
        raise InputError(f"{folder}: parts of another model, or of this one before it changed, found; remove the folder")
    return folder


def export_hf(
    source: Path,
    target: Path,
    shard_bytes: int = safetensors_files.SHARD_BYTES,
    compare_bytes: int = COMPARE_BYTES,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Writes a whole Hugging Face folder from a model folder, one tensor at a time, and only if both give the same logits.

    Weight files that hosts have written with ``export_part`` are moved into it.

    Args:
      source: a model folder of a language model.
      target: must not exist.
      shard_bytes: largest weight file, in bytes of data.
      compare_bytes: the logits of a model that takes more than this in float32 are not compared.
      dtype: what the weights are rounded to; None: each stays as it is.

    Returns:
      What was written to ``provenance.json``; ``export_max_abs_logit_diff`` in it is None where nothing was compared, and
      ``export_not_compared`` says why. ``export_rounding_logit_diff`` is what rounding to ``dtype`` changes.

    Raises:
      InputError: a source that is broken, or an export whose logits differ by more than 1e-3 in float32.
    """
    with atomic_write(target) as partial:
        partial.mkdir()
        config, weights = open_folder(source)
        weights = engine.cast(weights, dtype)
        parts = _claimed_parts(target, source) if _parts_folder(target).exists() else None
        write_weights(partial, weights, source, shard_bytes, parts)
        if (source / TOKENIZER_FOLDER).is_dir():
            copy_files(COMPANIONS, source / TOKENIZER_FOLDER, partial)
        special_ids = _special_ids(partial, config)
        written = str(weights[llama.EMBEDDING].dtype)
        write_json(partial / "config.json", llama.config_to_hf(config, written, special_ids))
        generation = eos.generation_config(partial)
        if not generation or eos.ids_in(generation, partial) != config.eos_token_ids:
            ends = {"eos_token_id": special_ids["eos_token_id"]}
            write_json(partial / "generation_config.json", special_ids | generation | ends)

        reason = logits.reason_not_to_compare(weights.values(), compare_bytes)
        compared = logits.Comparison(None, None) if reason else logits.compare(partial, source, config, dtype)
        provenance = {
            "source": source.resolve().name,
            "source_format": "model folder",
            **heard_in_training(source),
            "export_dtype": written,
            "export_max_abs_logit_diff": compared.difference,
            **({} if compared.rounding is None else {"export_rounding_logit_diff": compared.rounding}),
            **({"export_not_compared": reason} if reason else {}),
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")},
        }
        write_json(partial / "provenance.json", provenance)
    if parts is not None:
        shutil.rmtree(parts)
    return provenance


def write_weights(
    folder: Path, weights: Mapping[str, engine.Weight], source: Path, shard_bytes: int, parts: Path | None = None
) -> None:
    """The weight files of a Hugging Face folder; those that ``parts`` has already are moved from there.

    Raises:
      InputError: a weight of ``source`` that holds NaN or infinity.
    """
    shards = safetensors_files.shards_of(weights, shard_bytes)
    written = [file for file in shards if parts is not None and (parts / file).exists()]
    for file in written:
        found = {key: (tensor.dtype, tensor.shape) for key, tensor in safetensors_files.read_header(parts / file).items()}
        if found != {key: (info.dtype, info.shape) for key, info in shards[file].items()}:
            raise InputError(f"{parts / file}: other tensors found than those of this export; remove {parts}")
        (parts / file).rename(folder / file)
    missing = {file: shard for file, shard in shards.items() if file not in written}
    with _reading(weights, source, sum(map(len, missing.values()))) as read:
        for file, shard in missing.items():
            safetensors_files.write_file(folder / file, shard, read)
    safetensors_files.write_index(folder, shards)


@contextlib.contextmanager
def _reading(weights: Mapping[str, engine.Weight], source: Path, count: int) -> Iterator[safetensors_files.Read]:
    """Reads tensors by name, block by block, beside a bar of ``count``."""
    with tqdm(total=count, desc="weights", unit="tensor", disable=None) as bar:

        def read(key: str) -> Iterator[np.ndarray]:
            bar.update()
            for block in weights[key].blocks():
                engine.check_finite(block, key, source)
                yield block

        yield read


# ---------------------------------------------------------------------------------------------------------------------
# Inspect
# ---------------------------------------------------------------------------------------------------------------------


def describe(source: Path, format: str) -> dict[str, str]:
    """What ``inspect`` prints of a language model; the weights are checked against the config but not read."""
    if format == "hf":
        config, weights, notes = open_hf(source, keeps_dtypes=False)
        tokenizer = _read_tokenizer(source)
    else:
        (config, weights), notes = open_folder(source), []
        tokenizer = _read_tokenizer(source / TOKENIZER_FOLDER)
    return describe_opened(Opened(config, weights, notes), tokenizer)


def describe_opened(opened: Opened, tokenizer: TextTokenizer | None) -> dict[str, str]:
    """The same of one that was opened already, and of its tokenizer."""
    config, weights, notes = opened
    network, sound = config.llama, config.sound
    return {
        "architecture": network.architecture,
        "parameters": f"{sum(math.prod(weight.shape) for weight in weights.values()):,}",
        "dtype": ", ".join(sorted({str(weight.dtype) for weight in weights.values()})),
        "layers": str(network.num_hidden_layers),
        "hidden size": str(network.hidden_size),
        "heads": f"{network.num_attention_heads} ({network.num_key_value_heads} for keys and values)",
        "vocabulary": str(network.vocab_size),
        "sound tokens": "none" if sound is None else f"{sound.codes} codes from id {sound.first_id}, durations {sound.durations}",
        "answers end at": eos.spelled(config.eos_token_ids, tokenizer),
        **({"note": "; ".join(notes)} if notes else {}),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


def _special_ids(folder: Path, config: LanguageModelConfig) -> dict[str, Any]:
    """``bos_token_id``, ``eos_token_id``, ``pad_token_id`` of an export: the model's ends, else the tokenizer's tokens."""
    ends = config.eos_token_ids
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None}
    ids["pad_token_id"] = None
    if (folder / "tokenizer.json").exists() and (folder / "tokenizer_config.json").exists():
        added = {token["content"]: token["id"] for token in read_object(folder / "tokenizer.json").get("added_tokens", [])}
        settings = read_object(folder / "tokenizer_config.json")
        for name in ("bos_token", "pad_token"):
            content = settings.get(name)
            ids[f"{name}_id"] = added.get(content["content"] if isinstance(content, dict) else content)
    return ids


def heard_in_training(folder: Path) -> dict[str, Any]:
    """What a folder's provenance says of its model's training: whose sound codes, in which form, and the chat template's date."""
    file = folder / "provenance.json"
    provenance = read_object(file) if file.exists() else {}
    return {key: provenance[key] for key in ("speech_tokenizer_fingerprint", "sound_form", "chat_date") if key in provenance}
