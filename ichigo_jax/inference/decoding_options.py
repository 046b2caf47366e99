"""How text is decoded, under the names that ``whisper.DecodingOptions`` and ``whisper.transcribe`` give the choices."""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from typing import Any, Literal

from ichigo_jax.errors import InputError

_ABBREVIATION = re.compile("[a-z]{2}")
NON_SPEECH = -1  # among ``suppress_tokens``: brackets, notes and other signs that nobody says


@dataclasses.dataclass(frozen=True)
class DecodingOptions:
    """The choices. ``WHISPER_DEFAULTS`` has Whisper's own; ``WHISPER_DEFAULTS.replace(beam_size=5)`` differs in one.

    Attributes:
      task: "transcribe", or "translate" to English.
      language: Whisper's abbreviation, or what ``text.whisper.language_code`` makes one of, "English" say; None: the likeliest
        one at each clip's start.
      temperature: 0 takes the likeliest tokens, above it they are sampled. Of several the next is tried where an answer fails
        a threshold.
      sample_len: the most tokens of an answer; None: half the decoder's context.
      best_of: how many answers are sampled, of which the likeliest counts; at temperature 0 it has no effect. None: one.
      beam_size: answers that a beam search at temperature 0 follows; above it has no effect. None: greedy.
      patience: the search ends with ``beam_size * patience`` finished answers (https://arxiv.org/abs/2204.05424). None: 1.
      length_penalty: answers compare by their log-probability over ``((5 + length) / 6) ** length_penalty``
        (https://arxiv.org/abs/1609.08144); None: over their length.
      prompt: what was said before, of which the end is kept that fills half the context.
      prefix: how the answer begins; it is not repeated in the result.
      suppress_tokens: ids that are never written, and with them the special tokens that have no place in an answer;
        ``NON_SPEECH`` stands for a list of signs. Empty: every id may be written.
      suppress_blank: whether an answer may not begin with a space alone, nor be empty.
      compression_ratio_threshold: an answer fails that zlib compresses more than so many times; None: none does.
      logprob_threshold: an answer fails whose mean log-probability a token is below it; None: none does.
      no_speech_threshold: an answer counts as silence when Whisper gives "no speech" a larger probability and it fails the
        log-probability's threshold, or there is none; it is not tried again then, and its text left out. None: none does.
    """

    task: Literal["transcribe", "translate"]
    language: str | None
    temperature: tuple[float, ...]
    sample_len: int | None
    best_of: int | None
    beam_size: int | None
    patience: float | None
    length_penalty: float | None
    prompt: str | None
    prefix: str | None
    suppress_tokens: tuple[int, ...]
    suppress_blank: bool
    compression_ratio_threshold: float | None
    logprob_threshold: float | None
    no_speech_threshold: float | None

    def __post_init__(self) -> None:
        if self.task not in ("transcribe", "translate"):
            raise InputError(f"task {self.task!r} found, expected transcribe or translate")
        if not self.temperature or not all(0 <= temperature < math.inf for temperature in self.temperature):
            raise InputError(f"temperature {self.temperature} found, expected at least one number, each of 0 or more")
        for name in ("sample_len", "best_of", "beam_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} found, expected at least 1")
        for name in ("patience", "compression_ratio_threshold", "logprob_threshold", "no_speech_threshold"):
            if getattr(self, name) is not None and math.isnan(getattr(self, name)):
                raise InputError(f"{name} {getattr(self, name)} found, expected a number, or None")
        if self.patience is not None and (
            self.beam_size is None or self.patience == math.inf or round(self.beam_size * self.patience) < 1
        ):
            raise InputError(f"patience {self.patience} found with beam_size {self.beam_size}, expected a product of at least 1")
        if self.length_penalty is not None and not 0 <= self.length_penalty <= 1:
            raise InputError(f"length_penalty {self.length_penalty} found, expected 0 to 1")
        if self.language is not None and not _ABBREVIATION.fullmatch(self.language):
            from ichigo_jax.text.whisper import language_code  # here: it takes seconds to import

            object.__setattr__(self, "language", language_code(self.language))

    def replace(self, **changes: Any) -> DecodingOptions:
        """The same with other values for some fields: ``WHISPER_DEFAULTS.replace(language="vi", beam_size=5)``.

        Raises:
          InputError: a field that there is not, or a value out of range.
        """
        names = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise InputError(f"decoding option {name!r} found, expected one of {', '.join(names)}")
        return dataclasses.replace(self, **changes)

    def group(self, temperature: float) -> int:
        """Answers to a clip that are followed at once."""
        return (self.best_of if temperature > 0 else self.beam_size) or 1


WHISPER_DEFAULTS = DecodingOptions(
    task="transcribe",
    language="en",
    temperature=(0.0,),
    sample_len=None,
    best_of=None,
    beam_size=None,
    patience=None,
    length_penalty=None,
    prompt=None,
    prefix=None,
    suppress_tokens=(NON_SPEECH,),
    suppress_blank=True,
    compression_ratio_threshold=2.4,
    logprob_threshold=-1.0,
    no_speech_threshold=0.6,
)


@dataclasses.dataclass(frozen=True)
class DecodingResult:
    """What was found in one piece of audio.

    Attributes:
      tokens: the answer's ids, without prompt, prefix and end.
      text: of the same.
      language: as asked for or as found.
      temperature: that the answer was found at.
      avg_logprob: mean log-probability of the tokens and the end.
      no_speech_prob: of "no speech" in place of a language; NaN where the vocabulary has no such token.
    """

    tokens: tuple[int, ...]
    text: str
    language: str
    temperature: float
    avg_logprob: float
    no_speech_prob: float

    @property
    def compression_ratio(self) -> float:
        """How many times zlib makes the text smaller: repetitions show."""
        data = self.text.encode("utf-8")
        return len(data) / len(zlib.compress(data))

    def is_silence(self, options: DecodingOptions) -> bool:
        if options.no_speech_threshold is None or not self.no_speech_prob > options.no_speech_threshold:
            return False
        return options.logprob_threshold is None or not self.avg_logprob > options.logprob_threshold

    def needs_fallback(self, options: DecodingOptions) -> bool:
        """Whether the next temperature is to be tried."""
        unlikely = options.logprob_threshold is not None and self.avg_logprob < options.logprob_threshold
        if unlikely and self.is_silence(options):
            return False
        longest = options.compression_ratio_threshold
        return unlikely or (longest is not None and self.compression_ratio > longest)
