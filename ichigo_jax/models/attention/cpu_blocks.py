"""Attention on CPUs over long rows without a mask: one head after the other, some of its keys at a time.

All heads' scores at once fall out of a CPU's caches: of Whisper's 1500 x 1500 that takes twice as long.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LONG = 1 << 20  # scores a head from which this is used; of a few hundred positions it is as fast, and its gradient faster
KEYS_AT_A_TIME = 512


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax over blocks of keys (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax",
    https://arxiv.org/abs/1805.02867). [B, K, N/K, T, H], [B, K, S, H] twice -> [B, K, N/K, T, H]."""
    S = k.shape[2]
    size = next(size for size in range(min(S, KEYS_AT_A_TIME), 0, -1) if S % size == 0)

    def head(qkv: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v = qkv
        q = q * q.shape[-1] ** -0.5

        def more_keys(so_far, keys_values):
            largest, total, out = so_far
            k, v = keys_values
            scores = jnp.einsum("gth,sh->gts", q, k, preferred_element_type=jnp.float32)
            new = jnp.maximum(largest, scores.max(-1, keepdims=True))
            weights, shrunk = jnp.exp(scores - new), jnp.exp(largest - new)
            out = out * shrunk + jnp.einsum("gts,sh->gth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return (new, total * shrunk + weights.sum(-1, keepdims=True), out), None

        column = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
        blocks = (k.reshape(-1, size, k.shape[-1]), v.reshape(-1, size, v.shape[-1]))
        (_, total, out), _ = jax.lax.scan(more_keys, (column - jnp.inf, column, jnp.zeros(q.shape, jnp.float32)), blocks)
        return (out / total).astype(v.dtype)

    heads = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    return jax.lax.map(head, tuple(heads)).reshape(q.shape)
