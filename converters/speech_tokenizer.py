"""Speech tokenizers: WhisperSpeech and Ichigo files, with the Whisper they were made for, to model folders and back."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict
from tqdm import tqdm

from converters import engine, foreign, quantizer, torch_files, whisper
from converters.recognise import Recognised
from converters.sources import sha256
from ichigo_jax import configuration
from ichigo_jax.errors import InputError
from ichigo_jax.models.quantizer import Quantizer, QuantizerConfig
from ichigo_jax.models.speech_tokenizer import SpeechTokenizerConfig, SpeechTokenizerModel
from ichigo_jax.storage import atomic_write, read_json
from ichigo_jax.storage.model_folder import fingerprint, load_arrays, load_config, save_model

KIND = "speech_tokenizer"
EXPORTS = ("ichigo", "whisperspeech")
PREFIX = "model."  # of Lightning's, which saves the module that the model is in

# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class QuantizerFile:
    """A quantiser's file, checked but not yet read.

    Attributes:
      found: where it is.
      inferred: its config.
      tensors: all of it under WhisperSpeech's names.
      pieces: those of them that our model has.
      section: what ``foreign.json`` keeps of it.
      whisper: the Whisper that it was made for, as far as the file tells.
      dropped: entries of the file that no import keeps.
    """

    found: Recognised
    inferred: quantizer.Inferred
    tensors: Mapping[str, torch_files.Tensor]
    pieces: list[engine.Piece]
    section: Mapping[str, Any]
    whisper: str
    dropped: tuple[str, ...]

    def bookkeeping(self) -> dict[str, np.ndarray]:
        ours = {piece.source for piece in self.pieces}
        return {key: tensor.read() for key, tensor in self.tensors.items() if key not in ours}


def open_file(found: Recognised, given: Mapping[str, Any], keeps_dtypes: bool = True) -> QuantizerFile:
    """Opens a quantiser.

    Args:
      found: a WhisperSpeech or Ichigo file.
      given: config fields that the user sets, see ``quantizer.infer``.
      keeps_dtypes: whether it will be read without a cast, see ``engine.check``.

    Raises:
      InputError: settings that the model here cannot express, and all faults of the tensors at once.
    """
    where, contents = str(found.path), found.contents
    tensors = torch_files.tensors(contents["state_dict"], f"{where}: state_dict")
    if found.format == "ichigo":
        tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
        written = quantizer.written_by_ichigo(contents, where)
    else:
        written = quantizer.written_by_whisperspeech(contents, where)
    inferred = quantizer.infer(tensors, written, given, where)
    config = inferred.config
    pieces = engine.expand(quantizer.table(config), engine.target_shapes(maker(config)))
    optional = {key: tensor.shape for key, tensor in quantizer.bookkeeping(config, found.format).items()}
    uncast = engine.buffers(maker(config))
    engine.check(pieces, tensors, where, optional, keeps_dtypes=keeps_dtypes, uncast=uncast)
    rest = {key: value for key, value in contents.items() if key != "state_dict"}
    kept = foreign.plain(rest)
    name = contents["config"].get("whisper_model_name") if found.format == "whisperspeech" else None
    file = QuantizerFile(
        found,
        inferred,
        tensors,
        pieces,
        {"format": found.format, "entries": kept},
        name if isinstance(name, str) else whisper.fitting(config.width),
        tuple(sorted(rest.keys() - kept.keys())),
    )
    quantizer.check_rotary(config, file.bookkeeping(), where)
    return file


def maker(config: QuantizerConfig) -> Callable[[Any], Quantizer]:
    return lambda rngs: Quantizer(config, rngs)


# ---------------------------------------------------------------------------------------------------------------------
# Import
# ---------------------------------------------------------------------------------------------------------------------


def import_quantizer(
    file: QuantizerFile, source: whisper.Source, target: Path, dtype: str | None, tokenizer: Path | None
) -> list[str]:
    """Writes a model folder of kind "speech_tokenizer", whole or not at all.

    Args:
      file: of WhisperSpeech or Ichigo.
      source: the Whisper that it belongs to.
      target: must not exist.
      dtype: "float32", "bfloat16", or None to keep each weight's own; codebooks always keep theirs.
      tokenizer: a Hugging Face tokenizer folder to take instead of Whisper's own.

    Returns:
      What the user should know.

    Raises:
      InputError: a Whisper of another width, a text tokenizer that does not fit, or a target that exists.
    """
    found = file.found
    try:
        config = SpeechTokenizerConfig(source.config, file.inferred.config)
    except InputError as error:
        raise InputError(f"{found.path} does not fit {source.found.path}: {error}; it fits Whisper {file.whisper}") from None

    with atomic_write(target) as partial, tempfile.TemporaryDirectory() as workspace:
        text, notes = whisper.text_tokenizer(source, tokenizer, Path(workspace))
        state = {
            "whisper": unflatten_dict(source.read(cast := engine.IMPORT_DTYPES[dtype] if dtype else None)),
            "quantizer": unflatten_dict(_read(file, cast)),
        }
        origin = {
            "source": found.path.resolve().name,
            "source_format": found.format,
            "source_sha256": {found.path.name: sha256(found.path)},
            "whisper": whisper.provenance(source),
            "fingerprint": fingerprint(state),
        }
        save_model(partial, KIND, config, state, origin, text)
        foreign.write(partial, {"whisper": source.section, "quantizer": file.section}, file.bookkeeping())
    notes = [*source.notes, *notes]
    if file.dropped:
        notes.append(f"not kept: {', '.join(file.dropped)}")
    return notes


def _read(file: QuantizerFile, dtype: np.dtype | None) -> dict[engine.Path, np.ndarray]:
    make = maker(file.inferred.config)
    bar = tqdm(file.pieces, desc="reading the quantiser", unit="tensor", disable=None)
    arrays = engine.read_pieces(bar, lambda key: file.tensors[key].read(), dtype, str(file.found.path), engine.buffers(make))
    return engine.assemble(arrays, engine.target_shapes(make))


# ---------------------------------------------------------------------------------------------------------------------
# Export
# ---------------------------------------------------------------------------------------------------------------------


def export_quantizer(source: Path, target: Path, format: str) -> None:
    """Writes the quantiser of a model folder as a WhisperSpeech or Ichigo file.

    Args:
      source: a model folder of a speech tokenizer.
      target: must not exist.
      format: "whisperspeech" or "ichigo".

    Raises:
      InputError: a source that is broken, or numbers that the format has no place for.
    """
    config, state = read_folder(source)
    check_expressible(config.quantizer, format, str(source))
    section = foreign.read_sections(source).get("quantizer", {})
    same_format = section.get("format") == format
    pieces = engine.expand(quantizer.table(config.quantizer), engine.target_shapes(maker(config.quantizer)))
    weights = {piece.source: engine.foreign_tensor(piece, {path[1:]: x for path, x in state.items()}) for piece in pieces}
    kept, new = foreign.read_tensors(source), quantizer.bookkeeping(config.quantizer, format)
    weights |= kept if same_format else new | {key: kept[key] for key in kept.keys() & new.keys()}

    entries = section.get("entries", {}) if same_format else {}
    if format == "ichigo":
        weights = {PREFIX + key: array for key, array in weights.items()}
        contents = {**entries, "config": {"quantizer": quantizer.ichigo_settings(config.quantizer)}}
    else:
        name = whisper.size(config.whisper)
        contents = {**entries, **quantizer.whisperspeech_settings(config.quantizer, name, entries)}
    with atomic_write(target) as partial:
        torch_files.save(partial, {**contents, "state_dict": weights})


def read_folder(source: Path) -> tuple[SpeechTokenizerConfig, dict[engine.Path, np.ndarray]]:
    """A model folder's config and its arrays as they are stored, checked against each other.

    Raises:
      InputError: another folder, or one that is broken.
    """
    config = load_config(source, KIND, SpeechTokenizerConfig)
    state = load_arrays(source)
    engine.check_stored(state, engine.target_shapes(lambda rngs: SpeechTokenizerModel(config, rngs)), source)
    return config, state


def check_expressible(config: QuantizerConfig, format: str, where: str) -> None:
    """Whether the originals can be this quantiser.

    Raises:
      InputError: naming everything that they have written into their code and that is different here.
    """
    faults = [
        f"{name} {getattr(config, name)} found, expected {value}"
        for name, value in quantizer.HARD_CODED.items()
        if getattr(config, name) != value
    ]
    if format == "whisperspeech" and config.mask_code not in (None, config.vq_codes):
        faults.append(f"mask_code {config.mask_code} found, expected the last, {config.vq_codes}; export it as ichigo")
    if format == "ichigo" and config.mask_code is None:
        faults.append("no mask code found, expected one; export it as whisperspeech")
    if faults:
        raise InputError(f"{where}: {format} cannot express this quantiser: {'; '.join(faults)}")


# ---------------------------------------------------------------------------------------------------------------------
# Inspect
# ---------------------------------------------------------------------------------------------------------------------


def describe_file(file: QuantizerFile) -> dict[str, str]:
    """What ``inspect`` and an import print of a quantiser's file."""
    ours = {piece.source for piece in file.pieces}
    values = configuration.to_dict(file.inferred.config)
    return {
        "fits Whisper": file.whisper,
        "dtype": ", ".join(sorted({str(file.tensors[key].dtype) for key in ours})),
        **{name: f"{value} ({file.inferred.origins[name]})" for name, value in values.items()},
        "bookkeeping": ", ".join(sorted(file.tensors.keys() - ours)) or "none",
    }


def describe_folder(found: Recognised) -> dict[str, str]:
    """What ``inspect`` prints of a speech tokenizer's model folder."""
    config, state = read_folder(found.path)
    provenance = read_json(found.path / "provenance.json")
    quantizer_dtypes = {str(array.dtype) for path, array in state.items() if path[0] == "quantizer"}
    about = whisper.describe(whisper.open_source(found))
    return {
        **{name if name == "text tokenizer" else f"whisper {name}": value for name, value in about.items()},
        "dtype": ", ".join(sorted(quantizer_dtypes)),
        **{name: str(value) for name, value in configuration.to_dict(config.quantizer).items()},
        "bookkeeping": ", ".join(sorted(foreign.read_tensors(found.path))) or "none",
        "source": str(provenance.get("source", provenance.get("trained_by", "unknown"))),
        "fingerprint": str(provenance.get("fingerprint", "none")),
    }
