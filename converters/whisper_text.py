"""Whisper's text tokenizer as a Hugging Face folder, built from the assets of the package ``openai-whisper``."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ichigo_jax.errors import InputError
from ichigo_jax.storage import read_json, write_json
from ichigo_jax.text.whisper import END, WhisperText

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "normalizer.json",
)

# n_vocab of the released models: is it multilingual, and how many languages has it?
FAMILIES = {51_864: (False, 99), 51_865: (True, 99), 51_866: (True, 100)}


def family(n_vocab: int) -> str:
    """What the size of the vocabulary says about a model."""
    if n_vocab not in FAMILIES:
        return "not a released one"
    multilingual, languages = FAMILIES[n_vocab]
    return f"multilingual, {languages} languages" if multilingual else "English only"


def build(n_vocab: int, folder: Path) -> str | None:
    """Writes the tokenizer of the released models with this vocabulary into ``folder``.

    Args:
      n_vocab: rows of the decoder's embedding.
      folder: exists already.

    Returns:
      None, or why there is none.
    """
    if n_vocab not in FAMILIES:
        return f"a vocabulary of {n_vocab} is none of the released models' ({', '.join(map(str, FAMILIES))})"
    if importlib.util.find_spec("whisper") is None:
        return "the package openai-whisper, which has the released ones, is not installed"
    from whisper.tokenizer import get_tokenizer

    multilingual, languages = FAMILIES[n_vocab]
    encoding = get_tokenizer(multilingual, num_languages=languages).encoding
    ranks = {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    special = {name: encoding.encode_single_token(name) for name in encoding.special_tokens_set}
    _save(_byte_level_bpe(ranks, special), folder)
    return None


def _byte_level_bpe(ranks: Mapping[bytes, int], special: Mapping[str, int]) -> Tokenizer:
    """``tiktoken``'s ranks as merges.

    tiktoken joins whichever two neighbours make the token of the lowest rank, so every way to cut a token into two others is
    a merge, and merges go by the rank of what they make.
    """
    letters = _byte_letters()
    spell = lambda token: "".join(letters[byte] for byte in token)  # noqa: E731
    merges = [
        (rank, ranks[token[:cut]], spell(token[:cut]), spell(token[cut:]))
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(left, right) for *_, left, right in sorted(merges)]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits as GPT-2 does, which Whisper keeps
    backend.decoder = decoders.ByteLevel()
    names = sorted(special, key=special.__getitem__)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    assert backend.get_vocab_size() == len(ranks) + len(special)
    assert all(backend.token_to_id(name) == index for name, index in special.items())
    return backend


def _byte_letters() -> dict[int, str]:
    """How GPT-2 spells bytes: printable ones as they are in Latin-1, the others by letters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + index) for index, byte in enumerate(others)}


def _save(backend: Tokenizer, folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, bos_token=END, eos_token=END, unk_token=END, pad_token=END
    )
    tokenizer.save_pretrained(folder)
    settings = read_json(folder / "tokenizer_config.json")
    settings.pop("backend", None)
    write_json(folder / "tokenizer_config.json", settings | {"tokenizer_class": "WhisperTokenizer"})
    write_json(folder / "special_tokens_map.json", tokenizer.special_tokens_map)


def complete(folder: Path) -> None:
    """Writes ``tokenizer_config.json`` beside a ``tokenizer.json`` that came alone, as it does in faster-whisper folders."""
    if (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
        ends = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END)
        settings = {"tokenizer_class": "WhisperTokenizer", "clean_up_tokenization_spaces": False, **ends}
        write_json(folder / "tokenizer_config.json", settings)


def check(folder: Path, n_vocab: int, origin: Path) -> None:
    """Whether a tokenizer folder fits a model.

    Args:
      folder: the tokenizer's files.
      n_vocab: rows of the decoder's embedding.
      origin: where they come from, for errors.

    Raises:
      InputError: no tokenizer, not Whisper's, or one with more ids than the model.
    """
    if not (folder / "tokenizer.json").exists():
        raise InputError(f"{origin}: no tokenizer.json found, expected a Hugging Face tokenizer folder")
    size = WhisperText.from_folder(folder).size
    if size > n_vocab:
        raise InputError(f"{origin}: a text tokenizer of {size} ids found, the model has {n_vocab}; give another by --tokenizer")


def special_ids(folder: Path) -> dict[str, int]:
    """Added tokens of a tokenizer folder and their ids."""
    return {token["content"]: token["id"] for token in read_json(folder / "tokenizer.json")["added_tokens"]}
