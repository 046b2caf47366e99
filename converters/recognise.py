"""What a folder or file holds, told from its contents and never from its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from converters import ctranslate2, gguf_files, safetensors_files, torch_files, whisper_ctranslate2
from converters.llama import ARCHITECTURES
from converters.sources import is_file
from ichigo_jax.errors import InputError
from ichigo_jax.storage import read_json

Format = Literal["model folder", "training run", "hf", "peft", "openai", "ctranslate2", "gguf", "whisperspeech", "ichigo"]
HF_KINDS = {**dict.fromkeys(ARCHITECTURES, "language_model"), "whisper": "whisper"}


@dataclasses.dataclass(frozen=True)
class Recognised:
    """Attributes:

    path: the folder or file.
    format: "model folder" (ours), "training run" (the workdir of one), "hf" (a Hugging Face folder), "peft" (an adapter of
      one), "ctranslate2" (a faster-whisper folder), "gguf" (a file), or whose PyTorch file it is.
    kind: which model, as a model folder's ``config.json`` calls it.
    contents: of a PyTorch file.
    """

    path: Path
    format: Format
    kind: str
    contents: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)


def recognise(path: Path) -> Recognised:
    """Tells what ``path`` holds.

    Raises:
      InputError: nothing there, or nothing that is known.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    return _folder(path) if path.is_dir() else _file(path)


def _folder(path: Path) -> Recognised:
    if is_file(path / "adapter_config.json"):  # trainers put the base's config.json beside it
        return Recognised(path, "peft", "language_model")
    settings = path / "config.json"
    values = read_json(settings) if is_file(settings) else {}
    values = values if isinstance(values, dict) else {}
    if isinstance(values.get("kind"), str):
        return Recognised(path, "model folder", values["kind"])
    if {"task", "train", "output"} <= values.keys():
        return Recognised(path, "training run", values["task"])
    model_type = values.get("model_type")
    kind = HF_KINDS.get(model_type) if isinstance(model_type, str) else None
    if kind is not None and any(is_file(path / name) for name in (safetensors_files.SINGLE, safetensors_files.INDEX)):
        return Recognised(path, "hf", kind)
    # The config.json of other formats may be a copy of Hugging Face's.
    if ctranslate2.holds_model(path):
        return _ctranslate2(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise InputError(f"{path}: {len(files)} GGUF files found ({names}), expected one; name the one that is meant")
    if files:
        return _file(files[0])
    if kind is not None:
        return Recognised(path, "hf", kind)
    if not is_file(settings):
        raise InputError(
            f"{path}: no config.json in it, expected a Hugging Face folder, a model folder, a faster-whisper folder "
            "or a folder with one GGUF file"
        )
    raise InputError(
        f"{path}: config.json with model_type {model_type!r} found, expected a model folder (kind) "
        f"or model_type {' or '.join(map(repr, HF_KINDS))}"
    )


def _ctranslate2(path: Path) -> Recognised:
    spec, _ = ctranslate2.read_spec(path)
    if spec != whisper_ctranslate2.SPEC:
        raise InputError(f"{path}: CTranslate2's {spec} found, expected {whisper_ctranslate2.SPEC}: no other model is read")
    return Recognised(path, "ctranslate2", "whisper")


def _file(path: Path) -> Recognised:
    if gguf_files.is_gguf(path):
        return Recognised(path, "gguf", "language_model")
    contents = torch_files.load(path)
    if {"dims", "model_state_dict"} <= contents.keys():
        return Recognised(path, "openai", "whisper", contents)
    state_dict = contents.get("state_dict")
    if isinstance(state_dict, Mapping) and state_dict:
        if all(isinstance(key, str) and key.startswith("model.") for key in state_dict):
            return Recognised(path, "ichigo", "speech_tokenizer", contents)
        if "config" in contents:
            return Recognised(path, "whisperspeech", "speech_tokenizer", contents)
    raise InputError(
        f"{path}: a PyTorch file with {', '.join(map(str, contents)) or 'nothing'} found, expected OpenAI's Whisper (dims, "
        "model_state_dict), WhisperSpeech (config, state_dict) or Ichigo (state_dict with keys that begin with model.)"
    )
