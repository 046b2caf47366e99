"""Scaled dot-product attention, one function for every model here."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Scores a head from which a CPU takes the heads one by one. All heads' scores at once fall out of its caches: of Whisper's
# 1500 x 1500 that takes twice as long. Of a few hundred positions it is as fast, and its gradient faster.
LONG = 1 << 20


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
    S, K = k.shape[1:3]
    # Heads ahead of time: batched matrix products over contiguous [T, H] blocks are several times faster on CPU.
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    if mask is None and T * S >= LONG:
        out = jax.lax.platform_dependent(q, k, v, cpu=_head_by_head, default=_all_heads)
    else:
        out = _all_heads(q, k, v, mask)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _all_heads(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """[B, K, N/K, T, H], [B, K, S, H] twice -> [B, K, N/K, T, H]."""
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bksh->bkgth", weights, v)


def _head_by_head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The same one key/value head after the other; the division by the sum comes last, on H columns instead of S."""

    def head(qkv: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v = qkv
        scores = jnp.einsum("gth,sh->gts", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        out = jnp.einsum("gts,sh->gth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (out / weights.sum(-1, keepdims=True)).astype(v.dtype)

    heads = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    return jax.lax.map(head, tuple(heads)).reshape(q.shape)


def causal_mask(query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
    """True where a key is not after the query. [B, T], [B, S] -> [B, 1, T, S]."""
    return (key_positions[:, None, :] <= query_positions[:, :, None])[:, None]
