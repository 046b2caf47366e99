"""The settings of a Hugging Face Whisper folder: ``config.json`` and its companions, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters import safetensors_files, whisper_text
from converters.safetensors_files import Tensor
from converters.sources import read_object
from ichigo_jax.audio.decode import SAMPLE_RATE
from ichigo_jax.audio.log_mel import HOP, WINDOW
from ichigo_jax.errors import InputError
from ichigo_jax.models.whisper import MLP_MULT, WhisperConfig
from ichigo_jax.storage import write_json
from ichigo_jax.text.whisper import LANGUAGE, NO_TIMESTAMPS, TRANSCRIBE, TRANSLATE, WhisperText

ARCHITECTURE = "WhisperForConditionalGeneration"
COMPANIONS = ("generation_config.json", "preprocessor_config.json")
STATES_PER_SECOND = 50
TIED_COPY, EMBEDDING = "proj_out.weight", "model.decoder.embed_tokens.weight"

_DIMS = {
    "n_mels": "num_mel_bins",
    "n_audio_ctx": "max_source_positions",
    "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads",
    "n_audio_layer": "encoder_layers",
    "n_vocab": "vocab_size",
    "n_text_ctx": "max_target_positions",
    "n_text_state": "d_model",
    "n_text_head": "decoder_attention_heads",
    "n_text_layer": "decoder_layers",
}

# Fields that the model here has no counterpart of, and the only values that change nothing.
_MUST_BE = {
    "activation_function": "gelu",
    "scale_embedding": False,
    "tie_word_embeddings": True,
    "quantization_config": None,
}

# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def dims(folder: Path) -> dict[str, Any]:
    """OpenAI's dimensions of a folder.

    Raises:
      InputError: another architecture, missing fields, and everything that the model here cannot express, by name.
    """
    file = folder / "config.json"
    values = read_object(file)
    if values.get("architectures") not in (None, [ARCHITECTURE]):
        raise InputError(f"{file}: architectures {values['architectures']} found, expected [{ARCHITECTURE!r}]")
    faults = [f"{name} is missing" for name in sorted(set(_DIMS.values())) if values.get(name) is None]
    must_be: dict[str, Any] = dict(_MUST_BE)
    if type(values.get("d_model")) is int:
        must_be |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), MLP_MULT * values["d_model"])
    for name, expected in must_be.items():
        if name in values and values[name] != expected:
            faults.append(f"{name} {values[name]!r} cannot be expressed, expected {expected!r}")
    if faults:
        raise InputError(f"{file}: {'; '.join(faults)}")
    return {ours: values[theirs] for ours, theirs in _DIMS.items()}


def read_weights(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a folder without the output projection, which some hold beside the embedding that it is; what to say.

    Raises:
      InputError: weights that are broken; a projection of its own, which the model here cannot express.
    """
    tensors = safetensors_files.read_folder(folder, lambda key: key == TIED_COPY)
    copy = tensors.pop(TIED_COPY, None)
    if copy is None:
        return tensors, []
    if EMBEDDING not in tensors:
        return tensors | {EMBEDDING: copy}, [f"{TIED_COPY} alone is stored; it is the embedding as well"]
    if not safetensors_files.same_values(copy, tensors[EMBEDDING], None):
        raise InputError(
            f"{folder}: {TIED_COPY} differs from {EMBEDDING}, expected the same: Whisper's are tied; if it is out of date, "
            "remove it from the weights"
        )
    return tensors, [f"left out: {TIED_COPY}, which is stored as well and equals the embedding that it is tied to"]


def section(folder: Path) -> dict[str, Any]:
    """What ``foreign.json`` keeps of a folder: its settings as they are."""
    names = ["config.json", *(name for name in COMPANIONS if (folder / name).exists())]
    return {"format": "hf", "files": {name: read_object(folder / name) for name in names}}


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write_settings(folder: Path, config: WhisperConfig, kept: Mapping[str, Any], dtype: str) -> None:
    """Writes the settings of an export: those that the import found, else new ones.

    Args:
      folder: has the text tokenizer's files already, where there is one.
      config: its numbers.
      kept: the section of ``foreign.json``.
      dtype: of the weights.
    """
    files = kept.get("files", {})
    text = WhisperText.from_folder(folder) if (folder / "tokenizer.json").exists() else None
    settings = files.get("config.json") or _new_config(text)
    numbers = {theirs: getattr(config, ours) for ours, theirs in _DIMS.items()}
    numbers |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), MLP_MULT * config.n_audio_state)
    numbers["dtype" if "dtype" in settings else "torch_dtype"] = dtype
    write_json(folder / "config.json", settings | numbers)
    written = {"preprocessor_config.json": _new_preprocessor(config)}
    if text is not None:
        written["generation_config.json"] = _new_generation(config, text, whisper_text.special_ids(folder))
    for name, values in {**written, **files}.items():
        if name in COMPANIONS:
            write_json(folder / name, values)


def _special(text: WhisperText | None) -> dict[str, Any]:
    start, end = (None, None) if text is None else (text.start, text.end)
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}


def _new_config(text: WhisperText | None) -> dict[str, Any]:
    return {
        "model_type": "whisper",
        "architectures": [ARCHITECTURE],
        "is_encoder_decoder": True,
        **_MUST_BE,
        **_special(text),
        # transformers' defaults for these are ids of the released English-only models
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }


def _new_generation(config: WhisperConfig, text: WhisperText, ids: Mapping[str, int]) -> dict[str, Any]:
    values = {**_special(text), "max_length": config.n_text_ctx, "is_multilingual": bool(text.languages)}
    if NO_TIMESTAMPS in ids:
        values["no_timestamps_token_id"] = ids[NO_TIMESTAMPS]
    if text.languages:
        values["task_to_id"] = {name.strip("<|>"): ids[name] for name in (TRANSCRIBE, TRANSLATE) if name in ids}
        values["lang_to_id"] = {LANGUAGE.format(name): index for name, index in text.languages.items()}
    return values


def _new_preprocessor(config: WhisperConfig) -> dict[str, Any]:
    seconds = config.n_audio_ctx // STATES_PER_SECOND
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": config.n_mels,
        "sampling_rate": SAMPLE_RATE,
        "hop_length": HOP,
        "n_fft": WINDOW,
        "chunk_length": seconds,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }
