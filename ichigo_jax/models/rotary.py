"""Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotary_angles(positions: jax.Array, inverse_frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of rotary positions, float32. [B, T], [H/2] -> two of [B, T, H/2]."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding in the rotate-half layout (first half with second half), as Hugging Face Llama and the Ichigo quantiser.

    [B, T, N, H], [B, T, H/2] twice -> [B, T, N, H].
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
