"""Language models in GGUF files: their metadata as a Hugging Face config, their names in the table, and the import."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters import engine, eos, gguf_files, gguf_tokenizer, language_model, llama
from converters.gguf_files import GgufFile, GgufWeight
from converters.sources import sha256
from ichigo_jax.errors import InputError
from ichigo_jax.models.llama import LanguageModelConfig, LlamaConfig, RopeScaling, inverse_frequencies
from ichigo_jax.storage import atomic_write
from ichigo_jax.text.tokenizer import TextTokenizer

# llama.cpp's names and Hugging Face's.
NAMES = {
    "token_embd.weight": llama.EMBEDDING,
    "output_norm.weight": "model.norm.weight",
    "output.weight": llama.HEAD,
    "blk.{i}.attn_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "blk.{i}.attn_q.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "blk.{i}.attn_k.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "blk.{i}.attn_v.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "blk.{i}.attn_output.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "blk.{i}.attn_q.bias": "model.layers.{i}.self_attn.q_proj.bias",
    "blk.{i}.attn_k.bias": "model.layers.{i}.self_attn.k_proj.bias",
    "blk.{i}.attn_v.bias": "model.layers.{i}.self_attn.v_proj.bias",
    "blk.{i}.ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "blk.{i}.ffn_gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "blk.{i}.ffn_up.weight": "model.layers.{i}.mlp.up_proj.weight",
    "blk.{i}.ffn_down.weight": "model.layers.{i}.mlp.down_proj.weight",
}
ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3.1's scaling divides the rotary frequencies by, [H/2]
_ROTATED = re.compile(r"blk\.\d+\.attn_[qk]\.weight")

# Metadata after the architecture's name, and Hugging Face's field.
_NUMBERS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_EPSILON = "attention.layer_norm_rms_epsilon"
# Those that may be missing.
_OPTIONAL = (
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "vocab_size",
)
# Those that the model here has no counterpart of, and the only values that change nothing.
_MUST_BE = {
    "rope.scaling.type": "none",
    "rope.scale_linear": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
}
_UNUSED = ("rope.scaling.finetuned", "tensor_data_layout")
_DEFAULT_THETA = 10_000.0  # the format's, where ``rope.freq_base`` says no other


@dataclasses.dataclass(frozen=True)
class Unpermuted(engine.Weight):
    """A query or key projection of a Llama, [N·H, D], with the rows of each head as Hugging Face has them.

    llama.cpp rotates neighbouring numbers and Hugging Face those half a head apart, so its files have the two halves of every
    head shuffled into one another.
    """

    source: engine.Weight
    heads: int

    def read(self) -> np.ndarray:
        pairs = self.source.read().reshape(self.heads, -1, 2, *self.shape[1:])
        return pairs.swapaxes(1, 2).reshape(self.shape)

    def blocks(self) -> Iterator[np.ndarray]:
        return engine.row_blocks(self.read())


# ---------------------------------------------------------------------------------------------------------------------
# Import and inspect
# ---------------------------------------------------------------------------------------------------------------------


def import_gguf(file: Path, target: Path, dtype: str | None, vocab_multiple: int = 1) -> list[str]:
    """Writes a model folder from a GGUF file, whole or not at all, one tensor at a time.

    Args:
      file: a Llama or Qwen2.
      target: must not exist.
      dtype: "float32", "bfloat16", or None to keep each weight's own; those of few bits become float32.
      vocab_multiple: as for ``language_model.import_hf``.

    Returns:
      What the user should know.

    Raises:
      InputError: whatever is wrong with the file, in one line.
    """
    with atomic_write(target) as partial, tempfile.TemporaryDirectory() as workspace:
        contents, text = gguf_files.read_gguf(file), Path(workspace) / "tokenizer"
        (config, weights, notes), tokenizer = _open(contents, text)
        config = language_model.pad_vocabulary(config, vocab_multiple)
        cast = engine.IMPORT_DTYPES[dtype] if dtype else None
        language_model.write_folder(partial, config, weights, cast, _origin(contents), text if tokenizer else None, file)
    few_bits = [name for name in contents.types if name not in gguf_files.FLOATS]
    if few_bits and dtype is None:
        notes.append(f"{' and '.join(few_bits)} weights written as float32; --dtype bfloat16 takes half of that")
    return notes


def describe(file: Path) -> dict[str, str]:
    """What ``inspect`` prints of a GGUF file."""
    contents = gguf_files.read_gguf(file)
    with tempfile.TemporaryDirectory() as workspace:
        lines = language_model.describe_opened(*_open(contents, Path(workspace) / "tokenizer"))
    stored = ", ".join(f"{name} ({count})" for name, count in contents.types.items())
    return {**lines, "dtype": f"{lines['dtype']}, stored as {stored}"}


def _open(contents: GgufFile, text: Path) -> tuple[language_model.Opened, TextTokenizer | None]:
    """The model with its weights under their Hugging Face names, checked but not read; its tokenizer is written to ``text``."""
    network = _network(contents)
    sound, tokenizer, notes = None, None, []
    if gguf_tokenizer.has_tokenizer(contents.metadata):
        tokenizer = gguf_tokenizer.write(contents.metadata, text, str(contents.file))
        sound = tokenizer.sound
        if tokenizer.size > network.vocab_size:
            raise InputError(
                f"{contents.file}: a tokenizer with ids up to {tokenizer.size - 1} found, the embedding has {network.vocab_size} "
                "rows; convert the model anew"
            )
    else:
        notes.append("no text tokenizer in it, so the model takes token ids only")
    ends = gguf_tokenizer.end_ids(contents.metadata)
    notes.append(f"answers end at {eos.spelled(ends, tokenizer)}")
    try:
        config = LanguageModelConfig(network, sound, ends, padded_vocab_size=network.vocab_size)
    except InputError as error:
        raise InputError(f"{contents.file}: {error}; correct its metadata") from None
    theirs = {name: key for name, key in _names(network.num_hidden_layers)}
    ours = {key: name for name, key in theirs.items()}
    pieces = language_model.pieces_of(config)
    named = [dataclasses.replace(piece, source=ours[piece.source]) for piece in pieces]
    tensors = _same_dtypes({name: tensor for name, tensor in contents.tensors.items() if name != ROPE_FACTORS})
    engine.check(named, tensors, str(contents.file))
    weights = {theirs[name]: _unpermuted(name, tensor, network) for name, tensor in tensors.items()}
    return language_model.Opened(config, weights, notes), tokenizer


def _names(layers: int) -> Iterator[tuple[str, str]]:
    for name, key in NAMES.items():
        for layer in range(layers) if engine.LAYER in name else [0]:
            yield name.replace(engine.LAYER, str(layer)), key.replace(engine.LAYER, str(layer))


def _same_dtypes(tensors: Mapping[str, GgufWeight]) -> dict[str, GgufWeight]:
    """A weight that some layers store as one dtype and some as another is float32 in all of them."""
    pattern = lambda name: re.sub(r"^blk\.\d+\.", "", name)  # noqa: E731
    found: dict[str, set[np.dtype]] = {}
    for name, tensor in tensors.items():
        found.setdefault(pattern(name), set()).add(tensor.dtype)
    float32 = np.dtype(np.float32)
    mixed = {name for name, dtypes in found.items() if len(dtypes) > 1}
    return {n: dataclasses.replace(x, dtype=float32) if pattern(n) in mixed else x for n, x in tensors.items()}


def _unpermuted(name: str, tensor: GgufWeight, network: LlamaConfig) -> engine.Weight:
    if network.architecture != "llama" or not _ROTATED.fullmatch(name):
        return tensor
    return Unpermuted(tensor.dtype, tensor.shape, tensor, tensor.shape[0] // network.head_dim)


def _origin(contents: GgufFile) -> dict[str, Any]:
    file = contents.file
    types = {"source_tensor_types": contents.types}
    return {"source": file.resolve().name, "source_format": "gguf", "source_sha256": {file.name: sha256(file)}, **types}


# ---------------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------------


def _network(contents: GgufFile) -> LlamaConfig:
    """The network that the metadata describes; it goes through the check of Hugging Face configs.

    Raises:
      InputError: another architecture, and, all at once, metadata that is missing, unknown or cannot be expressed.
    """
    where, metadata = str(contents.file), contents.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in llama.ARCHITECTURES:
        known = " or ".join(map(repr, llama.ARCHITECTURES))
        raise InputError(f"{where}: general.architecture {architecture!r} found, expected {known}")
    prefix = f"{architecture}."
    values = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    faults = _faults(values, prefix, contents)
    if faults:
        raise InputError(f"{where}: {'; '.join(faults)}")

    heads = values["attention.head_count"]
    config = {field: values[name] for name, field in _NUMBERS.items()}
    config |= {
        "model_type": architecture,
        "vocab_size": contents.tensors["token_embd.weight"].shape[0],
        "num_key_value_heads": values.get("attention.head_count_kv", heads),
        "head_dim": values.get("attention.key_length", values["embedding_length"] // heads),
        "rms_norm_eps": _shortest(values[_EPSILON]),
        "rope_theta": _shortest(values.get("rope.freq_base", _DEFAULT_THETA)),
        "tie_word_embeddings": "output.weight" not in contents.tensors,
    }
    network = llama.config_from_hf(config, where)
    if ROPE_FACTORS in contents.tensors:
        network = dataclasses.replace(network, rope_scaling=_rope_scaling(network, contents.tensors[ROPE_FACTORS], where))
    return network


def _faults(values: Mapping[str, Any], prefix: str, contents: GgufFile) -> list[str]:
    tensors = contents.tensors
    faults = [f"{prefix}{name} is missing" for name in (*_NUMBERS, _EPSILON) if name not in values]
    numbers = (*_NUMBERS, *_OPTIONAL)
    for name in numbers:
        value = values.get(name, 1)
        expected = (int, float) if name == "rope.freq_base" else (int,)
        if type(value) not in expected or value < 1:
            faults.append(f"{prefix}{name} {value!r} found, expected a positive number")
    for name, expected in _MUST_BE.items():
        if name in values and values[name] != expected:
            faults.append(f"{prefix}{name} {values[name]!r} cannot be expressed, expected {expected!r}")
    known = {*numbers, _EPSILON, *_MUST_BE, *_UNUSED}
    faults += [f"{prefix}{name} is unknown" for name in sorted(values.keys() - known)]
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        faults.append("token_embd.weight is missing or has other than 2 axes")
    elif values.get("vocab_size", tensors["token_embd.weight"].shape[0]) != tensors["token_embd.weight"].shape[0]:
        rows = tensors["token_embd.weight"].shape[0]
        faults.append(f"{prefix}vocab_size {values['vocab_size']} found, token_embd.weight has {rows} rows")
    layers = len({found[1] for name in tensors if (found := re.match(r"blk\.(\d+)\.", name))})
    if values.get("block_count", layers) != layers:
        faults.append(f"{prefix}block_count {values['block_count']} found, but weights of {layers} layers")
    if faults:
        return faults
    width = values.get("attention.key_length", values["embedding_length"] // values["attention.head_count"])
    for name in ("attention.value_length", "rope.dimension_count"):
        if values.get(name, width) != width:
            faults.append(f"{prefix}{name} {values[name]} cannot be expressed, expected the head size {width}")
    return faults


def _shortest(value: float) -> float:
    """The shortest number that is the same in the file's float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(network: LlamaConfig, factors: GgufWeight, where: str) -> RopeScaling | None:
    """Llama 3.1's scaling, of which the file has only the result: a factor for each rotary frequency.

    Short wavelengths have 1 and long ones ``factor``; between them 1 / factor is linear in the frequency, which tells the
    borders. ``low_freq_factor`` and ``high_freq_factor`` may both be multiplied when ``original_max_position_embeddings`` is,
    so the first one is taken as 1, as all released models have it.

    Raises:
      InputError: factors of another kind.
    """
    expected, found = inverse_frequencies(network), np.asarray(factors.read(), np.float32)
    if found.shape != expected.shape or not (np.isfinite(found).all() and (found > 0).all()):
        raise InputError(f"{where}: {ROPE_FACTORS} of shape {list(found.shape)} found, expected {len(expected)} positive numbers")
    if (found == 1).all():
        return None
    for scaling in _candidates(found.astype(np.float64), expected.astype(np.float64)):
        scaled = inverse_frequencies(dataclasses.replace(network, rope_scaling=scaling))
        if np.allclose(scaled, expected / found, rtol=1e-5, atol=0):
            return scaling
    raise InputError(f"{where}: {ROPE_FACTORS} found that is not of Llama 3.1's scaling, which cannot be expressed")


def _candidates(factors: np.ndarray, frequencies: np.ndarray) -> Iterator[RopeScaling]:
    """Scalings that may have given these factors, the likeliest first."""
    factor = float(factors.max())
    low, high = 1.0, 4.0  # of every released Llama 3.1 and 3.2
    yield RopeScaling(factor, low, high, 8192)  # and so is this
    between = (factors > 1 + 1e-6) & (factors < factor * (1 - 1e-6))
    # share = (original / wavelength - low) / (high - low) of the frequency stays, and 1 - share is divided by the factor
    share = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
    turns = frequencies[between] / (2 * np.pi)  # 1 / wavelength
    if len(turns):
        yield RopeScaling(factor, low, high, round(np.mean((share * (high - low) + low) / turns)))
    if len(turns) >= 2:
        slope, start = np.polyfit(turns, share, 1)
        if start < 0 < slope:
            high = round(low - low / start, 3)
            yield RopeScaling(factor, low, high, round(slope * (high - low)))
