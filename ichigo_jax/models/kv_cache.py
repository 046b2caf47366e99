"""Keys and values of earlier tokens, kept so that a decoder reads every token once."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ichigo_jax.parallel import constrain

BATCH_FROM_END = 4  # the batch axis counted from the end: [B, S, K, H], or [L, B, S, K, H] of stacked layers


class KVCache(NamedTuple):
    """Keys and values of one layer, [B, S, K, H] each; of a stack of layers [L, B, S, K, H]. A token's slot is its position.

    A query at position p sees slots 0 to p, so a row's positions must be written from 0 on without a gap. What right
    padding leaves in later slots is overwritten by the real tokens of those positions before any query sees it.
    """

    k: jax.Array
    v: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: Any) -> KVCache:
        return cls(_laid_out(jnp.zeros(shape, dtype)), _laid_out(jnp.zeros(shape, dtype)))

    def write(self, positions: jax.Array, k: jax.Array, v: jax.Array) -> KVCache:
        """One layer's cache with new tokens in the slots of their positions; positions beyond the last slot are dropped.

        Args:
          positions: int32 [B, T], different within a row.
          k: [B, T, K, H], cast to the cache's dtype.
          v: [B, T, K, H].
        """
        rows = jnp.arange(positions.shape[0])[:, None]

        def write(cache: jax.Array, new: jax.Array) -> jax.Array:
            return _laid_out(cache.at[rows, positions].set(new.astype(cache.dtype), mode="drop", unique_indices=True))

        return KVCache(write(self.k, k), write(self.v, v))


def _laid_out(cache: jax.Array) -> jax.Array:
    """On a mesh, a device has the heads whose weights it has, and the rows that it computes."""
    return constrain(cache, *["layers"] * (cache.ndim - BATCH_FROM_END), "batch", None, "kv_heads", "head")


Caches = KVCache | list[KVCache]  # of stacked layers, or one for each layer where they lie apart


def take_rows(caches: Caches, rows: jax.Array) -> Caches:
    """The caches of rows ``rows`` [R], in that order; a row may be taken several times."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=x.ndim - BATCH_FROM_END), caches)


def repeat_rows(caches: Caches, times: int) -> Caches:
    """Every row ``times`` times, one after the other: [B, …] -> [B · times, …]."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=x.ndim - BATCH_FROM_END), caches)
