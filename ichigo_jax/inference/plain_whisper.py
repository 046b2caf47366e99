"""A Whisper to call by itself: what every speech tokenizer on it is measured against."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ichigo_jax.audio.log_mel import log_mel
from ichigo_jax.errors import InputError
from ichigo_jax.inference.clips import MAX_BYTES, MAX_SECONDS, Batch, ClipBatches
from ichigo_jax.inference.speech_to_text import SpeechToText
from ichigo_jax.inference.speech_tokenizer import KIND as SPEECH_TOKENIZER
from ichigo_jax.inference.speech_tokenizer import SpeechTokenizer
from ichigo_jax.models.speech_tokenizer import FRAMES_PER_STATE, SAMPLES_PER_STATE
from ichigo_jax.models.split import SplitModel, jit_model
from ichigo_jax.models.whisper import Whisper, WhisperConfig
from ichigo_jax.storage.model_folder import folder_kind, load_config, load_model

if TYPE_CHECKING:
    from ichigo_jax.text.whisper import WhisperText

KIND = "whisper"


class PlainWhisper(SpeechToText):
    """Whisper without a bottleneck: speech to text, as ``whisper.decode`` does it.

    Attributes:
      config: every number of the model.
    """

    def __init__(
        self,
        model: Whisper,
        config: WhisperConfig,
        tokenizer: WhisperText | None,
        *,
        batch_size: int = 16,
        max_seconds: float = MAX_SECONDS,
        max_bytes: int = MAX_BYTES,
        mesh: Mesh | None = None,
    ):
        """See ``from_pretrained``; this is for a model that is in memory already."""
        self.config = config
        batches = ClipBatches(config.n_audio_ctx * SAMPLES_PER_STATE, SAMPLES_PER_STATE, batch_size)
        super().__init__(model.decoder, config, tokenizer, batches, max_seconds, max_bytes, mesh)
        self._model = SplitModel(model, mesh)

    @classmethod
    def _load(cls, folder: Path, dtype: jnp.dtype, mesh: Mesh | None) -> tuple[Whisper, WhisperConfig]:
        config = load_config(folder, KIND, WhisperConfig)
        return load_model(folder, lambda rngs: Whisper(config, rngs), dtype, mesh), config

    def _hear(self, batch: Batch) -> jax.Array:
        return _encoded(self._model, batch.samples)

    def _has_sound(self, samples: int) -> bool:
        return samples >= SAMPLES_PER_STATE


def load_speech_to_text(folder: str | os.PathLike, **limits) -> SpeechToText:
    """A ``SpeechTokenizer`` or a ``PlainWhisper``, by what the model folder holds; ``limits`` as theirs.

    Raises:
      InputError: a folder of neither.
    """
    kind = folder_kind(folder)
    if kind not in (SPEECH_TOKENIZER, KIND):
        raise InputError(f"{folder}: found a model of kind {kind!r}, expected a speech tokenizer or a Whisper")
    return (PlainWhisper if kind == KIND else SpeechTokenizer).from_pretrained(folder, **limits)


@jit_model()
def _encoded(model: Whisper, samples: jax.Array) -> jax.Array:
    """Whisper's states of clips [B, S] that end in silence, which is how Whisper was trained. -> [B, T, D]"""
    config, lengths = model.config, jnp.full(len(samples), samples.shape[1], jnp.int32)
    mel = log_mel(samples, lengths, mels=config.n_mels, frames=FRAMES_PER_STATE * config.n_audio_ctx)
    return model.encoder(mel)
