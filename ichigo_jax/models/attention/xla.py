"""Attention as XLA compiles it, with all scores in memory; on CPUs of long rows a block at a time (``cpu_blocks``)."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp

from ichigo_jax.models.attention import cpu_blocks
from ichigo_jax.models.attention.mask import Mask

# The ``jax.named_scope`` of attention under a mask. All masks here are causal ones, so that a model needs about half of what is
# computed there; ``tasks.model_flops`` counts it so.
MASKED_SCOPE = "masked_attention"


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """See ``attention.attend``."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    # Heads ahead of time: batched matrix products over contiguous [T, H] blocks are several times faster on CPU.
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    table = mask.table(T, S)
    if table is None and T * S >= cpu_blocks.LONG:
        out = jax.lax.platform_dependent(q, k, v, cpu=cpu_blocks.attend, default=_all_heads)
    else:
        with contextlib.nullcontext() if table is None else jax.named_scope(MASKED_SCOPE):
            out = _all_heads(q, k, v, table)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _all_heads(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array | None = None) -> jax.Array:
    """[B, K, N/K, T, H], [B, K, S, H] twice -> [B, K, N/K, T, H]."""
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if table is not None:
        scores = jnp.where(table[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bksh->bkgth", weights, v)
