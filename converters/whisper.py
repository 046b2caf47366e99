"""Whisper: OpenAI checkpoints and Hugging Face folders to model folders and back; faster-whisper folders to model folders."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict
from tqdm import tqdm

from converters import ctranslate2, engine, foreign, safetensors_files, torch_files, whisper_ctranslate2, whisper_hf, whisper_text
from converters.recognise import Recognised
from converters.sources import copy_files, is_file, sha256
from converters.whisper_weights import hf_table, openai_table
from ichigo_jax import configuration
from ichigo_jax.errors import InputError
from ichigo_jax.models.speech_tokenizer import SpeechTokenizerConfig
from ichigo_jax.models.whisper import Whisper, WhisperConfig
from ichigo_jax.storage import atomic_write
from ichigo_jax.storage.model_folder import TOKENIZER_FOLDER, load_arrays, load_config, save_model

KIND = "whisper"
EXPORTS = ("hf", "openai")
LAYER_NORM_EPS = 1e-5  # of both formats, which write it nowhere

# Width, encoder layers and decoder layers of the released models.
SIZES = {
    (384, 4, 4): "tiny",
    (512, 6, 6): "base",
    (768, 12, 12): "small",
    (1024, 24, 24): "medium",
    (1280, 32, 32): "large",
    (1280, 32, 4): "large-v3-turbo",
}

# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Source:
    """A Whisper in any format, checked but not yet read.

    Attributes:
      found: where it is.
      config: its numbers.
      infos: its tensors under the names of its format.
      read: its arrays in our layout, cast where a dtype is given (but for the encoder's fixed positions).
      files: what the provenance hashes.
      tokenizer: a folder with its text tokenizer's files, or None.
      section: what ``foreign.json`` keeps of it.
      notes: what the user should know of it.
      quantized: dtypes of integers among its weights, which are read as float32.
    """

    found: Recognised
    config: WhisperConfig
    infos: Mapping[Any, engine.TensorInfo]
    read: Callable[[np.dtype | None], dict[engine.Path, np.ndarray]]
    files: tuple[Path, ...]
    tokenizer: Path | None
    section: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    quantized: tuple[str, ...] = ()


def open_source(found: Recognised, keeps_dtypes: bool = True) -> Source:
    """Opens a Whisper, that inside a speech tokenizer's folder too.

    Args:
      found: where it is.
      keeps_dtypes: whether it will be read without a cast, see ``engine.check``.

    Raises:
      InputError: another model, or one that is broken; all faults of its weights at once.
    """
    if found.format == "model folder" and found.kind in (KIND, "speech_tokenizer"):
        return _open_model_folder(found)
    if found.kind != KIND:
        raise InputError(f"{found.path}: {found.kind} as {found.format} found, expected a Whisper in any format")
    if found.format == "openai":
        return _open_openai(found, keeps_dtypes)
    if found.format == "ctranslate2":
        return _open_ctranslate2(found, keeps_dtypes)
    return _open_hf(found, keeps_dtypes)


def _open_openai(found: Recognised, keeps_dtypes: bool) -> Source:
    where = str(found.path)
    dims = found.contents["dims"]
    if not isinstance(dims, Mapping):
        raise InputError(f"{where}: expected a dictionary dims, found {type(dims).__name__}")
    config = make_config(dims, f"{where}: dims")
    tensors = torch_files.tensors(found.contents["model_state_dict"], f"{where}: model_state_dict")
    read = _reader(openai_table(config), config, tensors, where, keeps_dtypes)
    return Source(found, config, tensors, read, (found.path,), None, {"format": "openai"})


def _open_hf(found: Recognised, keeps_dtypes: bool) -> Source:
    config = make_config(whisper_hf.dims(found.path), f"{found.path / 'config.json'}")
    tensors, notes = whisper_hf.read_weights(found.path)
    files = (found.path / "config.json", *sorted({tensor.file for tensor in tensors.values()}))
    read = _reader(hf_table(config), config, tensors, str(found.path), keeps_dtypes)
    text = found.path if is_file(found.path / "tokenizer.json") else None
    return Source(found, config, tensors, read, files, text, whisper_hf.section(found.path), tuple(notes))


def _open_ctranslate2(found: Recognised, keeps_dtypes: bool) -> Source:
    contents = whisper_ctranslate2.open_folder(found.path)
    file, settings = found.path / ctranslate2.FILE, found.path / "config.json"
    config = make_config(contents.dims, str(file))
    read = _reader(whisper_ctranslate2.table(config), config, contents.weights, str(file), keeps_dtypes, contents.faults)
    files = (file, settings) if is_file(settings) else (file,)
    text = found.path if is_file(found.path / "tokenizer.json") else None
    section = {"format": found.format, "settings": contents.settings}
    return Source(found, config, contents.weights, read, files, text, section, quantized=contents.quantized)


def _open_model_folder(found: Recognised) -> Source:
    arrays = load_arrays(found.path)
    if found.kind == KIND:
        config = load_config(found.path, KIND, WhisperConfig)
    else:
        config = load_config(found.path, found.kind, SpeechTokenizerConfig).whisper
        arrays = {path[1:]: array for path, array in arrays.items() if path[0] == KIND}
    engine.check_stored(arrays, engine.target_shapes(maker(config)), found.path)
    infos = {path: engine.TensorInfo(array.dtype, array.shape) for path, array in arrays.items()}
    uncast = engine.buffers(maker(config))

    def read(dtype: np.dtype | None) -> dict[engine.Path, np.ndarray]:
        return {path: x if dtype is None or path in uncast else x.astype(dtype) for path, x in arrays.items()}

    text = found.path / TOKENIZER_FOLDER
    section = foreign.read_sections(found.path).get("whisper", {})
    return Source(found, config, infos, read, (found.path / "config.json",), text if text.is_dir() else None, section)


def _reader(
    table: list[engine.Row],
    config: WhisperConfig,
    tensors: Mapping[str, Any],
    where: str,
    keeps_dtypes: bool,
    faults: Iterable[str] = (),
) -> Callable[[np.dtype | None], dict[engine.Path, np.ndarray]]:
    targets = engine.target_shapes(maker(config))
    pieces = engine.expand(table, targets)
    uncast = engine.buffers(maker(config))
    engine.check(pieces, tensors, where, keeps_dtypes=keeps_dtypes, uncast=uncast, faults=faults)

    def read(dtype: np.dtype | None) -> dict[engine.Path, np.ndarray]:
        bar = tqdm(pieces, desc="reading Whisper", unit="tensor", disable=None)
        return engine.assemble(engine.read_pieces(bar, lambda key: tensors[key].read(), dtype, where, uncast), targets)

    return read


def make_config(dims: Mapping[str, Any], where: str) -> WhisperConfig:
    """From OpenAI's dimensions.

    Raises:
      InputError: dimensions missing, unknown or not positive.
    """
    wrong = [f"{name} {value!r}" for name, value in dims.items() if type(value) is int and value < 1]
    if wrong:
        raise InputError(f"{where}: {', '.join(wrong)} found, expected positive numbers")
    return configuration.from_dict(WhisperConfig, {**dims, "layer_norm_eps": LAYER_NORM_EPS}, where)


def maker(config: WhisperConfig) -> Callable[[Any], Whisper]:
    return lambda rngs: Whisper(config, rngs)


# ---------------------------------------------------------------------------------------------------------------------
# Import
# ---------------------------------------------------------------------------------------------------------------------


def import_whisper(source: Source, target: Path, dtype: str | None, tokenizer: Path | None) -> list[str]:
    """Writes a model folder of kind "whisper", whole or not at all.

    Args:
      source: an OpenAI checkpoint, a Hugging Face folder or a faster-whisper folder.
      target: must not exist.
      dtype: "float32", "bfloat16", or None to keep each weight's own.
      tokenizer: a Hugging Face tokenizer folder to take instead of the source's.

    Returns:
      What the user should know.

    Raises:
      InputError: a text tokenizer that does not fit, or a target that exists.
    """
    with atomic_write(target) as partial, tempfile.TemporaryDirectory() as workspace:
        text, notes = text_tokenizer(source, tokenizer, Path(workspace))
        state = unflatten_dict(source.read(engine.IMPORT_DTYPES[dtype] if dtype else None))
        save_model(partial, KIND, source.config, state, provenance(source), text)
        foreign.write(partial, {"whisper": source.section}, {})
    if source.quantized and dtype is None:
        notes.append(f"{' and '.join(source.quantized)} weights written as float32; --dtype bfloat16 takes half of that")
    return [*source.notes, *notes]


def text_tokenizer(source: Source, given: Path | None, workspace: Path) -> tuple[Path | None, list[str]]:
    """The text tokenizer's folder: the one given, else the source's own, else one built from openai-whisper's assets.

    Args:
      source: the Whisper.
      given: of ``--tokenizer``.
      workspace: an empty folder to write it to.

    Returns:
      The folder, or None where there is none, and what the user should know of it.

    Raises:
      InputError: a given folder without a tokenizer, or one with more ids than the model.
    """
    origin = given or source.tokenizer
    if origin is not None:
        copy_files(whisper_text.FILES, origin, workspace)
        whisper_text.complete(workspace)
        whisper_text.check(workspace, source.config.n_vocab, origin)
        return workspace, [f"text tokenizer written: from {origin.name}"]
    missing = whisper_text.build(source.config.n_vocab, workspace)
    if missing is None:
        return workspace, ["text tokenizer written: built from openai-whisper's assets"]
    return None, [f"no text tokenizer written, so the model cannot transcribe: {missing}; give one with --tokenizer"]


def provenance(source: Source) -> dict[str, Any]:
    return {
        "source": source.found.path.resolve().name,
        "source_format": source.found.format,
        "source_sha256": {file.name: sha256(file) for file in source.files},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Export
# ---------------------------------------------------------------------------------------------------------------------


def export_whisper(found: Recognised, target: Path, format: str) -> None:
    """Writes the Whisper of a model folder as an OpenAI checkpoint (a file) or a Hugging Face folder.

    Args:
      found: a model folder of a Whisper or a speech tokenizer.
      target: must not exist.
      format: "openai" or "hf".

    Raises:
      InputError: a source that is broken, or an epsilon that the formats have no place for.
    """
    source = open_source(found)
    if source.config.layer_norm_eps != LAYER_NORM_EPS:
        raise InputError(
            f"{found.path}: layer_norm_eps {source.config.layer_norm_eps} found, expected {LAYER_NORM_EPS}: "
            f"the format {format} knows no other"
        )
    table = openai_table if format == "openai" else hf_table
    state = source.read(None)
    targets = engine.target_shapes(maker(source.config))
    pieces = {piece.source: piece for piece in engine.expand(table(source.config), targets)}
    with atomic_write(target) as partial:
        if format == "openai":
            dims = configuration.to_dict(source.config)
            del dims["layer_norm_eps"]
            weights = {key: engine.foreign_tensor(piece, state) for key, piece in pieces.items()}
            torch_files.save(partial, {"dims": dims, "model_state_dict": weights})
        else:
            partial.mkdir()
            infos = {key: engine.TensorInfo(state[piece.target].dtype, piece.shape) for key, piece in pieces.items()}
            read = lambda key: engine.foreign_tensor(pieces[key], state)  # noqa: E731
            safetensors_files.write_folder(partial, infos, read, safetensors_files.SHARD_BYTES)
            if source.tokenizer is not None:
                copy_files(whisper_text.FILES, source.tokenizer, partial)
            dtype = str(state["decoder", "token_embedding"].dtype)
            whisper_hf.write_settings(partial, source.config, source.section, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Inspect
# ---------------------------------------------------------------------------------------------------------------------


def describe(source: Source) -> dict[str, str]:
    """What ``inspect`` prints of a Whisper."""
    config = source.config
    return {
        "size": size(config),
        "parameters": f"{sum(math.prod(info.shape) for info in source.infos.values()):,}",
        "dtype": ", ".join(sorted({str(info.dtype) for info in source.infos.values()}))
        + (f" (float32 from {' and '.join(source.quantized)})" if source.quantized else ""),
        "mels": str(config.n_mels),
        "audio": f"{config.n_audio_layer} layers, width {config.n_audio_state}, {config.n_audio_head} heads, "
        f"{config.n_audio_ctx} positions",
        "text": f"{config.n_text_layer} layers, width {config.n_text_state}, {config.n_text_head} heads, "
        f"{config.n_text_ctx} positions",
        "vocabulary": f"{config.n_vocab} ({whisper_text.family(config.n_vocab)})",
        "text tokenizer": "yes" if source.tokenizer else "not in it",
    }


def size(config: WhisperConfig) -> str:
    """The released model that has these dimensions."""
    name = SIZES.get((config.n_audio_state, config.n_audio_layer, config.n_text_layer))
    if name is None:
        return "not a released one"
    if name == "large" and config.n_mels == 128:
        return "large-v3"
    return f"{name}.en" if whisper_text.family(config.n_vocab) == "English only" else name


def fitting(width: int) -> str:
    """The released sizes of this width, for a quantiser that does not say which Whisper it was made for."""
    names = [name for (state, *_), name in SIZES.items() if state == width]
    return " or ".join(names) if names else f"none that was released; one of width {width}"
