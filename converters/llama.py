"""Llama 3.x and Qwen2.5: the Hugging Face ``config.json`` and the weight table, each in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.engine import LAYER, SAME, TRANSPOSED, Row, head_bias, heads_in, heads_out
from ichigo_jax import configuration
from ichigo_jax.errors import InputError
from ichigo_jax.models.llama import LanguageModelConfig, LlamaConfig

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
HEADLESS = {"llama": "LlamaModel", "qwen2": "Qwen2Model"}  # what the model without its head saves itself as
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# ---------------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------------

_COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)

# Fields of the format that the model here has no counterpart of, and the only values that change nothing.
_MUST_BE = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
}

_LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def config_from_hf(values: Mapping[str, Any], where: str) -> LlamaConfig:
    """The network that a Hugging Face ``config.json`` describes.

    Args:
      values: the file's contents, as transformers 4 (``rope_theta``, ``rope_scaling``) or 5 (``rope_parameters``) writes it.
      where: the file's name for errors.

    Raises:
      InputError: another architecture, missing fields, and everything that the model here cannot express, by name.
    """
    model_type = values.get("model_type")
    architectures = values.get("architectures") or [ARCHITECTURES.get(model_type)]
    if model_type not in ARCHITECTURES or architectures not in ([ARCHITECTURES[model_type]], [HEADLESS[model_type]]):
        known = " or ".join(f"{name} ({architecture})" for name, architecture in ARCHITECTURES.items())
        raise InputError(f"{where}: model_type {model_type!r} with architectures {architectures} found, expected {known}")

    faults = [f"{name} is missing" for name in _COPIED if values.get(name) is None]
    for name, allowed in _MUST_BE.items():
        if name in values and values[name] not in allowed:
            if name == "quantization_config":
                faults.append(f"{name} {values[name]!r} found; quantised weights cannot be expressed, take those from before")
                continue
            faults.append(f"{name} {values[name]!r} cannot be expressed, expected {' or '.join(map(repr, allowed))}")
    if model_type == "llama" and values.get("attention_bias"):
        faults.append("attention_bias True puts a bias on the attention's output too, which cannot be expressed")
    if set(values.get("layer_types") or []) - {"full_attention"}:
        faults.append(f"layer_types {sorted(set(values['layer_types']))} cannot be expressed, expected full_attention only")
    theta, scaling, rope_faults = _rope_from_hf(values)
    if faults or rope_faults:
        raise InputError(f"{where}: {'; '.join(faults + rope_faults)}")

    heads = values["num_attention_heads"]
    fields = {name: values[name] for name in _COPIED}
    # The format lets these be absent or null and says what that means.
    fields["num_key_value_heads"] = heads if values.get("num_key_value_heads") is None else values["num_key_value_heads"]
    fields["head_dim"] = values.get("head_dim") or (values["hidden_size"] // heads if isinstance(heads, int) and heads else 0)
    fields["tie_word_embeddings"] = False if values.get("tie_word_embeddings") is None else values["tie_word_embeddings"]
    fields["initializer_range"] = values.get("initializer_range", 0.02)
    fields |= {"rope_theta": theta, "rope_scaling": scaling}
    fields |= {"architecture": model_type, "attention_bias": model_type == "qwen2"}
    return configuration.from_dict(LlamaConfig, fields, where)


def unread_rope(values: Mapping[str, Any]) -> str | None:
    """Says which rotary setting of a ``config.json`` is not read because another spelling of it is; None where they agree."""
    old, new = values.get("rope_scaling"), values.get("rope_parameters")
    if old and new and _rope_from_hf({**values, "rope_parameters": None}) != _rope_from_hf({**values, "rope_scaling": None}):
        return f"rope_scaling {old} and rope_parameters {new} differ; rope_scaling is read, as transformers does"
    theta, read = values.get("rope_theta"), _rope_from_hf(values)[0]
    if theta is not None and theta != read:
        group = "rope_scaling" if old else "rope_parameters"
        return f"rope_theta {theta} and that of {group}, {read}, differ; {group} is read, as transformers does"
    return None


def _rope_from_hf(values: Mapping[str, Any]) -> tuple[float | None, dict[str, Any] | None, list[str]]:
    """``rope_theta``, the scaling's fields or None, and what is wrong. The older spelling goes first, as in transformers."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        return None, None, [f"rope_scaling {rope!r} found, expected a group of fields"]
    rope = dict(rope)
    theta = rope.pop("rope_theta", values.get("rope_theta"))
    rope_type = rope.pop("rope_type", rope.get("type", "default"))
    rope.pop("type", None)
    faults = [] if theta is not None else ["rope_theta is missing"]
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        faults.append("partial_rotary_factor other than 1.0 cannot be expressed")
    expected = {"default": (), "llama3": _LLAMA3_SCALING}.get(rope_type)
    if expected is None:
        return theta, None, [*faults, f"rotary scaling {rope_type!r} cannot be expressed, expected 'default' or 'llama3'"]
    faults += [f"{name} of rotary scaling {rope_type!r} is missing" for name in expected if name not in rope]
    faults += [f"{name} of rotary scaling {rope_type!r} cannot be expressed" for name in rope if name not in expected]
    return theta, rope if expected else None, faults


def config_to_hf(config: LanguageModelConfig, dtype: str, special_ids: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of an export.

    Rotary settings are spelled as transformers 4 did (``rope_theta``, ``rope_scaling``): transformers 5, vLLM and llama.cpp
    read that as well, while older readers do not know ``rope_parameters``.

    Args:
      config: the model.
      dtype: of the weights, e.g. ``"bfloat16"``.
      special_ids: ``bos_token_id`` and the like.
    """
    llama = config.llama
    values = {
        "architectures": [ARCHITECTURES[llama.architecture]],
        "model_type": llama.architecture,
        "torch_dtype": dtype,
        **{name: getattr(llama, name) for name in _COPIED},
        "num_key_value_heads": llama.num_key_value_heads,
        "head_dim": llama.head_dim,
        "hidden_act": "silu",
        "rope_theta": llama.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": llama.tie_word_embeddings,
        "initializer_range": llama.initializer_range,
        "attention_dropout": 0.0,
        "use_cache": True,
        **special_ids,
    }
    if llama.rope_scaling is not None:
        values["rope_scaling"] = {"rope_type": "llama3", **configuration.to_dict(llama.rope_scaling)}
    if llama.architecture == "llama":
        values |= {"attention_bias": False, "mlp_bias": False}
    else:
        values["use_sliding_window"] = False
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def keys(config: LanguageModelConfig) -> set[str]:
    """Every Hugging Face key of the model."""
    layers = range(config.llama.num_hidden_layers)
    return {row.source.replace(LAYER, str(layer)) for row in table(config) for layer in layers}


def table(config: LanguageModelConfig) -> list[Row]:
    """Hugging Face keys and ours."""
    llama = config.llama
    rows = [
        Row(EMBEDDING, ("embedding",), SAME, llama.vocab_size),
        Row("model.norm.weight", ("norm", "scale"), SAME),
        Row("model.layers.{i}.input_layernorm.weight", ("layers", "attention_norm", "scale"), SAME),
        Row("model.layers.{i}.self_attn.q_proj.weight", ("layers", "attention", "q"), heads_out(llama.head_dim)),
        Row("model.layers.{i}.self_attn.k_proj.weight", ("layers", "attention", "k"), heads_out(llama.head_dim)),
        Row("model.layers.{i}.self_attn.v_proj.weight", ("layers", "attention", "v"), heads_out(llama.head_dim)),
        Row("model.layers.{i}.self_attn.o_proj.weight", ("layers", "attention", "o"), heads_in(llama.head_dim)),
        Row("model.layers.{i}.post_attention_layernorm.weight", ("layers", "feed_forward_norm", "scale"), SAME),
        Row("model.layers.{i}.mlp.gate_proj.weight", ("layers", "feed_forward", "gate"), TRANSPOSED),
        Row("model.layers.{i}.mlp.up_proj.weight", ("layers", "feed_forward", "up"), TRANSPOSED),
        Row("model.layers.{i}.mlp.down_proj.weight", ("layers", "feed_forward", "down"), TRANSPOSED),
    ]
    if llama.attention_bias:
        rows += [
            Row("model.layers.{i}.self_attn.q_proj.bias", ("layers", "attention", "q_bias"), head_bias(llama.head_dim)),
            Row("model.layers.{i}.self_attn.k_proj.bias", ("layers", "attention", "k_bias"), head_bias(llama.head_dim)),
            Row("model.layers.{i}.self_attn.v_proj.bias", ("layers", "attention", "v_bias"), head_bias(llama.head_dim)),
        ]
    if not llama.tie_word_embeddings:
        rows.append(Row(HEAD, ("lm_head",), TRANSPOSED, llama.vocab_size))
    return rows
