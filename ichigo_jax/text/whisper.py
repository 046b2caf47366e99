"""Whisper's side of text: the ids that its decoder starts from, ends with and never writes."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence

from ichigo_jax.errors import InputError
from ichigo_jax.text.tokenizer import TextTokenizer

START, END, TRANSCRIBE, NO_TIMESTAMPS = "<|startoftranscript|>", "<|endoftext|>", "<|transcribe|>", "<|notimestamps|>"
TRANSLATE, PREVIOUS, START_OF_LANGUAGE_MODEL = "<|translate|>", "<|startofprev|>", "<|startoflm|>"
NO_SPEECH = ("<|nospeech|>", "<|nocaptions|>")  # in openai-whisper, and in most of its Hugging Face folders
LANGUAGE = "<|{}|>"

# Where GPT-2's vocabulary ends a text, which the English-only models (.en) have; the multilingual ones end it elsewhere. The
# English-only vocabulary spells language and task tokens too, but its models never saw them.
ENGLISH_ONLY_END = 50_256

# What nobody says, as ``whisper.tokenizer.Tokenizer.non_speech_tokens`` lists it.
SIGNS = [*'"#()*+/:;<=>@[\\]^_`{|}~「」『』', *"<< >> <<< >>> -- --- -( -[ (' (\" (( )) ((( ))) [[ ]] {{ }} ♪♪ ♪♪♪".split()]
NOTES = "♩♪♫♬♭♮♯"


def language_code(language: str) -> str:
    """Whisper's abbreviation of a language by its name or abbreviation: ``"EN"``, ``"English"`` -> ``"en"``.

    An abbreviation that Whisper does not have comes back as it is: a vocabulary of one's own may have it.

    Raises:
      InputError: neither a name that Whisper has nor two or three letters.
    """
    name = language.strip().lower()
    if re.fullmatch("[a-z]{2}", name):
        return name
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE  # here: it takes seconds to import

    code = TO_LANGUAGE_CODE.get(name, name)
    if not re.fullmatch("[a-z]{2,3}", code):
        raise InputError(f"language {language!r} found, expected an abbreviation or name that Whisper has, such as en or English")
    return code


class WhisperText:
    """Text to ids of a Whisper decoder and back.

    Attributes:
      size: one more than the largest id.
      start: the id that starts a transcript.
      end: the id that ends a text.
      previous: the id before what was said earlier, None where the vocabulary has none.
      no_speech: the id that stands for silence, None where the vocabulary has none.
      languages: Whisper's abbreviation to id; empty in the English-only vocabulary.
      prompt: the ids that an English transcription without timestamps starts from.
      out_of_place: the special ids that Whisper keeps out of an answer.
    """

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer
        added = tokenizer.added
        self.size = tokenizer.size
        self.start, self.end = tokenizer.special_id(START), tokenizer.special_id(END)
        self.previous = added.get(PREVIOUS)
        self.no_speech = next((added[name] for name in NO_SPEECH if name in added), None)
        found = {} if self.end == ENGLISH_ONLY_END else added
        self.languages: Mapping[str, int] = {name[2:-2]: found[name] for name in found if re.fullmatch(r"<\|[a-z]{2,3}\|>", name)}
        self.prompt = self.prompt_in("en")
        names = (START, TRANSCRIBE, TRANSLATE, PREVIOUS, START_OF_LANGUAGE_MODEL, *NO_SPEECH)
        self.out_of_place = tuple(sorted(added[name] for name in names if name in added))

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> WhisperText:
        """Loads a Hugging Face tokenizer folder that has Whisper's special tokens.

        Raises:
          InputError: no such folder, or no ``<|startoftranscript|>`` or ``<|endoftext|>`` in it.
        """
        return cls(TextTokenizer.from_folder(folder))

    def prompt_in(self, language: str, task: str = "transcribe") -> list[int]:
        """Start, language, task and no timestamps, those of them that the vocabulary has.

        Args:
          language: as ``language_code`` takes it, such as "en" or "Vietnamese".
          task: "transcribe" or "translate".

        Raises:
          InputError: a language other than English, or translation, that the vocabulary does not have.
        """
        added = self._tokenizer.added
        language = language_code(language)
        task_name = TRANSLATE if task == "translate" else TRANSCRIBE
        names = [NO_TIMESTAMPS] if self.end == ENGLISH_ONLY_END else [LANGUAGE.format(language), task_name, NO_TIMESTAMPS]
        found = [name for name in names if name in added]
        if language != "en" and LANGUAGE.format(language) not in found:
            raise InputError(f"language {language!r} found, which this Whisper's vocabulary lacks; give another, or en")
        if task == "translate" and TRANSLATE not in found:
            raise InputError("task translate found, which this Whisper's vocabulary lacks; transcribe instead")
        return [self.start, *(added[name] for name in found)]

    @functools.cached_property
    def non_speech(self) -> tuple[int, ...]:
        """The ids of signs that are not speech: brackets, notes, a hyphen or an apostrophe that begins a word.

        Of signs spelled by several ids none is among them, but for notes the first, which in Whisper's vocabularies only
        their kind begins with; a vocabulary whose first id is a mere byte keeps it.
        """
        encode = self._tokenizer.encode
        found = {ids[0] for text in (" -", " '") if len(ids := encode(text)) == 1}
        for sign in [*SIGNS, *NOTES]:
            for ids in (encode(sign), encode(" " + sign)):
                begins = sign in NOTES and len(self._tokenizer.spelling(ids[0]).lstrip("Ġ")) > 1
                if len(ids) == 1 or begins:
                    found.add(ids[0])
        return tuple(sorted(found))

    @functools.cached_property
    def blank(self) -> tuple[int, ...]:
        """What an answer that says nothing begins with: a space alone, or the end."""
        return (*self.encode(" "), self.end)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text`` as it stands, without prompt and end; never a special one."""
        return self._tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a decoder's answer up to its end, without special tokens and outer spaces."""
        ids = [int(index) for index in ids]
        if self.end in ids:
            ids = ids[: ids.index(self.end)]
        return self._tokenizer.decode(ids).strip()
