"""A Hugging Face tokenizer that no text can trick into a special token.

Ordinary tokenizers look for added tokens inside the text, so a user who writes ``<|eot_id|>`` ends the turn. Here text goes
through a copy of the tokenizer that has no added tokens at all; special ids come only from code that asks for them by name.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from ichigo_jax.configuration import checked_date
from ichigo_jax.errors import InputError
from ichigo_jax.storage import read_json
from ichigo_jax.text import chat_template
from ichigo_jax.vocab import SOUND_START, SoundVocabulary, duration_token, sound_token, sound_vocabulary

# Tokens that end an answer or a text, in the families that are known here.
DOCUMENT_ENDS = ("<|end_of_text|>", "<|endoftext|>")
END_TOKENS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", *DOCUMENT_ENDS)


# A conversation that shows where a chat template ends an answer. No template writes or trims these characters.
_REQUEST, _ANSWER = "\ue000request\ue001", "\ue000answer\ue001"


class Token(NamedTuple):
    """One id and the characters ``[start, end)`` of the text that it stands for."""

    id: int
    start: int
    end: int


class TextTokenizer:
    """Text to ids and back.

    Attributes:
      sound: where the sound tokens are, or None when the vocabulary has none.
      eos_ids: every id that ends an answer or a document, ascending: the known ones of ``END_TOKENS``, the tokenizer's own, and
        the one that ends a turn in the chat template. This is the one place that knows them; a model's
        ``LanguageModelConfig.eos_token_ids`` are these, or those that its files came with.
      turn_end_id: the special token that ends an answer in the chat template; None without a template.
      chat_ids: all special tokens that the chat template writes around a request and its answer.
      end_of_text_id: the one that ends a document, where there is no turn to end.
      bos_ids: what goes before a document: begin-of-text, or nothing in families without it.
      pad_id: the id to fill batches with.
      size: one more than the largest id.
      chat_date: the date (year-month-day) that the chat template is told; None for a template that asks for none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, where: str, chat_date: str | None = None):
        """Wraps a loaded fast tokenizer; ``where`` names it in errors. See ``from_folder``."""
        date = checked_date(chat_date or chat_template.UNRECORDED_DATE, f"{where}: chat_date")
        self.chat_date = date if _asks_for_date(tokenizer) else None
        self._tokenizer = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._plain = _without_added_tokens(self._backend, where)
        self._where = where
        added = self._backend.get_added_tokens_decoder()
        self._added = {token.content: index for index, token in added.items()}
        # Longest first, so that of two added tokens that start alike the longer one is found.
        self._added_pattern = re.compile("|".join(map(re.escape, sorted(self._added, key=len, reverse=True))) or r"(?!)")
        self.sound = self._find_sound()
        self.size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        ends = {self._backend.token_to_id(name) for name in END_TOKENS} | {tokenizer.eos_token_id}
        self._ends: frozenset[int] = frozenset(ends - {None})
        if not self._ends:
            raise InputError(f"{where}: no end-of-text token found, expected one (eos_token in tokenizer_config.json)")
        documents = [self._backend.token_to_id(name) for name in DOCUMENT_ENDS]
        self.end_of_text_id: int = next((index for index in documents if index is not None), tokenizer.eos_token_id)
        begins = tokenizer.bos_token_id in self._backend.encode("").ids
        self.bos_ids: tuple[int, ...] = (tokenizer.bos_token_id,) if begins else ()
        pad = tokenizer.pad_token_id
        if pad is None:
            pad = self._backend.token_to_id("<|finetune_right_pad_id|>")
        self.pad_id: int = min(self._ends) if pad is None else pad

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, chat_date: str | None = None) -> TextTokenizer:
        """Loads a local tokenizer folder (``tokenizer.json`` and its companions).

        Args:
          folder: where it is.
          chat_date: what a chat template that asks for today's date is told: year-month-day. None: 2024-07-26, the date that
            Llama's own templates name where they have no clock.

        Raises:
          InputError: no such folder, not a byte-level BPE tokenizer, sound tokens that are not numbered one after another, or
            not a date.
        """
        if not (Path(folder) / "tokenizer.json").is_file():
            raise InputError(f"{folder}: no tokenizer.json found, expected a Hugging Face tokenizer folder")
        read_json(Path(folder) / "tokenizer.json")
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever is wrong with the files, transformers has a different exception for it
            raise InputError(
                f"{folder}: expected a Hugging Face tokenizer folder, found {' '.join(str(error).split())}"
            ) from None
        return cls(tokenizer, str(folder), chat_date)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text`` as it stands. No special or other added token is ever among them, nor a begin-of-text.

        Raises:
          InputError: text that is not Unicode (half of a surrogate pair).
        """
        return self._encoding(text).ids

    def encode_with_offsets(self, text: str) -> list[Token]:
        """As ``encode``, with the characters that each id stands for."""
        encoding = self._encoding(text)
        return [Token(index, *offsets) for index, offsets in zip(encoding.ids, encoding.offsets)]

    def _encoding(self, text: str) -> Encoding:
        try:
            return self._plain.encode(text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):
            raise InputError(f"{text[:40]!a} found, expected Unicode text") from None

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ``ids``; rows that a model keeps in reserve, without a token, are nothing.

        Args:
          ids: non-negative integers.
          skip_special: leaves special tokens out (sound tokens are special); otherwise they are spelled.
        """
        return self._backend.decode([int(index) for index in ids], skip_special_tokens=skip_special)

    def special_id(self, name: str) -> int:
        """The id of an added token such as ``<|eot_id|>``.

        Raises:
          InputError: the vocabulary has no such added token.
        """
        if name not in self._added:
            raise InputError(f"{self._where}: no special token {name!r} in the vocabulary; use a tokenizer that has it")
        return self._added[name]

    def spelling(self, token_id: int) -> str:
        """A vocabulary entry as it is written there, a letter for each byte: ``Ġ`` for a space."""
        return self._backend.id_to_token(token_id)

    @functools.cached_property
    def eos_ids(self) -> tuple[int, ...]:
        return tuple(sorted(self._ends | {self.turn_end_id} - {None}))

    @functools.cached_property
    def turn_end_id(self) -> int | None:
        parts = self._example_chat
        after_answer = parts[parts.index(_ANSWER) + 1 :] if _ANSWER in parts else []
        return next((part for part in after_answer if isinstance(part, int)), None)

    @functools.cached_property
    def chat_ids(self) -> frozenset[int]:
        return frozenset(part for part in self._example_chat if isinstance(part, int))

    @functools.cached_property
    def _example_chat(self) -> list[str | int]:
        """A request and its answer in the chat template, cut at special tokens and around ``_ANSWER``; else nothing."""
        if not self._tokenizer.chat_template:
            return []
        messages = [{"role": "user", "content": _REQUEST}, {"role": "assistant", "content": _ANSWER}]
        try:
            rendered = self.render_chat(messages, add_generation_prompt=False)
        except InputError:  # a template for other conversations; it says so to whoever uses it for one
            return []
        before, answer, after = rendered.partition(_ANSWER)
        return [*self.split_special(before), *([answer] if answer else []), *self.split_special(after)]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that two tokenizers share only when they encode every text and chat alike."""
        description = self._backend.to_str() + json.dumps(self._tokenizer.chat_template) + (self.chat_date or "")
        return hashlib.sha256(description.encode()).hexdigest()[:16]

    @property
    def added(self) -> Mapping[str, int]:
        """Every added token, special or not, and its id."""
        return self._added

    def has_only_added_from(self, first: int) -> bool:
        """Whether no text without special tokens has an id from ``first`` on."""
        return max(self._plain.get_vocab().values()) < first

    def split_special(self, text: str) -> list[str | int]:
        """Cuts *trusted* text (a chat template's own) at added tokens: ``'a<|eot_id|>'`` -> ``['a', 128009]``."""
        parts: list[str | int] = []
        position = 0
        for match in self._added_pattern.finditer(text):
            parts += [text[position : match.start()], self._added[match[0]]]
            position = match.end()
        return [part for part in [*parts, text[position:]] if part != ""]

    def render_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """The conversation in the model's own chat template, as text: the same on any day.

        Raises:
          InputError: no chat template, or one that refuses the conversation.
        """
        if not self._tokenizer.chat_template:
            raise InputError(f"{self._where}: no chat template found; use the tokenizer of an instruction-tuned model")
        try:
            template = self._tokenizer.get_chat_template()
            variables = {"messages": list(messages), "tools": None, "documents": None}
            variables |= {"add_generation_prompt": add_generation_prompt, **self._tokenizer.special_tokens_map}
            return chat_template.render(template, self.chat_date or chat_template.UNRECORDED_DATE, variables)
        except Exception as error:  # templates raise what they like
            reason = " ".join(str(error).split())
            raise InputError(f"{self._where}: the chat template refuses the conversation: {reason}") from None

    def _find_sound(self) -> SoundVocabulary | None:
        first = self._added.get(SOUND_START)
        codes = [code for code in range(10_000) if sound_token(code) in self._added]
        if first is None and not codes:
            return None
        expected = sound_vocabulary(1 + max(codes, default=0), durations=duration_token(2) in self._added)
        for offset, name in enumerate(expected):
            if first is None or self._added.get(name) != first + offset:
                wanted = "a number" if first is None else first + offset
                raise InputError(
                    f"{self._where}: sound token {name!r} has id {self._added.get(name)}, expected {wanted}: "
                    "sound tokens must be numbered one after another; extend the vocabulary anew"
                )
        return SoundVocabulary(first, 1 + max(codes), duration_token(2) in self._added)


class StreamDecoder:
    """Text of ids that arrive one by one; its pieces joined are ``decode`` of all ids.

    A character may be spread over several ids, so a piece ends only where a character does. (The ``DecodeStream`` of
    ``tokenizers`` has no end: it leaves a cut-off character out, which ``decode`` shows as U+FFFD.)
    """

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Takes the next id; the characters that are now complete, perhaps none."""
        self._pending.append(token_id)
        text = self._tokenizer.decode(self._pending)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._pending = []
        return text

    def finish(self) -> str:
        """What is left at the end: a character that was cut off shows as U+FFFD."""
        text, self._pending = self._tokenizer.decode(self._pending), []
        return text


def _asks_for_date(tokenizer: PreTrainedTokenizerFast) -> bool:
    templates = tokenizer.chat_template or ""
    return any(map(chat_template.asks_for_date, templates.values() if isinstance(templates, dict) else [templates]))


def _without_added_tokens(backend: Tokenizer, where: str) -> Tokenizer:
    """A copy that knows only its BPE entries, so nothing in a text can match an added token, special or not."""
    description = json.loads(backend.to_str())
    model = description["model"]
    if model["type"] != "BPE" or "ByteLevel" not in json.dumps(description["pre_tokenizer"]):
        raise InputError(f"{where}: found a {model['type']} tokenizer, expected byte-level BPE, which can spell every text")
    added = {token["content"] for token in description["added_tokens"]}
    model["vocab"] = {entry: index for entry, index in model["vocab"].items() if entry not in added}
    # The post-processor adds begin-of-text and trims offsets; both are for the caller to decide.
    description |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(description))
