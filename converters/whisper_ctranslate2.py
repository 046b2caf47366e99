"""Whisper as CTranslate2 stores it (``WhisperSpec``): its dimensions and the weight table.

Two projections are stored stacked there, which here are parts with names of their own: ``self_attention/linear_0`` is
``linear_0[query]``, ``linear_0[key]`` and ``linear_0[value]``, and the cross attention's ``linear_1`` is ``linear_1[key]`` and
``linear_1[value]``. The bias of a key is zeros there, since Whisper has none.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters import ctranslate2
from converters.engine import SAME, Row, Weight
from converters.engine import Path as Target
from converters.sources import is_file, read_object
from converters.whisper_weights import attention_rows, conv_rows, head_dims, linear_rows, norm_rows
from ichigo_jax.errors import InputError
from ichigo_jax.models.whisper import WhisperConfig

SPEC, REVISION = "WhisperSpec", 3
PROJECTION, EMBEDDING = "decoder/projection/weight", "decoder/embeddings/weight"

# Settings, and the only values that the model here can express. Those that were added later may be missing and are off then.
_REQUIRED = {"decoder/activation": 3, "decoder/pre_norm": 1, "decoder/scale_embeddings": 0}  # 3 is the exact GELU
_OPTIONAL = {"decoder/alibi": 0, "decoder/start_from_zero_embedding": 0}
# Settings that change no logits: details of ALiBi, which is off, and what times words.
_UNUSED = (
    "decoder/alibi_use_positive_positions",
    "decoder/scale_alibi",
    "decoder/alignment_heads",
    "decoder/alignment_layer",
)
_HEADS = {"n_audio_head": "encoder/num_heads", "n_text_head": "decoder/num_heads"}

# Dimensions: the tensor whose shape tells them, its rank and the axis.
_SHAPES = {
    "n_mels": ("encoder/conv1/weight", 3, 1),
    "n_audio_state": ("encoder/conv1/weight", 3, 0),
    "n_audio_ctx": ("encoder/position_encodings/encodings", 2, 0),
    "n_vocab": (EMBEDDING, 2, 0),
    "n_text_state": (EMBEDDING, 2, 1),
    "n_text_ctx": ("decoder/position_encodings/encodings", 2, 0),
}
_LAYERS = {"n_audio_layer": "encoder", "n_text_layer": "decoder"}

_STACKED = {"/self_attention/linear_0/": ("query", "key", "value"), "/attention/linear_1/": ("key", "value")}


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a folder holds of a Whisper.

    Attributes:
      dims: OpenAI's dimensions.
      weights: under the names of ``table``.
      quantized: the dtypes of integers that are weights; they read as float32.
      faults: what is wrong with the names and settings, to be told with what is wrong with the weights.
      settings: ``config.json``, where there is one.
    """

    dims: Mapping[str, int]
    weights: Mapping[str, Weight]
    quantized: tuple[str, ...]
    faults: tuple[str, ...]
    settings: Mapping[str, Any]


def open_folder(folder: Path) -> Contents:
    """Opens a faster-whisper folder; no weight is read but scales and the biases of keys.

    Raises:
      InputError: another spec, another revision of it, a broken file, or dimensions that cannot be told, all at once.
    """
    model, file = ctranslate2.read_model(folder), folder / ctranslate2.FILE
    if (model.spec, model.revision) != (SPEC, REVISION):
        raise InputError(
            f"{file}: {model.spec} of revision {model.revision} found, expected {SPEC} of revision {REVISION}; "
            "convert the model anew with CTranslate2 4"
        )
    weights, wrong_scales = ctranslate2.dequantize(model.tensors)
    faults = [*model.faults, *wrong_scales]
    settings = {name: weight for name, weight in weights.items() if not weight.shape}
    weights = {name: weight for name, weight in weights.items() if weight.shape}
    dims = _dims(settings, weights, faults, file)
    faults += _wrong_settings(settings)
    weights = _without_projection(weights, file)
    weights, biased = _without_key_bias(_split(weights, dims["n_audio_state"]))
    quantized = {str(tensor.dtype) for tensor in model.tensors.values() if tensor.shape and tensor.dtype in ctranslate2.QUANTIZED}
    config = folder / "config.json"
    kept = read_object(config) if is_file(config) else {}
    return Contents(dims, weights, tuple(sorted(quantized)), (*faults, *biased), kept)


def _dims(settings: Mapping[str, Weight], weights: Mapping[str, Weight], faults: Sequence[str], file: Path) -> dict[str, int]:
    dims, missing = {}, []
    for name, (key, rank, axis) in _SHAPES.items():
        shape = weights[key].shape if key in weights else None
        if shape is None or len(shape) != rank:
            missing.append(f"{key} is missing" if shape is None else f"{key} has shape {list(shape)}, expected {rank} axes")
        else:
            dims[name] = shape[axis]
    for name, key in _HEADS.items():
        if key in settings:
            dims[name] = int(settings[key].read())
        else:
            missing.append(f"{key} is missing")
    for name, part in _LAYERS.items():
        dims[name] = len({found[1] for key in weights if (found := re.match(rf"{part}/layer_(\d+)/", key))})
        if not dims[name]:
            missing.append(f"{part}/layer_0 is missing")
    if missing:
        told = dict.fromkeys([*faults, *missing])  # one tensor tells several dimensions
        raise InputError(f"{file}: the dimensions cannot be told: {'; '.join(told)}")
    return dims


def _wrong_settings(settings: Mapping[str, Weight]) -> list[str]:
    faults = [f"{name} is missing" for name in _REQUIRED if name not in settings]
    for name, expected in {**_REQUIRED, **_OPTIONAL}.items():
        if name in settings and (value := settings[name].read().item()) != expected:
            faults.append(f"{name} {value} cannot be expressed, expected {expected}")
    known = {*_REQUIRED, *_OPTIONAL, *_UNUSED, *_HEADS.values()}
    return faults + [f"{name} is unknown" for name in sorted(settings.keys() - known)]


def _without_projection(weights: Mapping[str, Weight], file: Path) -> dict[str, Weight]:
    """Leaves out the output projection, nearly always an alias of the embedding that it is tied to."""
    projection, embedding = weights.get(PROJECTION), weights.get(EMBEDDING)
    if projection is not None and projection != embedding and not np.array_equal(projection.read(), embedding.read()):
        raise InputError(f"{file}: {PROJECTION} differs from {EMBEDDING}, expected the same: Whisper's are tied")
    return {name: weight for name, weight in weights.items() if name != PROJECTION}


def _split(weights: Mapping[str, Weight], width: int) -> dict[str, Weight]:
    """The parts of stacked weights. The last part has all the rest, so that a wrong number of rows is told."""
    found = {}
    for name, weight in weights.items():
        parts = next((parts for place, parts in _STACKED.items() if place in name), ())
        if not parts:
            found[name] = weight
        for index, part in enumerate(parts):
            begin = min(index * width, weight.shape[0])
            end = weight.shape[0] if part == parts[-1] else min(begin + width, weight.shape[0])
            layer, kind = name.rsplit("/", 1)
            found[f"{layer}[{part}]/{kind}"] = ctranslate2.Rows(weight.dtype, (end - begin, *weight.shape[1:]), weight, begin)
    return found


def _without_key_bias(weights: Mapping[str, Weight]) -> tuple[dict[str, Weight], list[str]]:
    biases = [name for name in weights if name.endswith("[key]/bias")]
    faults = [f"{name} has numbers that are not zero, which cannot be expressed" for name in biases if weights[name].read().any()]
    return {name: weight for name, weight in weights.items() if name not in biases}, faults


# ---------------------------------------------------------------------------------------------------------------------
# Table
# ---------------------------------------------------------------------------------------------------------------------

_SELF = ("linear_0[query]", "linear_0[key]", "linear_0[value]", "linear_1")
_CROSS = ("linear_0", "linear_1[key]", "linear_1[value]", "linear_2")


def table(config: WhisperConfig) -> list[Row]:
    """The parts of a ``WhisperSpec``, whose output projection is the token embedding."""
    encoder_head, decoder_head = head_dims(config)
    layer, blocks = "decoder/layer_{i}", ("decoder", "blocks")
    return [
        *_spelled(conv_rows("encoder/conv1", ("encoder", "conv1"))),
        *_spelled(conv_rows("encoder/conv2", ("encoder", "conv2"))),
        Row("encoder/position_encodings/encodings", ("encoder", "positions"), SAME),
        *_blocks("encoder/layer_{i}", ("encoder", "blocks"), encoder_head),
        *_norm("encoder/layer_norm", ("encoder", "norm")),
        Row(EMBEDDING, ("decoder", "token_embedding"), SAME),
        Row("decoder/position_encodings/encodings", ("decoder", "positions"), SAME),
        *_blocks(layer, blocks, decoder_head),
        *_norm(f"{layer}/attention/layer_norm", (*blocks, "cross_attention_norm")),
        *_spelled(attention_rows(f"{layer}/attention", (*blocks, "cross_attention"), decoder_head, _CROSS)),
        *_norm("decoder/layer_norm", ("decoder", "norm")),
    ]


def _blocks(source: str, target: Target, head_dim: int) -> list[Row]:
    return [
        *_norm(f"{source}/self_attention/layer_norm", (*target, "attention_norm")),
        *_spelled(attention_rows(f"{source}/self_attention", (*target, "attention"), head_dim, _SELF)),
        *_norm(f"{source}/ffn/layer_norm", (*target, "mlp_norm")),
        *_spelled(linear_rows(f"{source}/ffn/linear_0", (*target, "mlp"), "up", "up_bias")),
        *_spelled(linear_rows(f"{source}/ffn/linear_1", (*target, "mlp"), "down", "down_bias")),
    ]


def _norm(source: str, target: Target) -> list[Row]:
    gamma, beta = norm_rows(source, target)
    return [dataclasses.replace(gamma, source=f"{source}/gamma"), dataclasses.replace(beta, source=f"{source}/beta")]


def _spelled(rows: Iterable[Row]) -> list[Row]:
    """Rows of the tables that PyTorch's formats share, with CTranslate2's stroke between names."""
    return [dataclasses.replace(row, source=row.source.replace(".", "/")) for row in rows]
