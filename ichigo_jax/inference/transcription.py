"""Decoder states of a batch of clips to text: prompts, languages and temperatures around the searches, which run in jit."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from ichigo_jax.decoding import whisper
from ichigo_jax.errors import InputError
from ichigo_jax.inference.decoding_options import NON_SPEECH, DecodingOptions, DecodingResult
from ichigo_jax.inference.sizes import power_of_two
from ichigo_jax.models.split import SplitModel
from ichigo_jax.models.whisper import WhisperConfig
from ichigo_jax.parallel import hosts
from ichigo_jax.text.whisper import WhisperText

ENGLISH = "en"


class Transcriber:
    """Text of decoder states, by one set of options."""

    def __init__(self, decoder: SplitModel, config: WhisperConfig, text: WhisperText, options: DecodingOptions):
        """Checks the options.

        Args:
          decoder: a ``models.whisper.TextDecoder``.
          config: of its Whisper.
          text: its text tokenizer.
          options: how to decode.

        Raises:
          InputError: options that the vocabulary or the decoder's context does not allow.
        """
        self._decoder, self._text, self._options = decoder, text, options
        self._never = np.arange(config.n_vocab) >= text.size  # rows without a token
        if options.suppress_tokens:
            named = [index for index in options.suppress_tokens if index != NON_SPEECH]
            if wrong := [index for index in named if not 0 <= index < text.size]:
                raise InputError(f"suppress_tokens {wrong[0]} found, expected ids of 0 to {text.size - 1}, or {NON_SPEECH}")
            signs = text.non_speech if NON_SPEECH in options.suppress_tokens else ()
            self._never[[*named, *signs, *text.out_of_place]] = True
        self._never_first = self._never.copy()
        if options.suppress_blank:
            self._never_first[list(text.blank)] = True

        context = config.n_text_ctx
        sample_len = options.sample_len or context // 2
        self._earlier = self._earlier_text(context // 2 - 1)
        self._prefix = self._prefix_ids(context // 2 - sample_len)
        length = len(self._prompt(options.language or ENGLISH))
        if length > context:
            raise InputError(f"a prompt of {length} tokens found, expected at most the decoder's context, {context}; shorten it")
        self._max_tokens = min(sample_len, context - length + 1)

    def detect_languages(self, states: jax.Array) -> list[str]:
        """The likeliest language of each row; English where the vocabulary has no languages."""
        names = list(self._text.languages)
        if not names:
            return [ENGLISH] * len(states)
        ids = np.array([self._text.languages[name] for name in names], np.int32)
        logits = whisper.language_logits(self._decoder, states, np.int32(self._text.start), ids)
        return [names[index] for index in hosts.whole_array(logits).argmax(-1)]

    def __call__(self, states: jax.Array, languages: Sequence[str], numbers: Sequence[int]) -> list[DecodingResult]:
        """Decodes a batch; answers that fail a threshold are tried again, together, at the next temperature.

        Args:
          states: [B, T, D], what the decoder looks at. Rows past ``languages`` only fill up the batch.
          languages: of each row.
          numbers: of each row, non-negative; its random numbers depend on it and not on the other rows.
        """
        results: dict[int, DecodingResult] = {}
        rows = range(len(languages))
        for attempt, temperature in enumerate(self._options.temperature):
            these = states if len(rows) == len(languages) else states[np.resize(rows, power_of_two(len(rows)))]
            found = self._search(these, [languages[row] for row in rows], [numbers[row] for row in rows], attempt, temperature)
            results |= zip(rows, found)
            rows = [row for row in rows if results[row].needs_fallback(self._options)]
            if not rows:
                break
        return [results[row] for row in range(len(languages))]

    def _search(
        self, states: jax.Array, languages: Sequence[str], numbers: Sequence[int], attempt: int, temperature: float
    ) -> list[DecodingResult]:
        text, options = self._text, self._options
        rows = len(states)
        prompts = np.array([self._prompt(language) for language in languages], np.int32)
        start = whisper.Start(
            states=states,
            prompt=np.resize(prompts, (rows, prompts.shape[1])),
            end=np.int32(text.end),
            no_speech=np.int32(text.end if text.no_speech is None else text.no_speech),
            never=self._never,
            never_first=self._never_first,
            active=np.arange(rows) < len(languages),
        )
        sizes = {"group": options.group(temperature), "longest": self._max_tokens, "no_speech_at": len(self._earlier)}
        if temperature == 0 and options.beam_size is not None:
            candidates = round(options.beam_size * (options.patience or 1.0))
            answers = whisper.beam_search(self._decoder, start, candidates=candidates, **sizes)
        else:
            seeds = np.resize(np.array(numbers, np.uint32), rows)
            answers = whisper.sample(self._decoder, start, np.float32(temperature), seeds, np.uint32(attempt), **sizes)
        tokens, logprobs, no_speech = map(hosts.whole_array, answers)
        return [
            self._likeliest(tokens[row], logprobs[row], language, temperature, float(no_speech[row]))
            for row, language in enumerate(languages)
        ]

    def _likeliest(
        self, tokens: np.ndarray, logprobs: np.ndarray, language: str, temperature: float, no_speech: float
    ) -> DecodingResult:
        """Of the answers to one clip, [G, S] and [G]."""
        lengths = (tokens != self._text.end).sum(-1)
        penalty = self._options.length_penalty
        divisors = np.maximum(lengths, 1) if penalty is None else ((5 + lengths) / 6) ** penalty
        best = int(np.argmax(logprobs.astype(np.float64) / divisors))
        ids = tuple(tokens[best, : lengths[best]].tolist())
        return DecodingResult(
            tokens=ids,
            text=self._text.decode(ids),
            language=language,
            temperature=temperature,
            avg_logprob=float(logprobs[best]) / (len(ids) + 1),
            no_speech_prob=float("nan") if self._text.no_speech is None else no_speech,
        )

    def _prompt(self, language: str) -> list[int]:
        return [*self._earlier, *self._text.prompt_in(language, self._options.task), *self._prefix]

    def _earlier_text(self, longest: int) -> list[int]:
        """The end of what was said before."""
        if not self._options.prompt:
            return []
        if self._text.previous is None:
            raise InputError("prompt found, which this Whisper's vocabulary has no place for (<|startofprev|>); leave it out")
        return [self._text.previous, *self._text.encode(" " + self._options.prompt.strip())[-longest:]]

    def _prefix_ids(self, longest: int) -> list[int]:
        """How the answer begins; its end, where less than half the context is left to the answer, and all of it otherwise."""
        ids = self._text.encode(" " + self._options.prefix.strip()) if self._options.prefix else []
        return ids[-longest:] if longest > 0 else ids
