"""Scaled dot-product attention, one function for every model here."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Softmax(q·k/sqrt(H))·v with scores and softmax in float32.

    Args:
      q: [B, T, N, H].
      k: [B, S, K, H]; K divides N, and N/K consecutive query heads share one key/value head.
      v: [B, S, K, H].
      mask: bool, broadcastable to [B, 1, T, S]; True where a query may look. None: everywhere.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    # Heads ahead of time: batched matrix products over contiguous [T, H] blocks are several times faster on CPU.
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32) * H**-0.5
    if mask is not None:
        scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bksh->bkgth", weights, v)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def causal_mask(query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
    """True where a key is not after the query. [B, T], [B, S] -> [B, 1, T, S]."""
    return (key_positions[:, None, :] <= query_positions[:, :, None])[:, None]
