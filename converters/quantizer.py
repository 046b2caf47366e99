"""The quantiser of WhisperSpeech and Ichigo: what its files say of themselves, its weight table, its bookkeeping tensors."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from converters.engine import ONE, SAME, TRANSPOSED, Row, TensorInfo
from converters.whisper_weights import conv_rows, norm_rows, openai_blocks, openai_mlp
from ichigo_jax import configuration
from ichigo_jax.errors import InputError
from ichigo_jax.models.quantizer import QuantizerConfig, inverse_frequencies

USAGE = "_codebook_usage"  # how often each code occurred in the last batch of a training; Ichigo only
MERGED_ROWS, MERGED_MASK = 2561, 2048  # the 2560-code model: 2048 and their mask, then 512

# What no file says and every released model has.
FAMILY = {
    "head_width": 64,
    "fsq_levels": None,
    "downsample": 2,
    "downsampling": "mean",
    "codebook_decay": 0.9,
    "threshold_ema_dead_code": 0.0,
    "laplace_eps": 1e-5,
    "commitment_weight": 1.0,
    "statistics_over": "all_frames",
    "query_mult": 2.0,
    "rope_base": 10_000.0,
    "layer_norm_eps": 1e-5,
    "init_std": 1.5,
    "embeddings_std": 0.045,
}
# Of these, what the originals have written into their code: a model that differs cannot be handed back.
HARD_CODED = {"positions": 1500, **{name: FAMILY[name] for name in ("fsq_levels", "rope_base", "layer_norm_eps")}}

# Settings of Ichigo's own configuration, and of WhisperSpeech, that are named as here.
WHISPERSPEECH_CONFIG = ("codebook_dim", "vq_codes", "n_head", "head_width", "ffn_mult", "depth", "downsample")
ICHIGO_SETTINGS = (
    *("n_head", "head_width", "ffn_mult", "depth", "downsample", "vq_codes", "mask_code", "num_quantizers", "codebook_dim"),
    *("codebook_decay", "commitment_weight", "threshold_ema_dead_code", "query_mult", "rope"),
)
WHISPERSPEECH_TUNABLES = ("init_std", "embeddings_std", "query_mult", "rope", "codebook_decay")
# WhisperSpeech reads files from before these settings existed with these values (``Tunables.upgrade``, and the model's own).
WHISPERSPEECH_OLD_TUNABLES = {
    "query_mult": 1,
    "rope": False,
    "mask_embs": False,
    "downsample_conv": False,
    "downsample_mean": False,
}
WHISPERSPEECH_OLD_CONFIG = {"head_width": 64, "ffn_mult": 4, "downsample": 1, "use_cosine_sim": False}

# ---------------------------------------------------------------------------------------------------------------------
# What a file says
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Inferred:
    """A quantiser's config and, for each field, where its value comes from."""

    config: QuantizerConfig
    origins: Mapping[str, str]


def infer(tensors: Mapping[str, TensorInfo], written: Mapping[str, Any], given: Mapping[str, Any], where: str) -> Inferred:
    """The config of a quantiser: what the user gives goes before what the file says, that before the shapes.

    Args:
      tensors: of the file.
      written: what the file says, under our names.
      given: what the user says, under our names.
      where: the file's name for errors.

    Raises:
      InputError: no quantiser, or values that make none.
    """
    values, origins = {}, {}
    sources = [
        (FAMILY, "as in all released models"),
        (_from_shapes(tensors, where), "from the shapes"),
        (written, "from the file"),
        (given, "given"),
    ]
    for source, origin in sources:
        values |= source
        origins |= dict.fromkeys(source, origin)
    if type(values["head_width"]) is int and values["head_width"] > 0:
        values.setdefault("n_head", tensors["positional_embedding.weight"].shape[1] // values["head_width"])
    rows = tensors["rq.layers.0._codebook.embed"].shape[1]
    values.setdefault("vq_codes", rows - (values["mask_code"] is not None))
    for name in ("n_head", "vq_codes"):
        origins.setdefault(name, "from the shapes")
    sizes = {name: value for name, value in values.items() if type(value) is int and name != "mask_code"}
    wrong = [f"{name} {value}" for name, value in sizes.items() if value < 1]
    if wrong:
        raise InputError(f"{where}: {', '.join(wrong)} found, expected positive numbers")
    fields = [field.name for field in dataclasses.fields(QuantizerConfig)]
    config = configuration.from_dict(QuantizerConfig, values, where)
    return Inferred(config, {name: origins[name] for name in fields})


def _from_shapes(tensors: Mapping[str, TensorInfo], where: str) -> dict[str, Any]:
    needed = {"positional_embedding.weight": 2, "mlp.0.weight": 2, "rq.layers.0._codebook.embed": 3}
    wrong = [name for name, axes in needed.items() if name not in tensors or len(tensors[name].shape) != axes]
    if wrong:
        raise InputError(f"{where}: no quantiser found: {', '.join(wrong)} missing or of another number of axes")
    positions, width = tensors["positional_embedding.weight"].shape
    _, rows, codebook_dim = tensors["rq.layers.0._codebook.embed"].shape
    rotary = tensors.get("_out_blocks.0.attn.rotary.inv_freq")
    values = {
        "positions": positions,
        "ffn_mult": tensors["mlp.0.weight"].shape[0] // max(width, 1),
        "depth": _count(tensors, "_out_blocks.{}.attn_ln.weight"),
        "num_quantizers": _count(tensors, "rq.layers.{}._codebook.embed"),
        "codebook_dim": codebook_dim,
        "mask_code": _mask_code(rows),
        "rope": rotary is not None,
    }
    if rotary is not None:
        values["head_width"] = 2 * rotary.shape[-1]
    if "downsample_conv.weight" in tensors:
        values["downsampling"] = "conv"
    return values


def _mask_code(rows: int) -> int | None:
    """Codes come in powers of two, so one row more is the mask, the last; but not that of the merged model."""
    if rows == MERGED_ROWS:
        return MERGED_MASK
    return None if rows & (rows - 1) == 0 else rows - 1


def _count(tensors: Mapping[str, TensorInfo], pattern: str) -> int:
    count = 0
    while pattern.format(count) in tensors:
        count += 1
    return count


def written_by_whisperspeech(contents: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of a ``.model`` file under our names.

    Raises:
      InputError: a file without them, or of a kind of quantiser that the model here is not.
    """
    if not isinstance(contents["config"], Mapping) or not isinstance(contents.get("tunables", {}), Mapping):
        raise InputError(f"{where}: expected dictionaries config and tunables")
    config = WHISPERSPEECH_OLD_CONFIG | dict(contents["config"])
    tunables = WHISPERSPEECH_OLD_TUNABLES | dict(contents.get("tunables", {}))
    if not config["use_cosine_sim"]:
        raise InputError(f"{where}: use_cosine_sim False found, expected True: Euclidean codebooks cannot be expressed")
    values = {name: config[name] for name in WHISPERSPEECH_CONFIG if name in config}
    values |= {name: tunables[name] for name in WHISPERSPEECH_TUNABLES if name in tunables}
    values["downsampling"] = _downsampling(tunables)
    if not tunables["mask_embs"]:
        values["mask_code"] = None
    elif "vq_codes" in values:
        values["mask_code"] = values["vq_codes"]
    return values


def written_by_ichigo(contents: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of an Ichigo checkpoint under our names. Released ones have none; those exported here do.

    Raises:
      InputError: a kind of quantiser that the model here is not.
    """
    config = contents.get("config")
    settings = config.get("quantizer") if isinstance(config, Mapping) else None
    if not isinstance(settings, Mapping):
        return {}
    if not settings.get("use_cosine_sim", True):
        raise InputError(f"{where}: use_cosine_sim False found, expected True: Euclidean codebooks cannot be expressed")
    values = {name: settings[name] for name in ICHIGO_SETTINGS if name in settings}
    if "downsample_mean" in settings:
        values["downsampling"] = _downsampling(settings)
    if not settings.get("mask_embs", True):
        values["mask_code"] = None
    return values


def _downsampling(settings: Mapping[str, Any]) -> str:
    return "conv" if settings.get("downsample_conv") else "mean" if settings.get("downsample_mean") else "stride"


def parse_given(assignments: Sequence[str]) -> dict[str, Any]:
    """``--set`` flags: ``["downsample=4", "mask_code=None"]`` -> ``{"downsample": 4, "mask_code": None}``.

    Raises:
      InputError: something else than a field and its value.
    """
    fields = [field.name for field in dataclasses.fields(QuantizerConfig)]
    values = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in fields:
            raise InputError(f"--set {assignment} found, expected FIELD=VALUE with a field of {', '.join(fields)}")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def table(config: QuantizerConfig) -> list[Row]:
    """The originals' keys, without the prefix of a Lightning checkpoint, and ours."""
    layer, codebook = "rq.layers.{i}", ("vq", "codebook")
    rows = [
        *norm_rows("mlp_ln", ("mlp_norm",)),
        *openai_mlp("mlp", ("mlp",)),
        Row(f"{layer}.project_in.weight", ("vq", "project_in"), TRANSPOSED),
        Row(f"{layer}.project_in.bias", ("vq", "project_in_bias"), SAME),
        Row(f"{layer}.project_out.weight", ("vq", "project_out"), TRANSPOSED),
        Row(f"{layer}.project_out.bias", ("vq", "project_out_bias"), SAME),
        *(Row(f"{layer}._codebook.{name}", (*codebook, name), ONE) for name in ("embed", "cluster_size", "embed_avg", "initted")),
        Row("positional_embedding.weight", ("positions",), SAME),
        *openai_blocks("_out_blocks", ("blocks",), config.head_width),
        *norm_rows("ln_post", ("norm",)),
    ]
    if config.downsampling == "conv":
        rows += conv_rows("downsample_conv", ("downsample_conv",))
    return rows


def bookkeeping(config: QuantizerConfig, format: str) -> dict[str, np.ndarray]:
    """The tensors that a file has beside its weights, as in a new model: rotary frequencies and counters of its training."""
    tensors = {"val_true": np.zeros(1, np.float32), "val_total": np.zeros(1, np.float32)}
    if format == "ichigo":
        tensors[USAGE] = np.zeros(config.codes, np.float32)
    if config.rope:
        frequencies = inverse_frequencies(config)
        tensors |= {f"_out_blocks.{layer}.attn.rotary.inv_freq": frequencies for layer in range(config.depth)}
    return tensors


def check_rotary(config: QuantizerConfig, found: Mapping[str, np.ndarray], where: str) -> None:
    """Whether the rotary frequencies of a file are those of the config, which the model here computes for itself.

    Raises:
      InputError: others, of another base.
    """
    expected = inverse_frequencies(config)
    for name, value in found.items():
        # Half precision keeps three digits; the base of another model differs by more.
        if name.endswith("rotary.inv_freq") and not np.allclose(value.astype(np.float32), expected, rtol=2e-3, atol=1e-7):
            raise InputError(f"{where}: {name} is not of the base {config.rope_base}; give the base with --set rope_base=VALUE")


# ---------------------------------------------------------------------------------------------------------------------
# Settings of an export
# ---------------------------------------------------------------------------------------------------------------------


def ichigo_settings(config: QuantizerConfig) -> dict[str, Any]:
    """The section ``quantizer`` of ichigo's own configuration, which ``ichigo.asr.arch.quantizer.Quantizer`` takes."""
    return {
        **{name: getattr(config, name) for name in ICHIGO_SETTINGS},
        **_mask_and_downsampling(config),
        "q_depth": config.num_quantizers,
        "use_cosine_sim": True,
        "no_quantize": False,
    }


def whisperspeech_settings(config: QuantizerConfig, whisper_name: str, kept: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` and ``tunables`` of a ``.model`` file: as an import found them where they still hold, else new ones."""
    model = {name: getattr(config, name) for name in WHISPERSPEECH_CONFIG} | {"use_cosine_sim": True}
    tunables = {name: getattr(config, name) for name in WHISPERSPEECH_TUNABLES}
    tunables |= _mask_and_downsampling(config)
    if "config" not in kept:
        new = {"q_depth": config.num_quantizers, "whisper_model_name": whisper_name}
        return {"config": {**model, **new}, "tunables": tunables}
    settings = {"config": kept["config"] | _changed(model, WHISPERSPEECH_OLD_CONFIG | kept["config"])}
    old = kept.get("tunables", {})
    changed = _changed(tunables, FAMILY | WHISPERSPEECH_OLD_TUNABLES | old)
    if "tunables" in kept or changed:
        settings["tunables"] = old | changed
    return settings


def _mask_and_downsampling(config: QuantizerConfig) -> dict[str, bool]:
    return {
        "mask_embs": config.mask_code is not None,
        "downsample_conv": config.downsampling == "conv",
        "downsample_mean": config.downsampling == "mean",
    }


def _changed(values: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if before.get(name) != value}
