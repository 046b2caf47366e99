"""A speech tokenizer to call: clips in; sound codes, decoder states or text out."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from ichigo_jax.errors import InputError
from ichigo_jax.inference.clips import MAX_BYTES, MAX_SECONDS, Audio, Batch, ClipBatches
from ichigo_jax.inference.sizes import power_of_two
from ichigo_jax.inference.speech_to_text import SpeechToText
from ichigo_jax.models.speech_tokenizer import SpeechTokenizerConfig, SpeechTokenizerModel
from ichigo_jax.models.split import SplitModel, jit_model
from ichigo_jax.parallel import hosts
from ichigo_jax.storage.model_folder import fingerprint, load_arrays, load_config, load_model

if TYPE_CHECKING:
    from ichigo_jax.text.whisper import WhisperText

KIND = "speech_tokenizer"


class SpeechTokenizer(SpeechToText):
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
        batches = ClipBatches(config.context_samples, config.samples_per_code, batch_size)
        super().__init__(model.whisper.decoder, config.whisper, tokenizer, batches, max_seconds, max_bytes, mesh)
        self._model = SplitModel(model, mesh)

    @classmethod
    def _load(cls, folder: Path, dtype: jnp.dtype, mesh: Mesh | None) -> tuple[SpeechTokenizerModel, SpeechTokenizerConfig]:
        config = load_config(folder, KIND, SpeechTokenizerConfig)
        return load_model(folder, lambda rngs: SpeechTokenizerModel(config, rngs), dtype, mesh), config

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

    def _hear(self, batch: Batch) -> jax.Array:
        return _heard(self._model, batch.samples, batch.lengths)

    def _has_sound(self, samples: int) -> bool:
        return bool(self.config.code_count(samples))

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


@jit_model()
def tokenize(model: SpeechTokenizerModel, samples: jax.Array, lengths: jax.Array) -> jax.Array:
    return model.tokenize(samples, lengths)


@jit_model()
def _dequantize(model: SpeechTokenizerModel, codes: jax.Array) -> jax.Array:
    return model.states_from_codes(codes)


@jit_model()
def _heard(model: SpeechTokenizerModel, samples: jax.Array, lengths: jax.Array) -> jax.Array:
    return model.states_from_codes(model.tokenize(samples, lengths))
