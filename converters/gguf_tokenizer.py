"""The text tokenizer of a GGUF file as a Hugging Face tokenizer folder.

The file has no ``tokenizer.json`` but its parts: tokens, merges, special ids, and a name for how text is split before BPE. The
names here are llama.cpp's, whose ``llama-vocab.cpp`` says what they mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ichigo_jax.errors import InputError
from ichigo_jax.text.tokenizer import TextTokenizer
from ichigo_jax.text.train_tokenizer import LLAMA_SPLIT, save_tokenizer

# Qwen2's: as Llama 3's, but every digit stands alone.
QWEN2_SPLIT = LLAMA_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's kinds of tokens

_PREFIX = "tokenizer.ggml."
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


@dataclasses.dataclass(frozen=True)
class Splitting:
    """How a family prepares text for BPE.

    Attributes:
      pattern: what cuts text into words, or None for GPT-2's own.
      single_digits: cuts between all digits first.
      compose: joins letters and their accents (NFC) first.
      whole_words: a word that is a token is that token, whatever the merges say.
      begins: a text begins with the begin-of-text token, where the file does not say.
    """

    pattern: str | None = None
    single_digits: bool = False
    compose: bool = False
    whole_words: bool = False
    begins: bool = False


_LLAMA = Splitting(LLAMA_SPLIT, whole_words=True, begins=True)
_QWEN2 = Splitting(QWEN2_SPLIT, compose=True)
_GPT2 = Splitting()
SPLITTINGS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "smollm": Splitting(single_digits=True),
    **dict.fromkeys(("gpt-2", "gpt2"), _GPT2),
}


def end_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end an answer: of a text, of a turn, of a message to a tool; each once, in this order."""
    found = (metadata.get(f"{_PREFIX}{name}") for name in _ENDS)
    return tuple(dict.fromkeys(index for index in found if index is not None))


def has_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """Whether a file has a text tokenizer at all."""
    return metadata.get(f"{_PREFIX}model", "no_vocab") not in ("none", "no_vocab")


def write(metadata: Mapping[str, Any], folder: Path, where: str) -> TextTokenizer:
    """Writes the tokenizer folder.

    Args:
      metadata: of the file.
      folder: must not exist.
      where: the file's name for errors.

    Raises:
      InputError: a tokenizer that is not byte-level BPE, splits text in a way that is not known, or contradicts itself.
    """
    backend, settings = _build(metadata, where)
    save_tokenizer(backend, folder, **settings)
    return TextTokenizer(PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True), where)


def _build(metadata: Mapping[str, Any], where: str) -> tuple[Tokenizer, dict[str, str]]:
    values = {name.removeprefix(_PREFIX): value for name, value in metadata.items() if name.startswith(_PREFIX)}
    if values.get("model") != "gpt2":
        raise InputError(
            f"{where}: {_PREFIX}model {values.get('model')!r} found, expected 'gpt2': byte-level BPE, which can spell every text"
        )
    splitting = SPLITTINGS.get(values.get("pre"))
    if splitting is None:
        known = ", ".join(SPLITTINGS)
        raise InputError(f"{where}: {_PREFIX}pre {values.get('pre')!r} found, expected one of {known}: how text is split")
    tokens = _texts(values, "tokens", where)
    merges = _texts(values, "merges", where) if "merges" in values else []  # the format has no empty lists
    kinds = [NORMAL] * len(tokens) if "token_type" not in values else [int(kind) for kind in values["token_type"]]
    if len(kinds) != len(tokens):
        raise InputError(f"{where}: {len(kinds)} types for {len(tokens)} tokens found, expected one for each")

    # Rows without a token have a made-up name, which nobody may type.
    used = {token: index for index, (token, kind) in enumerate(zip(tokens, kinds)) if kind != UNUSED}
    try:
        pairs = [_pair(merge) for merge in merges]
        model = models.BPE(vocab=used, merges=pairs, ignore_merges=splitting.whole_words)
    except Exception as error:  # tokenizers raises a bare one
        raise InputError(f"{where}: merges that do not fit the tokens found: {' '.join(str(error).split())}") from None
    backend = Tokenizer(model)
    if splitting.compose:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(splitting)
    backend.decoder = decoders.ByteLevel()
    added = [(token, kind) for token, kind in zip(tokens, kinds) if kind in (CONTROL, USER_DEFINED)]
    backend.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False) for token, kind in added])

    settings = {role: _token(values, name, tokens, where) for role, name in _ROLES.items() if name in values}
    backend.post_processor = _post_processor(backend, splitting, values, settings, where)
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        settings["chat_template"] = template
    return backend, settings


def _texts(values: Mapping[str, Any], name: str, where: str) -> Sequence[str]:
    found = values.get(name)
    if not isinstance(found, list) or not found:
        raise InputError(f"{where}: no {_PREFIX}{name} found, expected a list of texts")
    return found


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _token(values: Mapping[str, Any], name: str, tokens: Sequence[str], where: str) -> str:
    index = values[name]
    if type(index) is not int or not 0 <= index < len(tokens):
        raise InputError(f"{where}: {_PREFIX}{name} {index!r} found, expected an id below {len(tokens)}")
    return tokens[index]


def _pre_tokenizer(splitting: Splitting) -> pre_tokenizers.PreTokenizer:
    steps = [pre_tokenizers.Digits(individual_digits=True)] if splitting.single_digits else []
    if splitting.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(splitting.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None))
    return pre_tokenizers.Sequence(steps)


def _post_processor(
    backend: Tokenizer, splitting: Splitting, values: Mapping[str, Any], settings: Mapping[str, str], where: str
) -> processors.PostProcessor:
    steps: list[processors.PostProcessor] = [processors.ByteLevel(trim_offsets=False)]
    if values.get("add_bos_token", splitting.begins):
        bos = settings.get("bos_token")
        if bos is None:
            raise InputError(f"{where}: texts that begin with a token found, but no {_PREFIX}bos_token_id")
        single, pair = f"{bos} $A", f"{bos} $A {bos}:1 $B:1"
        special = [(bos, backend.token_to_id(bos))]
        steps.append(processors.TemplateProcessing(single=single, pair=pair, special_tokens=special))
    return processors.Sequence(steps)
