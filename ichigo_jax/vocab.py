"""Sound tokens: the one place that spells and numbers them.

Sound codes 0…C-1 become text-tokenizer entries ``<|sound_0000|>`` … between ``<|sound_start|>`` and ``<|sound_end|>``.
On Llama 3, whose last own id is 128255, they begin at 128256: start, end, the codes (the mask code among them), then,
in the families that have them, run lengths ``<|duration_02|>`` … ``<|duration_49|>``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from ichigo_jax.errors import InputError

SOUND_START = "<|sound_start|>"
SOUND_END = "<|sound_end|>"
SHORTEST_RUN, LONGEST_RUN = 2, 49

# The token of Llama 3's reserve that the first released models were trained with in place of a request in words: before
# speech it asks for the words, before a text (in the text-to-sound models) for the speech.
RELEASED_TASK_TOKEN = "<|reserved_special_token_69|>"

_SPAN = re.compile(r"<\|sound_start\|>(.*?)<\|sound_end\|>", re.DOTALL)
_ITEM = re.compile(r"(?:<\|duration_(\d{2})\|>)?<\|sound_(\d{4})\|>")
_ITEMS = re.compile(rf"(?:{_ITEM.pattern})*")


def sound_token(code: int) -> str:
    """``12`` -> ``'<|sound_0012|>'``."""
    return f"<|sound_{code:04d}|>"


def duration_token(length: int) -> str:
    """``2`` -> ``'<|duration_02|>'``."""
    return f"<|duration_{length:02d}|>"


def sound_vocabulary(codes: int, durations: bool) -> list[str]:
    """The tokens that a speech tokenizer of ``codes`` codes (mask code included) adds to a text tokenizer, in order."""
    tokens = [SOUND_START, SOUND_END, *map(sound_token, range(codes))]
    if durations:
        tokens += map(duration_token, range(SHORTEST_RUN, LONGEST_RUN + 1))
    return tokens


@dataclasses.dataclass(frozen=True)
class SoundVocabulary:
    """Where sound tokens live among a language model's ids.

    Attributes:
      first_id: the id of ``<|sound_start|>``.
      codes: how many sound codes there are, the mask code included.
      durations: whether the run-length tokens follow the codes.
    """

    first_id: int
    codes: int
    durations: bool

    @property
    def start_id(self) -> int:
        return self.first_id

    @property
    def end_id(self) -> int:
        return self.first_id + 1

    @property
    def size(self) -> int:
        """Number of ids taken, from ``first_id`` on."""
        return 2 + self.codes + (LONGEST_RUN - SHORTEST_RUN + 1 if self.durations else 0)

    def ids(self, codes: Sequence[int], compressed: bool = False) -> list[int]:
        """Sound codes as language-model ids with start and end around them.

        ``SoundVocabulary(100, 8, True).ids([3, 3, 5])`` -> ``[100, 105, 105, 107, 101]``; compressed, with the id of
        ``<|duration_02|>`` in front of the run, ``[100, 110, 105, 107, 101]``.

        Args:
          codes: of the speech tokenizer.
          compressed: whether runs become a duration and one code, as in ``compressed_sound_text``.

        Raises:
          InputError: a code outside ``[0, codes)``, or no duration tokens to compress with; codes are checked, never clipped.
        """
        codes = [int(code) for code in codes]
        wrong = [code for code in codes if not 0 <= code < self.codes]
        if wrong:
            raise InputError(
                f"sound code {wrong[0]} found, expected 0 to {self.codes - 1}: "
                "the codes come from another speech tokenizer than the language model's"
            )
        if not compressed:
            return [self.start_id, *(self.first_id + 2 + code for code in codes), self.end_id]
        if not self.durations:
            raise InputError("sound is to be compressed, but the vocabulary has no duration tokens; extend it with durations")
        items: list[int] = []
        for code, length in run_lengths(codes):
            if length >= SHORTEST_RUN:
                items.append(self._first_duration_id + length - SHORTEST_RUN)
            items.append(self.first_id + 2 + code)
        return [self.start_id, *items, self.end_id]

    def codes_of(self, ids: Sequence[int]) -> list[int]:
        """The codes of one span of ids, plain or compressed: the inverse of ``ids``.

        ``SoundVocabulary(100, 8, True).codes_of([100, 110, 105, 107, 101])`` -> ``[3, 3, 5]``.

        Raises:
          InputError: ids that are not one span from start to end, or a duration without a code after it.
        """
        ids = [int(index) for index in ids]
        if len(ids) < 2 or ids[0] != self.start_id or ids[-1] != self.end_id:
            raise InputError(f"ids {ids[:8]} found, expected {self.start_id} … {self.end_id}: sound from its start to its end")
        codes: list[int] = []
        length = 1
        for index in ids[1:-1]:
            code = index - self.first_id - 2
            if self.is_duration(index) and length == 1:
                length = index - self._first_duration_id + SHORTEST_RUN
            elif 0 <= code < self.codes:
                codes += [code] * length
                length = 1
            else:
                raise InputError(f"id {index} found inside sound, expected a code, or one duration and a code")
        if length > 1:
            raise InputError(f"{duration_token(length)} found at the end of sound, expected a code after it")
        return codes

    def is_duration(self, token_id: int) -> bool:
        """Whether ``token_id`` is a run length, which says nothing without the code after it."""
        return self.durations and self._first_duration_id <= token_id < self.first_id + self.size

    @property
    def _first_duration_id(self) -> int:
        return self.first_id + 2 + self.codes


def run_lengths(codes: Iterable[int]) -> list[tuple[int, int]]:
    """``[7, 7, 7, 1]`` -> ``[(7, 3), (1, 1)]``; a run of more than 49, the longest that has a token, is several."""
    runs: list[tuple[int, int]] = []
    for code in map(int, codes):
        if runs and runs[-1][0] == code and runs[-1][1] < LONGEST_RUN:
            runs[-1] = (code, runs[-1][1] + 1)
        else:
            runs.append((code, 1))
    return runs


def sound_text(codes: Iterable[int]) -> str:
    """``[12, 3]`` -> ``'<|sound_start|><|sound_0012|><|sound_0003|><|sound_end|>'``."""
    return SOUND_START + "".join(map(sound_token, map(int, codes))) + SOUND_END


def compressed_sound_text(codes: Iterable[int]) -> str:
    """As ``sound_text``, with runs of two and more equal codes as a duration and one code.

    ``[7, 7, 7, 1]`` -> ``'<|sound_start|><|duration_03|><|sound_0007|><|sound_0001|><|sound_end|>'``. A run longer than 49
    is written as several.
    """
    body = "".join(
        (duration_token(length) if length >= SHORTEST_RUN else "") + sound_token(code) for code, length in run_lengths(codes)
    )
    return SOUND_START + body + SOUND_END


def parse_sound_text(text: str) -> list[int]:
    """The codes of one ``sound_text`` or ``compressed_sound_text``.

    Raises:
      InputError: when ``text`` holds anything else than one such span, or a duration that has no token (2 to 49 have one).
    """
    span = _SPAN.fullmatch(text.strip())
    if span is None:
        raise InputError(f"found {text[:60]!r}, expected {SOUND_START}…{SOUND_END}")
    end = _ITEMS.match(span[1]).end()
    if end != len(span[1]):
        raise InputError(f"{span[1][end : end + 40]!r} found among sound tokens, expected items like {sound_token(0)!r}")
    codes: list[int] = []
    for duration, code in _ITEM.findall(span[1]):
        length = int(duration or 1)
        if duration and not SHORTEST_RUN <= length <= LONGEST_RUN:
            raise InputError(f"{duration_token(length)} found, expected a duration of {SHORTEST_RUN} to {LONGEST_RUN}")
        codes += [int(code)] * length
    return codes


def split_sound_text(text: str) -> list[str | list[int]]:
    """Released data rows hold sound spans inside text: ``'Hi <|sound_start|>…<|sound_end|>!'`` -> ``['Hi ', [codes], '!']``.

    Only for rows of a data set that is declared to hold sound text; a user's own words never pass through here.

    Raises:
      InputError: a span that holds anything but sound tokens, or one that is opened and not closed or the other way round.
    """
    parts: list[str | list[int]] = []
    position = 0
    for span in _SPAN.finditer(text):
        if span.start() > position:
            parts.append(text[position : span.start()])
        parts.append(parse_sound_text(span[0]))
        position = span.end()
    if position < len(text):
        parts.append(text[position:])
    for part in parts:
        for mark in (SOUND_START, SOUND_END):
            if isinstance(part, str) and mark in part:
                found = part[part.index(mark) :][:60]
                raise InputError(f"{found!r} found, expected {SOUND_START}…{SOUND_END}: half of a sound span")
    return parts
