"""Autoregressive generation: prefill, then one token a step, as pure functions under jit.

A batch of prompts is padded on the right. A token's cache slot is its position, so what the padding leaves behind is
overwritten before any later token looks at it, and every row counts from its own length.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ichigo_jax.inference.sampling import Sampling, choose
from ichigo_jax.models.llama import Cache


class Decoding(NamedTuple):
    """Everything that one step hands to the next.

    Attributes:
      step: int32, how many tokens every row has got.
      token: int32 [B], the newest token of every row, not yet in the cache.
      position: int32 [B], where it goes.
      finished: bool [B].
      seen: bool [B, V], tokens of the prompt and of the answer.
      answer: int32 [B, S], the tokens so far from column 0 on.
      cache: keys and values of all tokens before ``token``.
    """

    step: jax.Array
    token: jax.Array
    position: jax.Array
    finished: jax.Array
    seen: jax.Array
    answer: jax.Array
    cache: Cache | list[Cache]


class Options(NamedTuple):
    """What stays the same from step to step, all traced.

    Attributes:
      sampling: how tokens are chosen.
      stop_ids: int32 [n], tokens that end a row.
      limits: int32 [B], the most tokens a row may get.
      key: random key of the whole generation.
    """

    sampling: Sampling
    stop_ids: jax.Array
    limits: jax.Array
    key: jax.Array


@functools.partial(jax.jit, static_argnames=("graphdef", "cache_length"))
def prefill(
    graphdef: nnx.GraphDef, state: nnx.State, tokens: jax.Array, lengths: jax.Array, options: Options, cache_length: int
) -> Decoding:
    """Reads the prompts and chooses the first token of every answer.

    Args:
      graphdef: of a ``Llama``.
      state: of the same.
      tokens: int32 [B, P], padded on the right with anything.
      lengths: int32 [B], from 1 to P.
      options: see ``Options``; a row with limit 0 is finished from the start.
      cache_length: slots S, at least the largest length + limit.
    """
    model = nnx.merge(graphdef, state)
    B, P = tokens.shape
    cache = model.init_cache(B, cache_length)
    positions = jnp.broadcast_to(jnp.arange(P), (B, P))
    hidden, cache = model(tokens, positions, cache=cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    logits = model.logits(last)[:, 0]
    # Padding is moved out of range, where the scatter drops it.
    real = jnp.where(positions < lengths[:, None], tokens, logits.shape[-1])
    seen = jnp.zeros(logits.shape, bool).at[jnp.arange(B)[:, None], real].set(True, mode="drop")
    start = Decoding(
        step=jnp.int32(0),
        token=jnp.zeros(B, jnp.int32),
        position=lengths - 1,
        finished=options.limits <= 0,
        seen=seen,
        answer=jnp.zeros((B, cache_length), jnp.int32),
        cache=cache,
    )
    return _take_token(start, logits, options)


@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("decoding",))
def decode_step(graphdef: nnx.GraphDef, state: nnx.State, decoding: Decoding, options: Options) -> Decoding:
    """Chooses the next token of every row."""
    return _step(nnx.merge(graphdef, state), decoding, options)


@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("decoding",))
def decode_all(graphdef: nnx.GraphDef, state: nnx.State, decoding: Decoding, options: Options) -> Decoding:
    """Steps until every row is finished, without returning to the host."""
    model = nnx.merge(graphdef, state)
    return jax.lax.while_loop(
        lambda decoding: ~jnp.all(decoding.finished), lambda decoding: _step(model, decoding, options), decoding
    )


def _step(model: nnx.Module, decoding: Decoding, options: Options) -> Decoding:
    hidden, cache = model(decoding.token[:, None], decoding.position[:, None], cache=decoding.cache)
    return _take_token(decoding._replace(cache=cache), model.logits(hidden)[:, 0], options)


def _take_token(decoding: Decoding, logits: jax.Array, options: Options) -> Decoding:
    """Chooses from logits [B, V] and notes the choice; finished rows get token 0, which nobody reads."""
    key = jax.random.fold_in(options.key, decoding.step)
    token = jnp.where(decoding.finished, 0, choose(logits, decoding.seen, options.sampling, key))
    step = decoding.step + 1
    return Decoding(
        step=step,
        token=token,
        position=decoding.position + 1,
        finished=decoding.finished | jnp.isin(token, options.stop_ids) | (step >= options.limits),
        seen=decoding.seen.at[jnp.arange(token.shape[0]), token].set(True),
        answer=decoding.answer.at[:, decoding.step].set(token),
        cache=decoding.cache,
    )
