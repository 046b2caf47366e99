"""LayerNorm and RMSNorm, both in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from ichigo_jax.models.declare import ones, param, zeros


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, computed in float32. [..., D] -> [..., D]."""

    def __init__(self, size: int, eps: float, rngs: nnx.Rngs):
        self.scale = param(rngs, ones, (size,), ("norm",))
        self.bias = param(rngs, zeros, (size,), ("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        mean = y.mean(-1, keepdims=True)
        variance = jnp.square(y - mean).mean(-1, keepdims=True)
        y = (y - mean) * jax.lax.rsqrt(variance + self.eps)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32. [..., D] -> [..., D]."""

    def __init__(self, size: int, eps: float, rngs: nnx.Rngs):
        self.scale = param(rngs, ones, (size,), ("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return self.scale[...] * y.astype(x.dtype)
