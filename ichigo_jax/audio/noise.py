"""Noise that is added to clips in training."""

from __future__ import annotations

import jax
import jax.numpy as jnp

SILENCE = 1e-12  # mean square below which a clip is taken to be this loud


def add_noise(samples: jax.Array, lengths: jax.Array, snr_db: tuple[float, float], key: jax.Array) -> jax.Array:
    """Each clip with white noise at a signal-to-noise ratio of its own, drawn evenly from ``snr_db``.

    Args:
      samples: float32 [B, S].
      lengths: int32 [B], samples of each clip; what follows them stays as it is.
      snr_db: lowest and highest ratio of the clip's mean square to the noise's, in decibels.
      key: random key.

    Returns:
      float32 [B, S].
    """
    by_clip, by_sample = jax.random.split(key)
    inside = jnp.arange(samples.shape[1]) < lengths[:, None]
    power = jnp.where(inside, jnp.square(samples), 0.0).sum(1) / jnp.maximum(lengths, 1)
    ratio = 10 ** (jax.random.uniform(by_clip, lengths.shape, minval=snr_db[0], maxval=snr_db[1]) / 10)
    size = jnp.sqrt(jnp.maximum(power, SILENCE) / ratio)
    return samples + jnp.where(inside, size[:, None] * jax.random.normal(by_sample, samples.shape), 0.0)
