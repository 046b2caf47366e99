"""The decoding loop for a language model, compiled: prompts in, then a token a step or all at once.

A batch of prompts is padded on the right. What the padding leaves in the cache is overwritten before any later token looks
at it, and every row counts from its own length.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ichigo_jax.decoding import loop
from ichigo_jax.decoding.loop import Decoding
from ichigo_jax.decoding.sampling import Sampler, empty_rows
from ichigo_jax.models.llama import Llama
from ichigo_jax.models.split import jit_model

FILL = 0  # what stands after a row's last token, which nobody reads


@jit_model(static=("cache_length",))
def prefill(model: Llama, tokens: jax.Array, lengths: jax.Array, sampler: Sampler, *, cache_length: int) -> Decoding:
    """Reads the prompts and chooses the first token of every row.

    Args:
      model: the language model.
      tokens: int32 [B, P], padded on the right with anything.
      lengths: int32 [B], from 1 to P.
      sampler: how rows go on; a row with limit 0 is finished from the start.
      cache_length: slots, at least the largest length + limit.
    """
    logits, cache = loop.read_prompts(model, tokens, cache_length, wanted=(lengths - 1)[:, None])
    B, V = len(tokens), logits.shape[-1]
    # Padding is moved out of range, where the scatter drops it.
    real = jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], tokens, V)
    seen = jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], real].set(True, mode="drop")
    rows = empty_rows(sampler.limits <= 0, cache_length, FILL, seen)
    return loop.begin(sampler, rows, logits[:, 0], lengths, cache)


@jit_model(donate=("decoding",))
def step(model: Llama, sampler: Sampler, *, decoding: Decoding) -> Decoding:
    """Chooses the next token of every row; takes the memory of ``decoding``."""
    return loop.step(model, sampler, decoding)


@jit_model(donate=("decoding",))
def run(model: Llama, sampler: Sampler, *, decoding: Decoding) -> Decoding:
    """Steps until every row is finished; takes the memory of ``decoding``."""
    return loop.run(model, sampler, decoding)


class Newest(NamedTuple):
    """Of every row its newest token, int32 [R], and whether it was the last, bool [R]."""

    tokens: jax.Array
    finished: jax.Array


@jax.jit
def newest(decoding: Decoding) -> Newest:
    """Copies, which the host reads while the next step takes the memory of ``decoding``."""
    return Newest(decoding.tokens.copy(), decoding.state.finished.copy())
