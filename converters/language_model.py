"""Language models: Hugging Face folders to model folders and back."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict
from tqdm import tqdm

from converters import engine, llama, safetensors_files
from converters.sources import copy_files, read_object, sha256
from ichigo_jax.errors import InputError
from ichigo_jax.models.folder import TOKENIZER_FOLDER, load_arrays, load_config, save_model
from ichigo_jax.models.llama import LanguageModelConfig, Llama
from ichigo_jax.storage import whole, write_json
from ichigo_jax.text.tokenizer import TextTokenizer

KIND = "language_model"
MAX_LOGIT_DIFFERENCE = 1e-3

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


def import_hf(source: Path, target: Path, dtype: str | None) -> None:
    """Writes a model folder from a Hugging Face folder, whole or not at all.

    Args:
      source: ``config.json``, safetensors, and a tokenizer where there is one.
      target: must not exist.
      dtype: "float32", "bfloat16", or None to keep each weight's own.

    Raises:
      InputError: whatever is wrong with the source, in one line.
    """
    with whole(target) as partial:
        config = read_hf_config(source)
        targets = target_shapes(config)
        pieces = engine.expand(llama.table(config), targets)
        tensors = safetensors_files.read_folder(source)
        engine.check(pieces, tensors, str(source))

        bar = tqdm(pieces, desc="reading weights", unit="tensor", disable=None)
        # The pieces come layer by layer, but the whole state is assembled in host memory before it is written.
        arrays = engine.read_pieces(bar, lambda key: tensors[key].read(), engine.IMPORT_DTYPES[dtype] if dtype else None)
        state = unflatten_dict(engine.assemble(arrays, targets))

        files = sorted({tensor.file for tensor in tensors.values()})
        provenance = {
            "source": source.resolve().name,
            "source_format": "hf",
            "source_sha256": {file.name: sha256(file) for file in [source / "config.json", *files]},
            **speech_tokenizer_of(source),
        }
        with tempfile.TemporaryDirectory() as companions:
            copy_files(COMPANIONS, source, Path(companions))
            has_tokenizer = (source / "tokenizer.json").exists()
            save_model(partial, KIND, config, state, provenance, companions if has_tokenizer else None)


def target_shapes(config: LanguageModelConfig) -> dict[engine.Path, tuple[int, ...]]:
    """Path to shape of every array of our model."""
    return engine.target_shapes(lambda rngs: Llama(config, rngs))


# ---------------------------------------------------------------------------------------------------------------------
# Export
# ---------------------------------------------------------------------------------------------------------------------


def export_hf(source: Path, target: Path, shard_bytes: int = safetensors_files.SHARD_BYTES) -> dict[str, Any]:
    """Writes a whole Hugging Face folder from a model folder, and only if both give the same logits.

    Args:
      source: a model folder of a language model.
      target: must not exist.
      shard_bytes: largest weight file, in bytes of data.

    Returns:
      What was written to ``provenance.json``; ``export_max_abs_logit_diff`` in it is None where torch and transformers are
      not installed, so that nothing could be compared.

    Raises:
      InputError: a source that is broken, or an export whose logits differ by more than 1e-3 in float32.
    """
    with whole(target) as partial:
        partial.mkdir()
        config = load_config(source, KIND, LanguageModelConfig)
        state = load_arrays(source)
        targets = target_shapes(config)
        engine.check_stored(state, targets, source)
        pieces = {piece.source: piece for piece in engine.expand(llama.table(config), targets)}

        infos = {key: engine.TensorInfo(state[piece.target].dtype, piece.shape) for key, piece in pieces.items()}
        with tqdm(total=len(infos), desc="writing weights", unit="tensor", disable=None) as bar:

            def read(key: str) -> np.ndarray:
                bar.update()
                return engine.foreign_tensor(pieces[key], state)

            safetensors_files.write_folder(partial, infos, read, shard_bytes)

        if (source / TOKENIZER_FOLDER).is_dir():
            copy_files(COMPANIONS, source / TOKENIZER_FOLDER, partial)
        special_ids = _special_ids(partial, config)
        write_json(partial / "config.json", llama.config_to_hf(config, str(state["embedding",].dtype), special_ids))
        generation = _generation_config(partial)
        if not generation or _eos_ids(generation, partial) != config.eos_token_ids:
            ends = {"eos_token_id": special_ids["eos_token_id"]}
            write_json(partial / "generation_config.json", special_ids | generation | ends)

        provenance = {
            "source": source.resolve().name,
            "source_format": "model folder",
            **speech_tokenizer_of(source),
            "export_max_abs_logit_diff": compare_logits(partial, config, state),
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")},
        }
        write_json(partial / "provenance.json", provenance)
    return provenance


def compare_logits(folder: Path, config: LanguageModelConfig, state: Mapping[engine.Path, np.ndarray]) -> float | None:
    """The largest absolute difference between the logits of transformers on ``folder`` and ours, both in float32.

    Returns:
      None where torch or transformers is not installed.

    Raises:
      InputError: more than ``MAX_LOGIT_DIFFERENCE``, or transformers does not load the folder as it stands.
    """
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return None
    import torch
    from transformers import AutoModelForCausalLM

    theirs, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    faults = {name: sorted(map(str, keys)) for name, keys in loading.items() if keys}
    if faults:
        raise InputError(f"transformers does not load the exported weights as they stand: {faults}; nothing was published")
    theirs.eval()

    graphdef, variables = nnx.split(nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0))))
    filled = [(path, variable.replace(jnp.asarray(state[path], jnp.float32))) for path, variable in nnx.to_flat_state(variables)]
    ours = nnx.merge(graphdef, nnx.from_flat_state(filled))

    @nnx.jit
    def our_logits(model: Llama, tokens: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = model(tokens, positions)
        return model.logits(hidden)

    prompts = check_prompts(config)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(prompts)).logits.numpy()
    with jax.default_matmul_precision("highest"):
        found = np.asarray(our_logits(ours, jnp.asarray(prompts, jnp.int32)))
    largest = float(np.abs(found - expected).max())
    if not largest <= MAX_LOGIT_DIFFERENCE:  # NaN is refused as well
        raise InputError(
            f"the exported weights give logits in transformers that differ by {largest} from the model's, "
            f"expected at most {MAX_LOGIT_DIFFERENCE} in float32; nothing was published"
        )
    return largest


def check_prompts(config: LanguageModelConfig) -> np.ndarray:
    """A few token sequences, int64 [B, T], from all over the vocabulary; one is sound tokens where the model has them."""
    rng = np.random.default_rng(0)
    length = min(24, config.llama.max_position_embeddings)
    prompts = rng.integers(0, config.llama.vocab_size, (3, length))
    prompts[:2, 0] = 0, config.llama.vocab_size - 1
    if config.sound is not None:
        prompts[2] = config.sound.ids(rng.integers(0, config.sound.codes, length - 2))
    return prompts


# ---------------------------------------------------------------------------------------------------------------------
# Inspect
# ---------------------------------------------------------------------------------------------------------------------


def describe(source: Path, format: str) -> dict[str, str]:
    """What ``inspect`` prints of a language model; the weights are checked against the config but not read."""
    if format == "hf":
        config = read_hf_config(source)
        found: Mapping[Any, engine.TensorInfo] = safetensors_files.read_folder(source)
        engine.check(engine.expand(llama.table(config), target_shapes(config)), found, str(source))
    else:
        config = load_config(source, KIND, LanguageModelConfig)
        found = {path: engine.TensorInfo(array.dtype, array.shape) for path, array in load_arrays(source).items()}
    network, sound = config.llama, config.sound
    return {
        "architecture": network.architecture,
        "parameters": f"{sum(math.prod(info.shape) for info in found.values()):,}",
        "dtype": ", ".join(sorted({str(info.dtype) for info in found.values()})),
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


def speech_tokenizer_of(folder: Path) -> dict[str, Any]:
    """The fingerprint of the speech tokenizer that the model was trained with, where the folder records one."""
    file = folder / "provenance.json"
    key = "speech_tokenizer_fingerprint"
    provenance = read_object(file) if file.exists() else {}
    return {key: provenance[key]} if key in provenance else {}
