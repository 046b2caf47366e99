"""A speech tokenizer to call: clips in; sound codes, decoder states or text out."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from ichigo_jax.audio.split import TARGET_SECONDS
from ichigo_jax.errors import InputError, check_jaxlib
from ichigo_jax.inference.clips import MAX_BYTES, MAX_SECONDS, Audio, Batch, ClipBatches, read_clips
from ichigo_jax.inference.decoding_options import WHISPER_DEFAULTS, DecodingOptions, DecodingResult
from ichigo_jax.inference.dtypes import Dtype, checked_dtype
from ichigo_jax.inference.sizes import power_of_two
from ichigo_jax.models.speech_tokenizer import SpeechTokenizerConfig, SpeechTokenizerModel
from ichigo_jax.models.split import SplitModel, jit_model
from ichigo_jax.parallel import hosts
from ichigo_jax.storage.model_folder import TOKENIZER_FOLDER, fingerprint, load_arrays, load_config, load_model

if TYPE_CHECKING:
    from ichigo_jax.text.whisper import WhisperText

KIND = "speech_tokenizer"


class SpeechTokenizer:
    """Whisper with a vector-quantised bottleneck.

    Clips run in batches of few sizes (``clips.ClipBatches``); every clip is padded to the encoder's context as the originals
    do. Threads decode files while the device is busy with the batch before.

    Attributes:
      config: every number of the model.
    """

    def __init__(
        self,
        model: SpeechTokenizerModel,
        config: SpeechTokenizerConfig,
        tokenizer: WhisperText | None,
        *,
        batch_size: int = 16,
        max_seconds: float = MAX_SECONDS,
        max_bytes: int = MAX_BYTES,
        mesh: Mesh | None = None,
    ):
        """See ``from_pretrained``; this is for a model that is in memory already.

        Args:
          model: the weights, laid out over ``mesh`` where there is one.
          config: of the same.
          tokenizer: Whisper's text tokenizer.
          batch_size: the most pieces of audio that run together.
          max_seconds: the longest file that is decoded.
          max_bytes: the most memory that decoding one file may take.
          mesh: whose devices compute together; None: those that hold the weights, or the mesh that the caller has set.

        Raises:
          InputError: a text tokenizer with more ids than the decoder has, or a batch size below 1.
        """
        self.config = config
        self._batches = ClipBatches(config.context_samples, config.samples_per_code, batch_size)
        self._max_seconds, self._max_bytes = max_seconds, max_bytes
        if tokenizer is not None:
            self.tokenizer = self._checked(tokenizer)
        self._model, self._decoder = SplitModel(model, mesh), SplitModel(model.whisper.decoder, mesh)
        self._folder: Path | None = None

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
    ) -> SpeechTokenizer:
        """Loads a model folder.

        Args:
          folder: from an import or from training.
          dtype: the parameters' precision, "float32" or "bfloat16"; codebooks stay float32.
          batch_size, max_seconds, max_bytes: see ``__init__``.
          mesh: from ``parallel.make_mesh``: its devices share the weights and compute together, for models that one device
            cannot hold. None: the default device alone.

        Raises:
          InputError: not a folder of a speech tokenizer, one that is not whole, another dtype, or a mesh that does not
            divide the weights.
        """
        check_jaxlib()
        dtype = checked_dtype(dtype)
        folder = Path(folder)
        config = load_config(folder, KIND, SpeechTokenizerConfig)
        model = load_model(folder, lambda rngs: SpeechTokenizerModel(config, rngs), dtype, mesh)
        limits = {"batch_size": batch_size, "max_seconds": max_seconds, "max_bytes": max_bytes}
        speech_tokenizer = cls(model, config, None, **limits, mesh=mesh)
        speech_tokenizer._folder = folder
        return speech_tokenizer

    @functools.cached_property
    def tokenizer(self) -> WhisperText | None:
        """Whisper's text tokenizer, or None when there is none; then nothing can be transcribed."""
        if self._folder is None or not (self._folder / TOKENIZER_FOLDER).is_dir():
            return None
        from ichigo_jax.text.whisper import WhisperText  # here: it takes seconds to import, and sound tokens need no text

        return self._checked(WhisperText.from_folder(self._folder / TOKENIZER_FOLDER))

    def _checked(self, tokenizer: WhisperText) -> WhisperText:
        if tokenizer.size > self.config.whisper.n_vocab:
            raise InputError(
                f"text tokenizer with {tokenizer.size} ids found, the model has n_vocab {self.config.whisper.n_vocab}"
            )
        return tokenizer

    @property
    def arrays(self) -> dict[str, Any]:
        """The parameters and buffers as they were loaded, a nested dictionary."""
        return self._model.state()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the weights as they are stored, the same whatever ``dtype`` they were loaded in."""
        if self._folder is None:
            return fingerprint(self.arrays)
        return fingerprint(unflatten_dict(load_arrays(self._folder)))

    def encode(self, audio: Sequence[Audio]) -> list[np.ndarray]:
        """Sound codes of a batch of clips of any length; what is longer than a context is cut where it is quiet.

        Args:
          audio: 1-D float arrays at 16 kHz, or files.

        Returns:
          For each clip its codes, int32 [n], or [n, Q] where there are Q > 1 quantisers. A clip too short for one code
          has none.

        Raises:
          AudioError: a clip that cannot be used; nothing is returned for the others either.
        """
        return list(self.encode_each(audio))

    def encode_each(self, audio: Iterable[Audio]) -> Iterator[np.ndarray]:
        """As ``encode``, of clips that come one by one; each one's codes as soon as its batch is done, in order."""

        def start(batch: Batch) -> jax.Array:
            return tokenize(self._model, batch.samples, batch.lengths)

        def finish(batch: Batch, found: jax.Array) -> Iterator[np.ndarray]:
            for piece, codes in zip(batch.pieces, hosts.whole_array(found)):
                ends = self.config.quantizer.mask_code is not None  # a model without it has codes for what follows the clip
                yield codes[: self.config.code_count(len(piece.samples))] if ends else codes

        for pieces in self._batches.run(self._read(audio), self._batches.context_seconds, start, finish):
            codes = np.concatenate(pieces)
            yield codes[:, 0] if self.config.quantizer.num_quantizers == 1 else codes

    def dequantize(self, tokens: Sequence[np.ndarray]) -> np.ndarray:
        """What the decoder would hear.

        Args:
          tokens: for each clip its codes as ``encode`` gives them, at most a context's.

        Returns:
          [B, n_audio_ctx, D] float32.

        Raises:
          InputError: codes that this tokenizer does not have, or more of them than a context holds.
        """
        rows = [self._full_context(codes) for codes in tokens]
        states = []
        for start in range(0, len(rows), self._batches.batch_size):
            batch = rows[start : start + self._batches.batch_size]
            filled = np.stack([*batch, *batch[:1] * (power_of_two(len(batch)) - len(batch))])
            found = hosts.whole_array(_dequantize(self._model, filled))
            states.append(found[: len(batch)].astype(np.float32))
        shape = (0, self.config.whisper.n_audio_ctx, self.config.whisper.n_audio_state)
        return np.concatenate(states) if states else np.zeros(shape, np.float32)

    def transcribe(
        self,
        audio: Sequence[Audio],
        options: DecodingOptions = WHISPER_DEFAULTS,
        *,
        language: str | None | EllipsisType = ...,
    ) -> list[str]:
        """What is said, as the decoder hears it through the codes; nothing (``""``) in a clip too short for one code.

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
            raise InputError("this speech tokenizer has no text tokenizer, so it cannot transcribe; add Whisper's to its folder")
        from ichigo_jax.inference.transcription import Transcriber  # here: it takes seconds to import, see ``tokenizer``

        transcriber = Transcriber(self._decoder, self.config.whisper, self.tokenizer, options)
        numbers = itertools.count()
        language = options.language

        def start(batch: Batch) -> jax.Array:
            return _heard(self._model, batch.samples, batch.lengths)

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
                result if self.config.code_count(len(piece.samples)) else dataclasses.replace(result, tokens=(), text="")
                for piece, result in zip(batch.pieces, found)
            ]

        longest = min(self._batches.context_seconds, TARGET_SECONDS)
        return self._batches.run(self._read(audio), longest, start, finish)

    def _read(self, audio: Iterable[Audio]) -> Iterator[np.ndarray]:
        return read_clips(audio, self._max_seconds, self._max_bytes)

    def _full_context(self, codes: np.ndarray) -> np.ndarray:
        """Codes [n] or [n, Q], checked and filled up: [T / downsample, Q]."""
        quantizer = self.config.quantizer
        codes = np.asarray(codes)
        if codes.ndim == 1:
            codes = codes[:, None]
        if codes.ndim != 2 or codes.shape[1] != quantizer.num_quantizers or not np.issubdtype(codes.dtype, np.integer):
            raise InputError(
                f"codes of shape {codes.shape} and type {codes.dtype} found, expected integers "
                f"for {quantizer.num_quantizers} quantisers"
            )
        if len(codes) > quantizer.code_positions:
            raise InputError(f"{len(codes)} codes found, expected at most {quantizer.code_positions}: give a context at a time")
        wrong = codes[(codes < 0) | (codes >= quantizer.codes)]
        if wrong.size:
            raise InputError(f"sound code {wrong[0]} found, expected 0 to {quantizer.codes - 1}: are they another tokenizer's?")
        missing = quantizer.code_positions - len(codes)
        return np.pad(codes.astype(np.int32), ((0, missing), (0, 0)), constant_values=quantizer.mask_code or 0)


def spoken_text(pieces: Iterable[DecodingResult], options: DecodingOptions) -> str:
    """The text of a clip: of those of its pieces that are not silence."""
    return " ".join(piece.text for piece in pieces if piece.text and not piece.is_silence(options))


@jit_model()
def tokenize(model: SpeechTokenizerModel, samples: jax.Array, lengths: jax.Array) -> jax.Array:
    return model.tokenize(samples, lengths)


@jit_model()
def _dequantize(model: SpeechTokenizerModel, codes: jax.Array) -> jax.Array:
    return model.states_from_codes(codes)


@jit_model()
def _heard(model: SpeechTokenizerModel, samples: jax.Array, lengths: jax.Array) -> jax.Array:
    return model.states_from_codes(model.tokenize(samples, lengths))
