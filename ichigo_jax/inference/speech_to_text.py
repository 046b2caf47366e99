"""What writes speech down: a Whisper decoder that looks at states of the clips, wherever they come from."""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ichigo_jax.audio.split import TARGET_SECONDS
from ichigo_jax.errors import InputError, check_jaxlib
from ichigo_jax.inference.clips import MAX_BYTES, MAX_SECONDS, Audio, Batch, ClipBatches, read_clips
from ichigo_jax.inference.decoding_options import WHISPER_DEFAULTS, DecodingOptions, DecodingResult
from ichigo_jax.inference.dtypes import Dtype, checked_dtype
from ichigo_jax.models.split import SplitModel
from ichigo_jax.models.whisper import TextDecoder, WhisperConfig
from ichigo_jax.storage.model_folder import TOKENIZER_FOLDER

if TYPE_CHECKING:
    from ichigo_jax.text.whisper import WhisperText


class SpeechToText(abc.ABC):
    """Clips to text; a ``SpeechTokenizer`` hears them through its codes, a ``PlainWhisper`` as they are.

    Args:
      decoder: of a Whisper.
      whisper: the numbers of that Whisper.
      tokenizer: its text tokenizer; None: that of the model folder, once ``_folder`` is set, or none.
      batches: how clips become batches.
      max_seconds: the longest file that is decoded.
      max_bytes: the most memory that decoding one file may take.
      mesh: whose devices compute together.

    Raises:
      InputError: a text tokenizer with more ids than the decoder has.
    """

    def __init__(
        self,
        decoder: TextDecoder,
        whisper: WhisperConfig,
        tokenizer: WhisperText | None,
        batches: ClipBatches,
        max_seconds: float,
        max_bytes: int,
        mesh: Mesh | None,
    ):
        self._decoder, self._whisper, self._batches = SplitModel(decoder, mesh), whisper, batches
        self._max_seconds, self._max_bytes = max_seconds, max_bytes
        self._folder: Path | None = None
        if tokenizer is not None:
            self.tokenizer = self._checked(tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        dtype: Dtype = "float32",
        *,
        batch_size: int = 16,
        max_seconds: float = MAX_SECONDS,
        max_bytes: int = MAX_BYTES,
        mesh: Mesh | None = None,
    ) -> Self:
        """Loads a model folder.

        Args:
          folder: from an import or from training.
          dtype: the parameters' precision, "float32" or "bfloat16"; codebooks stay float32.
          batch_size: the most pieces of audio that run together.
          max_seconds: the longest file that is decoded.
          max_bytes: the most memory that decoding one file may take.
          mesh: from ``parallel.make_mesh``: its devices share the weights and compute together, for models that one device
            cannot hold. None: the default device alone.

        Raises:
          InputError: a folder of another model, one that is not whole, another dtype, or a mesh that does not divide the weights.
        """
        check_jaxlib()
        folder = Path(folder)
        model, config = cls._load(folder, checked_dtype(dtype), mesh)
        loaded = cls(model, config, None, batch_size=batch_size, max_seconds=max_seconds, max_bytes=max_bytes, mesh=mesh)
        loaded._folder = folder
        return loaded

    @classmethod
    @abc.abstractmethod
    def _load(cls, folder: Path, dtype: jnp.dtype, mesh: Mesh | None) -> tuple[nnx.Module, Any]:
        """The model of a folder and its config."""

    @abc.abstractmethod
    def _hear(self, batch: Batch) -> jax.Array:
        """Sets the device to work on a batch: the states [B, T, D] that the decoder looks at."""

    @abc.abstractmethod
    def _has_sound(self, samples: int) -> bool:
        """Whether a piece of so many samples is long enough for a single state."""

    @functools.cached_property
    def tokenizer(self) -> WhisperText | None:
        """Whisper's text tokenizer, or None when there is none; then nothing can be transcribed."""
        if self._folder is None or not (self._folder / TOKENIZER_FOLDER).is_dir():
            return None
        from ichigo_jax.text.whisper import WhisperText  # here: it takes seconds to import, and sound tokens need no text

        return self._checked(WhisperText.from_folder(self._folder / TOKENIZER_FOLDER))

    def _checked(self, tokenizer: WhisperText) -> WhisperText:
        if tokenizer.size > self._whisper.n_vocab:
            raise InputError(f"text tokenizer with {tokenizer.size} ids found, the model has n_vocab {self._whisper.n_vocab}")
        return tokenizer

    def transcribe(
        self,
        audio: Sequence[Audio],
        options: DecodingOptions = WHISPER_DEFAULTS,
        *,
        language: str | None | EllipsisType = ...,
    ) -> list[str]:
        """What is said; nothing (``""``) in a clip too short for the model to hear anything.

        Args:
          audio: 1-D float arrays at 16 kHz, or files.
          options: how the text is decoded, such as ``WHISPER_DEFAULTS.replace(beam_size=5)``; English unless they say so.
          language: instead of that of the options, for whom the rest suits: "vi", or None for the likeliest one at each
            clip's start.

        Raises:
          AudioError: a clip that cannot be used; nothing is returned for the others either.
          InputError: no text tokenizer in the model folder, or options that it does not allow.
        """
        if not isinstance(options, DecodingOptions):
            raise InputError(f"options {options!r} found, expected DecodingOptions; a language is given as language={options!r}")
        if language is not ...:
            options = options.replace(language=language)
        return [spoken_text(pieces, options) for pieces in self.transcribe_each(audio, options)]

    def transcribe_each(self, audio: Iterable[Audio], options: DecodingOptions) -> Iterator[list[DecodingResult]]:
        """What is found in each piece of each clip, in order, of clips that come one by one.

        Clips over 20 s (over two thirds of a context, where that is shorter) are cut where it is quiet, as the original does:
        quality falls near the end of Whisper's context.

        Raises:
          AudioError, InputError: as ``transcribe``.
        """
        if self.tokenizer is None:
            raise InputError("this model has no text tokenizer, so it cannot transcribe; add Whisper's to its folder")
        from ichigo_jax.inference.transcription import Transcriber  # here: it takes seconds to import, see ``tokenizer``

        transcriber = Transcriber(self._decoder, self._whisper, self.tokenizer, options)
        numbers = itertools.count()
        language = options.language

        def finish(batch: Batch, states: jax.Array) -> list[DecodingResult]:
            nonlocal language  # of the clip that the pieces at hand are of
            languages = []
            detected = transcriber.detect_languages(states) if options.language is None else None
            for row, piece in enumerate(batch.pieces):
                if detected and piece.first:
                    language = detected[row]
                languages.append(language)
            found = transcriber(states, languages, list(itertools.islice(numbers, len(languages))))
            # A decoder that hears nothing of the speaker makes something up.
            return [
                result if self._has_sound(len(piece.samples)) else dataclasses.replace(result, tokens=(), text="")
                for piece, result in zip(batch.pieces, found)
            ]

        longest = min(self._batches.context_seconds, TARGET_SECONDS)
        return self._batches.run(self._read(audio), longest, self._hear, finish)

    def _read(self, audio: Iterable[Audio]) -> Iterator[np.ndarray]:
        return read_clips(audio, self._max_seconds, self._max_bytes)


def spoken_text(pieces: Iterable[DecodingResult], options: DecodingOptions) -> str:
    """The text of a clip: of those of its pieces that are not silence."""
    return " ".join(piece.text for piece in pieces if piece.text and not piece.is_silence(options))
