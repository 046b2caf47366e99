"""Adapters of language models: PEFT's folders to model folders and back.

A PEFT folder holds what differs from a base model: A and B of linear layers (``lora_A``, ``lora_B``), and modules that were
trained in full (``modules_to_save``). Here it becomes the merged model with the adapter itself beside its weights.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from converters import engine, language_model, llama, peft_folder, safetensors_files
from converters.engine import LAYER, TRANSPOSED, Row
from converters.peft_folder import BASE_NAME, CONFIG, PREFIX
from converters.sources import is_file, read_object, sha256
from ichigo_jax import configuration
from ichigo_jax.errors import InputError
from ichigo_jax.models import lora
from ichigo_jax.models.llama import LanguageModelConfig, Llama
from ichigo_jax.models.lora import LoraConfig
from ichigo_jax.storage import atomic_write, read_json, write_json
from ichigo_jax.storage.model_folder import load_arrays, load_config, save_model

WEIGHTS = "adapter_model.safetensors"
WEIGHT = ".weight"
HEAD = "lm_head"

# ---------------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------------

_READ = ("r", "lora_alpha", "use_rslora", "target_modules", "modules_to_save", "ensure_weight_tying")

# Fields that change nothing in what a trained adapter computes, whatever they hold.
_WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)

# Fields with another neutral value than none; all that are not named here must be empty.
_MUST_BE = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # The other ways to start change the base's weights as well.
    "init_lora_weights": (True, False, None, "gaussian", "eva"),
}
_EMPTY = (None, False, {}, [])


def config_from_peft(values: Mapping[str, Any], base: LanguageModelConfig, where: str) -> LoraConfig:
    """The adapter that an ``adapter_config.json`` describes.

    Args:
      values: the file's contents.
      base: the model that it is for, whose modules the file names.
      where: the file's name for errors.

    Raises:
      InputError: missing fields, and everything that the adapter here cannot express, by name.
    """
    faults = [f"{name} is missing" for name in ("peft_type", "r", "lora_alpha", "target_modules") if values.get(name) is None]
    for name, value in values.items():
        allowed = _MUST_BE.get(name, _EMPTY)
        if name not in (*_READ, *_WITHOUT_EFFECT) and value not in allowed:
            faults.append(f"{name} {value!r} cannot be expressed, expected {' or '.join(map(repr, allowed))}")
    names = {name: _names(values, name, faults) for name in ("target_modules", "modules_to_save")}
    if faults:
        raise InputError(f"{where}: {'; '.join(faults)}")

    linears, saved = _linear_modules(base), _whole_modules(base)
    if values["target_modules"] == "all-linear":
        targets = list(linears)
    else:
        targets = _found(linears, names["target_modules"], _is_module, "target_modules", faults)
    train_also = _found(saved, names["modules_to_save"], str.endswith, "modules_to_save", faults)
    if base.llama.tie_word_embeddings:
        both = HEAD in train_also or values.get("ensure_weight_tying") is True
        if {"embedding", HEAD} & set(train_also) and not ("embedding" in train_also and both):
            faults.append(
                "modules_to_save with one of embed_tokens and lm_head unties them, which cannot be expressed; merge the adapter "
                "with PEFT (merge_and_unload), save and import the result"
            )
        train_also = [name for name in train_also if name != HEAD]
    if faults:
        raise InputError(f"{where}: {'; '.join(faults)}")
    fields = {
        "rank": values["r"],
        "alpha": values["lora_alpha"],
        "rslora": bool(values.get("use_rslora")),  # older versions of the format do not have it
        "targets": ["all"] if len(targets) == len(linears) else targets,
        "train_also": train_also,
    }
    return configuration.from_dict(LoraConfig, fields, where)


def config_to_peft(adapter: LoraConfig, base: LanguageModelConfig, base_name: str | None) -> dict[str, Any]:
    """The ``adapter_config.json`` of an export; ``base_name`` is what it calls the base model."""
    linears, saved = _linear_modules(base), _whole_modules(base)
    train_also = [*adapter.train_also]
    tied = base.llama.tie_word_embeddings and "embedding" in train_also
    if tied:
        train_also.append(HEAD)
    modules = dict.fromkeys(module.rpartition(".")[2] for name in train_also for module in saved[name])
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        BASE_NAME: base_name,
        "revision": None,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,
        "use_rslora": adapter.rslora,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": [linears[name][0].rpartition(".")[2] for name in adapter.linears],
        "modules_to_save": list(modules) or None,
        # Versions that do not know this field load the embedding and the head apart, which are stored alike.
        "ensure_weight_tying": tied,
    }


def _linear_modules(base: LanguageModelConfig) -> dict[str, list[str]]:
    """``q`` -> ``model.layers.0.self_attn.q_proj``, … for every linear layer."""
    return {name: _modules(base, [lora.weight_path(name)]) for name in lora.LINEARS}


def _whole_modules(base: LanguageModelConfig) -> dict[str, list[str]]:
    """``norms`` -> all modules of them, and so on; a tied head has a module too."""
    return {name: _modules(base, paths) or [HEAD] for name, paths in lora.WHOLE.items()}


def _modules(base: LanguageModelConfig, paths: Sequence[engine.Path]) -> list[str]:
    sources = [row.source.removesuffix(WEIGHT) for row in llama.table(base) if row.target in paths]
    layers = range(base.llama.num_hidden_layers)
    return [source.replace(LAYER, str(i)) for source in sources for i in (layers if LAYER in source else [0])]


def _names(values: Mapping[str, Any], field: str, faults: list[str]) -> list[str]:
    names = values.get(field)
    if names is None or (field == "target_modules" and names == "all-linear"):
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        faults.append(f"{field} {names!r} cannot be expressed, expected a list of module names")
        return []
    return names


def _is_module(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _found(known: Mapping[str, list[str]], names: Sequence[str], matches: Any, field: str, faults: list[str]) -> list[str]:
    """Which entries of ``known`` the names mean, by PEFT's own rule for the field; each is meant with all its modules."""
    found = []
    for entry, modules in known.items():
        meant = [module for module in modules if any(matches(module, name) for name in names)]
        if len(meant) == len(modules):
            found.append(entry)
        elif meant:
            faults.append(f"{field} means {len(meant)} of {len(modules)} modules like {modules[0]}, expected all or none")
    strangers = [name for name in names if not any(matches(module, name) for modules in known.values() for module in modules)]
    faults += [f"{field} {name!r} cannot be expressed" for name in strangers]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def table(base: LanguageModelConfig, adapter: LoraConfig) -> list[Row]:
    """PEFT's keys and ours."""
    known = {row.target: row for row in llama.table(base)}
    rows = []
    for name in adapter.linears:
        row = known[lora.weight_path(name)]
        module = PREFIX + row.source.removesuffix(WEIGHT)
        # Theirs are [r, in] and [out, r]: of the weight's own axes, heads are among the inputs or among the outputs.
        heads_first = lora.LINEARS[name].inputs > 1
        a, b = (row.transform, TRANSPOSED) if heads_first else (TRANSPOSED, row.transform)
        rows.append(Row(f"{module}.lora_A{WEIGHT}", lora.adapter_path(name, "a"), a))
        rows.append(Row(f"{module}.lora_B{WEIGHT}", lora.adapter_path(name, "b"), b))
    rows += [dataclasses.replace(known[path], source=PREFIX + known[path].source) for path in adapter.trained_in_full]
    if base.llama.tie_word_embeddings and "embedding" in adapter.train_also:
        rows.append(dataclasses.replace(known["embedding",], source=PREFIX + HEAD + WEIGHT))
    return rows


def target_shapes(base: LanguageModelConfig, adapter: LoraConfig) -> dict[engine.Path, tuple[int, ...]]:
    """Path to shape of every array of our adapter."""

    def trained() -> dict[str, Any]:
        model = Llama(base, nnx.Rngs(0))
        lora.attach(model, adapter, np.float32, nnx.Rngs(0))
        return lora.trained_state(model)

    return {path: array.shape for path, array in flatten_dict(nnx.eval_shape(trained)).items()}


# ---------------------------------------------------------------------------------------------------------------------
# Both directions
# ---------------------------------------------------------------------------------------------------------------------


def import_peft(source: Path, base: Path | None, target: Path) -> list[str]:
    """Writes the model folder of ``base`` with an adapter merged into it, whole or not at all.

    Args:
      source: a PEFT adapter folder.
      base: the model folder that the adapter was trained on; its dtypes are kept. None: the one that the adapter names.
      target: must not exist.

    Returns:
      What the user should know.

    Raises:
      InputError: whatever is wrong with the source, in one line; a base that it does not fit.
    """
    base, notes = peft_folder.find_base(source, base)
    with atomic_write(target) as partial, tempfile.TemporaryDirectory() as workspace:
        config = load_config(base, language_model.KIND, LanguageModelConfig)
        adapter = config_from_peft(read_object(source / CONFIG), config, str(source / CONFIG))
        stored = load_arrays(base)
        engine.check_stored(stored, language_model.target_shapes(config), base)

        config, adapter, tensors, said = peft_folder.take_embeddings(config, adapter, _read_weights(source), source)
        notes += said
        targets = target_shapes(config, adapter)
        pieces = engine.expand(table(config, adapter), targets)
        engine.check(pieces, tensors, str(source), keeps_dtypes=False)
        _check_tied(pieces, tensors, source)
        cast = np.dtype(np.float32) if peft_folder.casts_to_one(pieces, tensors) else None
        if cast is not None:
            notes.append("layers of the adapter have different dtypes, or rare ones: all of it is kept in float32")
        arrays = engine.assemble(engine.read_pieces(pieces, lambda key: tensors[key].read(), cast, str(source)), targets)
        config, texts, said = peft_folder.take_tokenizer(source, base, config, Path(workspace))
        notes += said

        provenance = {
            "source": source.resolve().name,
            "source_format": "peft",
            "source_sha256": {name: sha256(source / name) for name in (CONFIG, WEIGHTS)},
            "base": base.resolve().name,
            BASE_NAME: read_object(source / CONFIG).get(BASE_NAME),
        }
        state = unflatten_dict(lora.merge_arrays(stored, arrays, adapter))
        trained = language_model.heard_in_training(base) | language_model.heard_in_training(source)
        save_model(partial, language_model.KIND, config, state, provenance | trained, texts)
        lora.save_adapter(partial, adapter, unflatten_dict(arrays), provenance)
    return notes


def export_peft(source: Path, target: Path, base_name: str | None) -> None:
    """Writes a PEFT adapter folder from the folder of a model that was trained with an adapter.

    Args:
      source: a model folder of a language model.
      target: must not exist.
      base_name: what the folder calls its base model; None takes the name that the adapter came with, if any.

    Raises:
      InputError: a source that is broken, or a model without an adapter.
    """
    with atomic_write(target) as partial:
        partial.mkdir()
        config = load_config(source, language_model.KIND, LanguageModelConfig)
        adapter, state = lora.load_adapter(source)
        lora.check_fits(adapter, config.llama)
        targets = target_shapes(config, adapter)
        engine.check_stored(state, targets, source / lora.ADAPTER_FOLDER)
        pieces = {piece.source: piece for piece in engine.expand(table(config, adapter), targets)}
        infos = {key: engine.TensorInfo(state[piece.target].dtype, piece.shape) for key, piece in pieces.items()}
        safetensors_files.write_file(partial / WEIGHTS, infos, lambda key: engine.foreign_tensor(pieces[key], state))
        before = read_json(source / lora.ADAPTER_FOLDER / "provenance.json")
        name = before.get(BASE_NAME) if base_name is None else base_name
        write_json(partial / CONFIG, config_to_peft(adapter, config, name))
        provenance = {
            "source": source.resolve().name,
            "source_format": "model folder",
            **language_model.heard_in_training(source),
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")},
        }
        write_json(partial / "provenance.json", provenance)


def describe(source: Path) -> dict[str, str]:
    """What ``inspect`` prints of a PEFT adapter folder; only with its base could the weights be checked."""
    values, tensors = read_object(source / CONFIG), _read_weights(source)
    return {
        "base model": str(values.get(BASE_NAME)),
        "rank": str(values.get("r")),
        "alpha": str(values.get("lora_alpha")),
        "target modules": str(values.get("target_modules")),
        "modules to save": str(values.get("modules_to_save")),
        "text tokenizer": "its own" if is_file(source / "tokenizer.json") else "the base's",
        "parameters": f"{sum(math.prod(info.shape) for info in tensors.values()):,}",
        "dtype": ", ".join(sorted({str(info.dtype) for info in tensors.values()})),
    }


def describe_merged(source: Path) -> dict[str, str]:
    """What ``inspect`` says of the adapter that a model folder holds beside its weights; nothing where there is none."""
    if not (source / lora.ADAPTER_FOLDER).is_dir():
        return {}
    adapter = lora.load_adapter_config(source)
    in_full = ", ".join(adapter.train_also) or "nothing"
    return {"adapter": f"rank {adapter.rank}, alpha {adapter.alpha:g}, on {', '.join(adapter.targets)}; in full: {in_full}"}


def _read_weights(source: Path) -> dict[str, safetensors_files.Tensor]:
    if not is_file(source / WEIGHTS):
        raise InputError(f"{source}: no {WEIGHTS} found, expected the adapter's weights in it (PEFT's save_pretrained writes it)")
    return safetensors_files.read_header(source / WEIGHTS)


def _check_tied(pieces: Sequence[engine.Piece], tensors: Mapping[str, safetensors_files.Tensor], source: Path) -> None:
    """An embedding that is the head as well is stored twice, and must be the same both times."""
    keys = [piece.source for piece in pieces if piece.target == ("embedding",)]
    if any(not np.array_equal(tensors[keys[0]].read(), tensors[key].read()) for key in keys[1:]):
        raise InputError(f"{source}: {' and '.join(keys)} differ, expected them alike, since the base model ties them")
