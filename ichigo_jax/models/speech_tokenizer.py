"""Whisper with the quantiser between its encoder and its decoder: speech to sound codes, and codes back to text."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from ichigo_jax.audio.log_mel import frame_count, log_mel
from ichigo_jax.errors import InputError
from ichigo_jax.models.quantizer import Quantizer, QuantizerConfig
from ichigo_jax.models.whisper import Whisper, WhisperConfig

FRAMES_PER_STATE = 2
SAMPLES_PER_STATE = 320


@dataclasses.dataclass(frozen=True)
class SpeechTokenizerConfig:
    """A Whisper and the quantiser that fits it."""

    whisper: WhisperConfig
    quantizer: QuantizerConfig

    def __post_init__(self) -> None:
        if self.quantizer.width != self.whisper.n_audio_state:
            raise InputError(
                f"a quantiser of width {self.quantizer.width} (n_head {self.quantizer.n_head} x head_width "
                f"{self.quantizer.head_width}) found, expected Whisper's n_audio_state, {self.whisper.n_audio_state}"
            )
        if self.quantizer.positions != self.whisper.n_audio_ctx:
            raise InputError(
                f"a quantiser of {self.quantizer.positions} positions found, expected Whisper's n_audio_ctx, "
                f"{self.whisper.n_audio_ctx}"
            )

    @property
    def context_samples(self) -> int:
        """The longest clip that is encoded at once, in samples at 16 kHz."""
        return self.whisper.n_audio_ctx * SAMPLES_PER_STATE

    @property
    def samples_per_code(self) -> int:
        return SAMPLES_PER_STATE * self.quantizer.downsample

    def code_count(self, length):
        """Codes that ``length`` samples (an integer or an array of them) of audio make: those that begin and end in it."""
        return frame_count(length) // FRAMES_PER_STATE // self.quantizer.downsample


class SpeechTokenizerModel(nnx.Module):
    """The weights; every method is pure and can be jitted."""

    def __init__(self, config: SpeechTokenizerConfig, rngs: nnx.Rngs):
        self.whisper = Whisper(config.whisper, rngs)
        self.quantizer = Quantizer(config.quantizer, rngs)
        self.config = config

    def log_mel(self, samples: jax.Array, lengths: jax.Array) -> jax.Array:
        """[B, S] float32 samples at 16 kHz, [B] int32 lengths -> [B, 2·T, M], padded as the originals pad."""
        whisper = self.config.whisper
        return log_mel(samples, lengths, mels=whisper.n_mels, frames=FRAMES_PER_STATE * whisper.n_audio_ctx)

    def tokenize(self, samples: jax.Array, lengths: jax.Array) -> jax.Array:
        """Sound codes of clips no longer than a context.

        Args:
          samples: [B, S] float32 at 16 kHz, anything after a clip's end.
          lengths: [B] int32 samples.

        Returns:
          [B, T / downsample, Q] int32; from ``config.code_count(length)`` on they are the mask code, in models that have one.
        """
        codes = self.quantizer.codes(self.whisper.encoder(self.log_mel(samples, lengths)))
        if self.config.quantizer.mask_code is None:
            return codes
        heard = jnp.arange(codes.shape[1]) < self.config.code_count(lengths)[:, None]
        return jnp.where(heard[..., None], codes, self.config.quantizer.mask_code)

    def states_from_codes(self, codes: jax.Array) -> jax.Array:
        """[B, at most T / downsample, Q] int32 -> [B, T, D], what the decoder looks at."""
        return self.quantizer.dequantize(codes)
