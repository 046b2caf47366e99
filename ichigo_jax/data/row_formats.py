"""What a row of a data set means to the language model: from its columns to ids and which of them are to be predicted.

===================  =========================  =====================================================================
format               columns                    becomes
===================  =========================  =====================================================================
``sound``            ``tokens``                 sound alone, for pre-training
``instruction``      ``tokens``, ``answer``     a spoken request and its answer in text
``transcription``    ``tokens``, ``text``       speech and its words, asked for in words or by a task token
``text_to_sound``    ``tokens``, ``text``       a text and how it sounds
``conversations``    ``conversations``          ``[{"role", "content"}, …]`` with sound tokens spelled inside contents
===================  =========================  =====================================================================

``tokens`` is a list of sound codes, as ``ichigo_jax.tokenize`` writes it, or their spelling, ``<|sound_start|>…``, plain or
compressed, as in the released data sets' columns ``text`` and ``compress_prompt``. A format's first column may have another
name (``RowFormat.column``).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from ichigo_jax.errors import InputError
from ichigo_jax.text.chat import EncodedChat, Part, SoundCodes, SpecialToken, TruncatedChat, encode_chat, truncate
from ichigo_jax.text.prompts import TRANSCRIPTION_PROMPTS, drawn_transcription_prompt
from ichigo_jax.text.tokenizer import TextTokenizer
from ichigo_jax.vocab import SOUND_END, SOUND_START, parse_sound_text, split_sound_text

Format = Literal["sound", "instruction", "transcription", "text_to_sound", "conversations"]
Predict = Literal["all", "answers"]

_COLUMNS: dict[str, tuple[str, ...]] = {
    "sound": ("tokens",),
    "instruction": ("tokens", "answer"),
    "transcription": ("tokens", "text"),
    "text_to_sound": ("tokens", "text"),
    "conversations": ("conversations",),
}
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>]+\|>")


class Example(NamedTuple):
    """Ids [T] int32 and which of them are to be predicted, [T] bool."""

    ids: np.ndarray
    predicted: np.ndarray


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """How the rows of one data set are read.

    Attributes:
      name: see the table above.
      column: the name of the format's first column where it is another; None: as in the table.
      request: of ``transcription``, the language of the wordings ("en" or "vi") or a task token; of ``text_to_sound``, the
        task token in front of the text, or None; of ``conversations``, a task token that the user's contents may spell, or
        None. The task token of the released data is ``vocab.RELEASED_TASK_TOKEN``.
      compressed: whether runs of equal codes become a duration and one code.
    """

    name: Format
    column: str | None
    request: str | None
    compressed: bool

    def __post_init__(self):
        is_token = self.request is not None and _SPECIAL_TOKEN.fullmatch(self.request) is not None
        languages = ", ".join(map(repr, TRANSCRIPTION_PROMPTS))
        fits, expected = {
            "sound": (self.request is None, "None"),
            "instruction": (self.request is None, "None"),
            "transcription": (is_token or self.request in TRANSCRIPTION_PROMPTS, f"one of {languages} or a token <|…|>"),
            "text_to_sound": (is_token or self.request is None, "a token <|…|> or None"),
            "conversations": (is_token or self.request is None, "a token <|…|> or None"),
        }[self.name]
        if not fits:
            raise InputError(f"format {self.name!r} with request {self.request!r} found, expected {expected}")

    @property
    def columns(self) -> tuple[str, ...]:
        first, *others = _COLUMNS[self.name]
        return (self.column or first, *others)


class RowEncoder:
    """Rows as ``Example``; a pure function of the row and its number, to be sent to other processes.

    With Llama's chat layout and ``request="en"``, the row ``{"tokens": [3, 5], "text": "on"}`` of format ``transcription`` is ::

        ids       <begin> <header> user <header-end> \\n\\n Turn … text:  <start> <3> <5> <end> <eot> <header> … \\n\\n on <eot>
        predicted    F       F      F        F         F    F   F   F      F     F   F    F     F      F     F  F    T   T

    with ``predict="answers"``, and all T with "all".

    Args:
      format: see ``RowFormat``.
      tokenizer: of the language model.
      length: the most ids of an example.
      predict: "all" ids but the first, or "answers" alone.

    Raises:
      InputError: a tokenizer without the sound, duration or task tokens that the format needs.
    """

    def __init__(self, format: RowFormat, tokenizer: TextTokenizer, length: int, predict: Predict):
        self.format, self.tokenizer, self.length, self.predict = format, tokenizer, length, predict
        if tokenizer.sound is None:
            raise InputError("sound codes found, but the text tokenizer has no sound tokens; extend its vocabulary first")
        tokenizer.sound.ids([], format.compressed)
        if format.request is not None and format.request not in TRANSCRIPTION_PROMPTS:
            tokenizer.special_id(format.request)
        self._encode = getattr(self, f"_{format.name}")

    def __call__(self, row: Mapping[str, Any], number: int) -> tuple[Example, int]:
        """The example of ``row`` and how many of its ids did not fit.

        Args:
          row: with the format's columns.
          number: of the row in its data set; it picks the wording of a request.

        Raises:
          InputError: a column missing or of the wrong type, an unknown role, a code out of range, half of a sound span, or
            nothing left to predict within ``length``.
        """
        self._check_columns(row)
        ids, mask, dropped = self._encode(row, number)
        predicted = np.ones(len(ids), bool) if self.predict == "all" else np.asarray(mask, bool)
        if not predicted[1:].any():
            total = len(ids) + dropped
            raise InputError(f"{total} ids found, nothing to predict among the first {self.length} that fit; raise data.length")
        return Example(np.asarray(ids, np.int32), predicted), dropped

    def request_and_answer(self, row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
        """``{"tokens": [3, 5], "answer": "yes"}`` of format ``instruction`` -> what the user says, as messages, and "yes".

        Raises:
          InputError: a column missing or of the wrong type.
        """
        self._check_columns(row)
        return [{"role": "user", "content": [self._speech(row)]}], _text(row, "answer")

    def _check_columns(self, row: Mapping[str, Any]) -> None:
        missing = [name for name in self.format.columns if row.get(name) is None]
        if missing:
            raise InputError(f"no {missing[0]!r} found, expected {', '.join(self.format.columns)}")

    def _sound(self, row: Mapping[str, Any], number: int) -> TruncatedChat:
        """``{"tokens": [3, 5]}`` -> begin of text, sound start, 3, 5, sound end, end of text.

        Where that is too long codes are left out at the end, and counted: the sound still ends in its end.
        """
        tokenizer, sound = self.tokenizer, self.tokenizer.sound
        _, *items, _ = sound.ids(self._codes(row), self.format.compressed)
        room = max(0, self.length - len(tokenizer.bos_ids) - 3)
        kept = items[:room]
        if kept and sound.is_duration(kept[-1]):
            kept.pop()
        ids = [*tokenizer.bos_ids, sound.start_id, *kept, sound.end_id, tokenizer.end_of_text_id][: self.length]
        return TruncatedChat(ids, [True] * len(ids), len(items) - len(kept))

    def _instruction(self, row: Mapping[str, Any], number: int) -> TruncatedChat:
        """``{"tokens": [3, 5], "answer": "yes"}`` -> the chat of a user who says [3, 5] and is answered "yes"."""
        return self._turns([self._speech(row)], [_text(row, "answer")])

    def _transcription(self, row: Mapping[str, Any], number: int) -> TruncatedChat:
        """``{"tokens": [3, 5], "text": "on"}`` -> the chat of a user who asks what [3, 5] says; ``number`` picks the wording."""
        request = self.format.request
        drawn = request in TRANSCRIPTION_PROMPTS
        asked: Part = drawn_transcription_prompt(request, number) if drawn else SpecialToken(request)
        return self._turns([asked, self._speech(row)], [_text(row, "text")])

    def _text_to_sound(self, row: Mapping[str, Any], number: int) -> TruncatedChat:
        """``{"tokens": [3, 5], "text": "on"}`` -> the chat of a user who writes "on" and is answered [3, 5]."""
        asked = [] if self.format.request is None else [SpecialToken(self.format.request)]
        return self._turns([*asked, _text(row, "text")], [self._speech(row)])

    def _conversations(self, row: Mapping[str, Any], number: int) -> TruncatedChat:
        """Turns as they are. Users' and assistants' contents are read for sound spans, since the data set declares them, and
        users' for the task token, if there is one; nothing else in them is special, and nothing at all in the system's."""
        turns = row[self.format.columns[0]]
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
            raise InputError(f"conversation {turns!r:.60} found, expected a list of {{'role': …, 'content': …}}")
        messages = []
        for turn in turns:
            role = turn.get("role")
            messages.append({"role": role, "content": self._content(role, _text(turn, "content"))})
        return self._fit(encode_chat(self.tokenizer, messages, add_generation_prompt=False))

    def _content(self, role: str, text: str) -> list[Part]:
        if role == "system":
            return [text]
        parts: list[Part] = []
        for part in split_sound_text(text):
            if not isinstance(part, str):
                parts.append(SoundCodes(part, self.format.compressed))
            elif role == "user" and self.format.request is not None:
                first, *others = part.split(self.format.request)
                parts.append(first)
                for other in others:
                    parts += [SpecialToken(self.format.request), other]
            else:
                parts.append(part)
        return [part for part in parts if part != ""]

    def _turns(self, user: list[Part], assistant: list[Part]) -> TruncatedChat:
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        return self._fit(encode_chat(self.tokenizer, messages, add_generation_prompt=False))

    def _fit(self, chat: EncodedChat) -> TruncatedChat:
        return truncate(chat.ids, chat.answer_mask, self.length, self.tokenizer.sound)

    def _speech(self, row: Mapping[str, Any]) -> SoundCodes:
        return SoundCodes(self._codes(row), self.format.compressed)

    def _codes(self, row: Mapping[str, Any]) -> Sequence[int]:
        value = row[self.format.columns[0]]
        if isinstance(value, str):
            text = value.strip()
            codes: Sequence[int] = parse_sound_text(text if text.startswith(SOUND_START) else SOUND_START + text + SOUND_END)
        elif isinstance(value, list) and all(type(code) is int for code in value):
            codes = value
        else:
            raise InputError(f"sound {value!r:.60} found, expected a list of codes or {SOUND_START}…{SOUND_END}")
        if not codes:
            raise InputError("sound without codes found, expected at least one")
        return codes


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise InputError(f"{name} {value!r:.60} found, expected text")
    return value
