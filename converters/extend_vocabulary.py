"""A text model's vocabulary extended with sound tokens: rows of the embedding and the head, tokenizer files, configs."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters import language_model, llama, safetensors_files
from converters.engine import Weight
from converters.extended_weight import ExtendedWeight
from converters.recognise import Recognised
from converters.sources import copy_files, read_object
from ichigo_jax.errors import InputError
from ichigo_jax.models.llama import LanguageModelConfig
from ichigo_jax.storage import atomic_write, write_json
from ichigo_jax.storage.model_folder import TOKENIZER_FOLDER
from ichigo_jax.text.tokenizer import TextTokenizer
from ichigo_jax.vocab import SoundVocabulary, sound_vocabulary

MOST_SOUND_CODES = 9_999  # a token spells its code in four digits, and the mask code is one more


@dataclasses.dataclass(frozen=True)
class Extension:
    """What is asked for.

    Attributes:
      sound_codes: codes of the speech tokenizer without its mask code, which is added.
      durations: whether run-length tokens follow the codes.
      seed: of the noise.
      noise: standard deviation of the noise on new rows, as a fraction of the old rows' own in each column.
    """

    sound_codes: int
    durations: bool
    seed: int
    noise: float

    def __post_init__(self):
        if not 1 <= self.sound_codes <= MOST_SOUND_CODES:
            raise InputError(f"--sound-codes {self.sound_codes} found, expected 1 to {MOST_SOUND_CODES}")
        if not 0 <= self.noise < float("inf") or self.seed < 0:
            raise InputError(f"--noise {self.noise} and --seed {self.seed} found, expected numbers from 0")


def extend(found: Recognised, target: Path, extension: Extension, vocab_multiple: int | None) -> list[str]:
    """Writes a copy of a language model with sound tokens after its text tokenizer's last id, whole or not at all.

    Llama 3's ids end where its embedding does. Qwen2.5's embedding has spare rows after the tokenizer's last id; sound tokens
    take those first. New rows are the mean of the rows in use plus noise. One tensor at a time is held.

    Args:
      found: a Hugging Face folder or a model folder; ``target`` becomes the same.
      target: must not exist.
      extension: what is asked for.
      vocab_multiple: of a model folder, as in ``language_model.import_hf``; None adds no padding rows.

    Returns:
      Lines that say what was done. A source with these very sound tokens is copied as it is.

    Raises:
      InputError: a source that is broken, has no tokenizer or has other sound tokens.
    """
    source, is_hf = found.path, found.format == "hf"
    if is_hf and vocab_multiple is not None:
        raise InputError(
            "--vocab-multiple with a Hugging Face folder found, expected it at the import: the format has no padding"
        )
    with atomic_write(target) as partial, tempfile.TemporaryDirectory() as temporary:
        if is_hf:
            config, weights, notes = language_model.open_hf(source, keeps_dtypes=False)
        else:
            (config, weights), notes = language_model.open_folder(source), []
        origin = source if is_hf else source / TOKENIZER_FOLDER
        tokenizer = TextTokenizer.from_folder(origin)
        if tokenizer.sound != config.sound:
            raise InputError(f"{origin}: sound tokens {tokenizer.sound} found, config.json has {config.sound}")
        sound = place(tokenizer, extension, str(source))
        texts = Path(temporary)
        copy_files(language_model.COMPANIONS, origin, texts)
        is_new = config.sound is None
        if is_new:
            add_sound_tokens(texts, sound)
            rows = {key: _with_new_rows(weights[key], sound, extension, key) for key in weights.keys() & VOCABULARY}
            weights = {key: rows.get(key, weight) for key, weight in weights.items()}
        extended = _with_sound(config, sound)
        if vocab_multiple is not None:
            extended = language_model.pad_vocabulary(extended, vocab_multiple)
        provenance = _provenance(source, is_hf)
        if is_new:
            provenance["extended_vocabulary"] = {**dataclasses.asdict(extension), "first_id": sound.first_id}
        if is_hf:
            partial.mkdir()
            language_model.write_weights(partial, weights, source, safetensors_files.SHARD_BYTES)
            copy_files(language_model.COMPANIONS, texts, partial)
            write_json(partial / "config.json", _settings(source, extended))
            write_json(partial / "provenance.json", provenance)
        else:
            language_model.write_folder(partial, extended, weights, None, provenance, texts, source)
    lines = notes if is_new else [*notes, "nothing to extend: the vocabulary has these sound tokens already; copied as it is"]
    lines.append(f"sound tokens: {sound.size} from id {sound.first_id}")
    return [*lines, f"vocabulary: {config.llama.vocab_size} -> {extended.llama.vocab_size} rows"]


def place(tokenizer: TextTokenizer, extension: Extension, where: str) -> SoundVocabulary:
    """Where the sound tokens go, or where these very ones are already.

    Raises:
      InputError: the vocabulary has other sound tokens.
    """
    codes, durations = extension.sound_codes + 1, extension.durations
    sound = tokenizer.sound
    if sound is None:
        taken = sorted(set(sound_vocabulary(codes, durations)) & tokenizer.added.keys())
        if taken:
            raise InputError(f"{where}: the vocabulary has {taken[0]!r} already, expected one without sound tokens")
        return SoundVocabulary(tokenizer.size, codes, durations)
    if (sound.codes, sound.durations) != (codes, durations):
        raise InputError(
            f"{where}: sound tokens for {sound.codes} codes with durations {sound.durations} found, expected none or those asked "
            f"for ({codes} codes with the mask code, durations {durations}); start from the model before it was extended"
        )
    return sound


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------

VOCABULARY = {llama.EMBEDDING, llama.HEAD}


def _with_new_rows(source: Weight, sound: SoundVocabulary, extension: Extension, key: str) -> ExtendedWeight:
    """``key`` tells the embedding from the head, which get noise of their own."""
    shape = (max(source.shape[0], sound.first_id + sound.size), *source.shape[1:])
    seed = (extension.seed, sorted(VOCABULARY).index(key))
    return ExtendedWeight(source.dtype, shape, source, sound.first_id, sound.size, extension.noise, seed)


# ---------------------------------------------------------------------------------------------------------------------
# Files and configs
# ---------------------------------------------------------------------------------------------------------------------


def add_sound_tokens(folder: Path, sound: SoundVocabulary) -> None:
    """Adds sound tokens to the files of a Hugging Face tokenizer, which stay what they were in all else."""
    names = sound_vocabulary(sound.codes, sound.durations)
    # As ``AddedToken(name, special=True, normalized=False)``: never split, never changed, left out with special tokens.
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokens = {sound.first_id + offset: {"content": name, **flags} for offset, name in enumerate(names)}

    description = read_object(folder / "tokenizer.json")
    description["added_tokens"] = [*description.get("added_tokens", []), *({"id": i, **token} for i, token in tokens.items())]
    write_json(folder / "tokenizer.json", description)

    # Tokenizers that are not read from tokenizer.json alone list added tokens again.
    settings = folder / "tokenizer_config.json"
    if settings.exists():
        values = read_object(settings)
        if "added_tokens_decoder" in values:
            values["added_tokens_decoder"] |= {str(index): token for index, token in tokens.items()}
            write_json(settings, values)
    listing = folder / "added_tokens.json"
    if listing.exists():
        write_json(listing, read_object(listing) | {token["content"]: index for index, token in tokens.items()})


def _with_sound(config: LanguageModelConfig, sound: SoundVocabulary) -> LanguageModelConfig:
    vocab_size = max(config.llama.vocab_size, sound.first_id + sound.size)
    network = dataclasses.replace(config.llama, vocab_size=vocab_size)
    padded = max(config.padded_vocab_size, vocab_size)
    return dataclasses.replace(config, llama=network, sound=sound, padded_vocab_size=padded)


def _settings(source: Path, extended: LanguageModelConfig) -> dict[str, Any]:
    """``config.json`` as it is, but for what is true of the written weights and not of those that were read."""
    settings, network = read_object(source / "config.json"), extended.llama
    changed: dict[str, Any] = {"vocab_size": network.vocab_size}
    if bool(settings.get("tie_word_embeddings")) != network.tie_word_embeddings:
        changed["tie_word_embeddings"] = network.tie_word_embeddings
    if settings.get("architectures"):
        changed["architectures"] = [llama.ARCHITECTURES[network.architecture]]
    return settings | changed


def _provenance(source: Path, is_hf: bool) -> dict[str, Any]:
    """That of the source where it has one, else the source."""
    file = source / "provenance.json"
    kept: Mapping[str, Any] = read_object(file) if file.exists() else {}
    return dict(kept) or (language_model.hf_origin(source) if is_hf else {})
