"""Language models: Hugging Face folders to model folders and back."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from converters import engine, llama, logits, safetensors_files, stored_weights
from converters.sources import copy_files, read_object, sha256
from ichigo_jax.errors import InputError
from ichigo_jax.models import stored_arrays
from ichigo_jax.models.folder import TOKENIZER_FOLDER, load_config, new_model
from ichigo_jax.models.llama import LanguageModelConfig, Llama
from ichigo_jax.storage import whole, write_json
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


def read_hf_config(source: Path) -> LanguageModelConfig:
    """The config of a Hugging Face folder: the network from ``config.json``, sound tokens from the tokenizer.

    Raises:
      InputError: what the model here cannot express, or a tokenizer with ids that the embedding has no rows for.
    """
    file = source / "config.json"
    values = read_object(file)
    network = llama.config_from_hf(values, str(file))
    eos = _eos_ids(_generation_config(source), source) or _eos_ids(values, source)
    sound = None
    if (source / "tokenizer.json").exists():
        tokenizer = TextTokenizer.from_folder(source)
        sound = tokenizer.sound
        if tokenizer.size > network.vocab_size:
            raise InputError(
                f"{source}: the tokenizer has ids up to {tokenizer.size - 1}, expected ids below vocab_size "
                f"{network.vocab_size} of config.json; the tokenizer is another model's"
            )
    return LanguageModelConfig(network, sound, eos, padded_vocab_size=network.vocab_size)


def open_hf(source: Path) -> tuple[LanguageModelConfig, Mapping[str, engine.Weight]]:
    """The config of a Hugging Face folder and its weights, checked but not read.

    Raises:
      InputError: whatever is wrong with the source, in one line.
    """
    config = read_hf_config(source)
    tensors = safetensors_files.read_folder(source)
    engine.check(pieces_of(config), tensors, str(source))
    return config, tensors


def import_hf(source: Path, target: Path, dtype: str | None, vocab_multiple: int = 1) -> None:
    """Writes a model folder from a Hugging Face folder, whole or not at all, one tensor at a time.

    Args:
      source: ``config.json``, safetensors, and a tokenizer where there is one.
      target: must not exist.
      dtype: "float32", "bfloat16", or None to keep each weight's own.
      vocab_multiple: rows of zeros are added to the embedding up to a multiple of this, so that a mesh divides them.

    Raises:
      InputError: whatever is wrong with the source, in one line.
    """
    with whole(target) as partial, tempfile.TemporaryDirectory() as companions:
        config, weights = open_hf(source)
        config = pad_vocabulary(config, vocab_multiple)
        provenance = {**hf_origin(source), **heard_in_training(source)}
        copy_files(COMPANIONS, source, Path(companions))
        has_tokenizer = (source / "tokenizer.json").exists()
        cast = engine.IMPORT_DTYPES[dtype] if dtype else None
        write_folder(partial, config, weights, cast, provenance, companions if has_tokenizer else None)


def write_folder(
    target: Path,
    config: LanguageModelConfig,
    weights: Mapping[str, engine.Weight],
    dtype: np.dtype | None,
    provenance: Mapping[str, Any],
    tokenizer_folder: str | os.PathLike | None,
) -> None:
    """Writes a model folder from weights under their Hugging Face names; ``dtype`` None keeps each weight's own."""
    targets, pieces = target_shapes(config), pieces_of(config)
    arrays = stored_weights.new_arrays(pieces, targets, weights, dtype)
    with new_model(target, KIND, config, arrays, provenance, tokenizer_folder) as stores:
        stored_weights.fill(stores, pieces, weights)


def hf_origin(source: Path) -> dict[str, Any]:
    """What a provenance says of a Hugging Face folder: its name and the hashes of its config and weights."""
    files = sorted({tensor.file for tensor in safetensors_files.read_folder(source).values()})
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
    source: Path, target: Path, part: int, parts: int, shard_bytes: int = safetensors_files.SHARD_BYTES
) -> list[str]:  # fmt: skip
    """Writes every ``parts``-th weight file of an export beside it, on one of as many hosts that share a disk.

    ``export_hf`` then takes the files that are there and writes what is missing. Files are whole or not there at all, and
    those that are there already stay, so a host that was interrupted can begin again.

    Args:
      source, target, shard_bytes: as for ``export_hf``.
      part: which part, from 0.
      parts: how many there are.

    Returns:
      The names of the files of this part.

    Raises:
      InputError: a source that is broken, a target that exists, or parts there of another source.
    """
    if target.exists():
        raise InputError(f"{target}: exists already; remove it or choose another name")
    _, weights = open_folder(source)
    folder = _claimed_parts(target, source)
    mine = dict(itertools.islice(safetensors_files.shards_of(weights, shard_bytes).items(), part, None, parts))
    with _reading(weights, sum(map(len, mine.values()))) as read:
        for file, shard in mine.items():
            if not (folder / file).exists():
                with whole(folder / file) as partial:
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
    source: Path, target: Path, shard_bytes: int = safetensors_files.SHARD_BYTES, compare_bytes: int = COMPARE_BYTES
) -> dict[str, Any]:
    """Writes a whole Hugging Face folder from a model folder, one tensor at a time, and only if both give the same logits.

    Weight files that hosts have written with ``export_part`` are moved into it.

    Args:
      source: a model folder of a language model.
      target: must not exist.
      shard_bytes: largest weight file, in bytes of data.
      compare_bytes: the logits of a model that takes more than this in float32 are not compared.

    Returns:
      What was written to ``provenance.json``; ``export_max_abs_logit_diff`` in it is None where nothing was compared, and
      ``export_not_compared`` says why.

    Raises:
      InputError: a source that is broken, or an export whose logits differ by more than 1e-3 in float32.
    """
    with whole(target) as partial:
        partial.mkdir()
        config, weights = open_folder(source)
        parts = _claimed_parts(target, source) if _parts_folder(target).exists() else None
        write_weights(partial, weights, shard_bytes, parts)
        if (source / TOKENIZER_FOLDER).is_dir():
            copy_files(COMPANIONS, source / TOKENIZER_FOLDER, partial)
        special_ids = _special_ids(partial, config)
        dtype = str(weights[llama.EMBEDDING].dtype)
        write_json(partial / "config.json", llama.config_to_hf(config, dtype, special_ids))
        generation = _generation_config(partial)
        if not generation or _eos_ids(generation, partial) != config.eos_token_ids:
            ends = {"eos_token_id": special_ids["eos_token_id"]}
            write_json(partial / "generation_config.json", special_ids | generation | ends)

        reason = logits.reason_not_to_compare(weights.values(), compare_bytes)
        difference = None if reason else logits.compare(partial, source, config)
        provenance = {
            "source": source.resolve().name,
            "source_format": "model folder",
            **heard_in_training(source),
            "export_max_abs_logit_diff": difference,
            **({"export_not_compared": reason} if reason else {}),
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")},
        }
        write_json(partial / "provenance.json", provenance)
    if parts is not None:
        shutil.rmtree(parts)
    return provenance


def write_weights(folder: Path, weights: Mapping[str, engine.Weight], shard_bytes: int, parts: Path | None = None) -> None:
    """The weight files of a Hugging Face folder; those that ``parts`` has already are moved from there."""
    shards = safetensors_files.shards_of(weights, shard_bytes)
    written = [file for file in shards if parts is not None and (parts / file).exists()]
    for file in written:
        found = {key: (tensor.dtype, tensor.shape) for key, tensor in safetensors_files.read_header(parts / file).items()}
        if found != {key: (info.dtype, info.shape) for key, info in shards[file].items()}:
            raise InputError(f"{parts / file}: other tensors found than those of this export; remove {parts}")
        (parts / file).rename(folder / file)
    missing = {file: shard for file, shard in shards.items() if file not in written}
    with _reading(weights, sum(map(len, missing.values()))) as read:
        for file, shard in missing.items():
            safetensors_files.write_file(folder / file, shard, read)
    safetensors_files.write_index(folder, shards)


@contextlib.contextmanager
def _reading(weights: Mapping[str, engine.Weight], count: int) -> Iterator[safetensors_files.Read]:
    """Reads tensors by name, block by block, beside a bar of ``count``."""
    with tqdm(total=count, desc="weights", unit="tensor", disable=None) as bar:

        def read(key: str) -> Iterator[np.ndarray]:
            bar.update()
            return weights[key].blocks()

        yield read


# ---------------------------------------------------------------------------------------------------------------------
# Inspect
# ---------------------------------------------------------------------------------------------------------------------


def describe(source: Path, format: str) -> dict[str, str]:
    """What ``inspect`` prints of a language model; the weights are checked against the config but not read."""
    return describe_weights(*(open_hf(source) if format == "hf" else open_folder(source)))


def describe_weights(config: LanguageModelConfig, weights: Mapping[str, engine.TensorInfo]) -> dict[str, str]:
    """The same of an opened one."""
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
    }


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


def _generation_config(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    return read_object(file) if file.exists() else {}


def _eos_ids(values: Mapping[str, Any], source: Path) -> tuple[int, ...]:
    """``eos_token_id`` of a config, where one id may stand without a list."""
    eos = values.get("eos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if any(type(token) is not int for token in eos):
        raise InputError(f"{source}: eos_token_id {eos} found, expected whole numbers")
    return tuple(eos)


def _special_ids(folder: Path, config: LanguageModelConfig) -> dict[str, Any]:
    """``bos_token_id``, ``eos_token_id``, ``pad_token_id`` of an export: the model's ends, else the tokenizer's tokens."""
    eos = config.eos_token_ids
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None}
    ids["pad_token_id"] = None
    if (folder / "tokenizer.json").exists() and (folder / "tokenizer_config.json").exists():
        added = {token["content"]: token["id"] for token in read_object(folder / "tokenizer.json").get("added_tokens", [])}
        settings = read_object(folder / "tokenizer_config.json")
        for name in ("bos_token", "pad_token"):
            content = settings.get(name)
            ids[f"{name}_id"] = added.get(content["content"] if isinstance(content, dict) else content)
    return ids


def heard_in_training(folder: Path) -> dict[str, Any]:
    """What a folder's provenance says of the sound its model knows: whose codes, by fingerprint, and in which form."""
    file = folder / "provenance.json"
    provenance = read_object(file) if file.exists() else {}
    return {key: provenance[key] for key in ("speech_tokenizer_fingerprint", "sound_form") if key in provenance}
