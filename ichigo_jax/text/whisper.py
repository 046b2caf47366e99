"""Whisper's side of text: the ids that its decoder starts from, ends with and never writes."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ichigo_jax.errors import InputError
from ichigo_jax.text.tokenizer import TextTokenizer

START, END, TRANSCRIBE, NO_TIMESTAMPS = "<|startoftranscript|>", "<|endoftext|>", "<|transcribe|>", "<|notimestamps|>"
LANGUAGE = "<|{}|>"

# Where GPT-2's vocabulary ends a text, which the English-only models (.en) have; the multilingual ones end it elsewhere. The
# English-only vocabulary spells language and task tokens too, but its models never saw them.
ENGLISH_ONLY_END = 50_256


class WhisperText:
    """Text to ids of a Whisper decoder and back.

    Attributes:
      size: one more than the largest id.
      end: the id that ends a text.
      prompt: the ids that an English transcription without timestamps starts from.
      never: ids that a transcription without timestamps never holds: every special token but the end.
    """

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer
        self.size = tokenizer.size
        self.end = tokenizer.special_id(END)
        self.prompt = self.prompt_in("en")
        self.never = tuple(sorted(set(tokenizer.added.values()) - {self.end}))

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> WhisperText:
        """Loads a Hugging Face tokenizer folder that has Whisper's special tokens.

        Raises:
          InputError: no such folder, or no ``<|startoftranscript|>`` or ``<|endoftext|>`` in it.
        """
        return cls(TextTokenizer.from_folder(folder))

    def prompt_in(self, language: str) -> list[int]:
        """Start, language, task and no timestamps, those of them that the vocabulary has.

        Args:
          language: Whisper's abbreviation, such as "en" or "vi".

        Raises:
          InputError: a language other than English that the vocabulary does not have.
        """
        added = self._tokenizer.added
        names = [NO_TIMESTAMPS] if self.end == ENGLISH_ONLY_END else [LANGUAGE.format(language), TRANSCRIBE, NO_TIMESTAMPS]
        found = [name for name in names if name in added]
        if language != "en" and LANGUAGE.format(language) not in found:
            raise InputError(f"language {language!r} found, which this Whisper's vocabulary lacks; give another, or en")
        return [self._tokenizer.special_id(START), *(added[name] for name in found)]

    def encode(self, text: str) -> list[int]:
        """The ids of ``text`` as it stands, without prompt and end; never a special one."""
        return self._tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a decoder's answer up to its end, without special tokens and outer spaces."""
        ids = [int(index) for index in ids]
        if self.end in ids:
            ids = ids[: ids.index(self.end)]
        return self._tokenizer.decode(ids).strip()
