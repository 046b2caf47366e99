"""Audio states to text tokens: the search over a Whisper decoder, with its key/value cache, inside one jit."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ichigo_jax.models.whisper import KeyValues, TextDecoder


class Search(NamedTuple):
    """What one step hands to the next.

    Attributes:
      step: int32, how many tokens every row has got.
      answer: [B, S] int32, the tokens; from column ``step`` on they are the end token.
      finished: [B] bool.
      logits: [B, V] float32, of the token to come.
      cache: keys and values of the prompt and of the answer so far.
    """

    step: jax.Array
    answer: jax.Array
    finished: jax.Array
    logits: jax.Array
    cache: KeyValues


def greedy(
    decoder: TextDecoder,
    states: jax.Array,
    prompt: jax.Array,
    end: jax.Array,
    never: jax.Array,
    active: jax.Array,
    max_tokens: int,
) -> jax.Array:
    """The likeliest token at every step, until every row has ended.

    Args:
      decoder: of Whisper.
      states: [B, T, D], the encoder's or the quantiser's.
      prompt: [P] int32, what every row starts from.
      end: int32 scalar, the token that ends a row.
      never: [V] bool, tokens that are not chosen.
      active: [B] bool; the other rows only fill up the batch and are ended from the start.
      max_tokens: S, the most tokens of an answer; P + S is at most ``n_text_ctx``.

    Returns:
      [B, S] int32, filled with ``end`` after the answer.
    """
    B, P = len(states), len(prompt)
    cross = decoder.prefill_cross(states)
    tokens, positions = jnp.broadcast_to(prompt, (B, P)), jnp.broadcast_to(jnp.arange(P), (B, P))
    logits, cache = decoder.decode(tokens, positions, cross, decoder.init_cache(B, P + max_tokens))

    def step(search: Search) -> Search:
        token = jnp.argmax(jnp.where(never, -jnp.inf, search.logits), axis=-1).astype(jnp.int32)
        token = jnp.where(search.finished, end, token)
        logits, cache = decoder.decode(token[:, None], jnp.full((B, 1), P) + search.step, cross, search.cache)
        return Search(
            step=search.step + 1,
            answer=search.answer.at[:, search.step].set(token),
            finished=search.finished | (token == end),
            logits=logits[:, -1],
            cache=cache,
        )

    start = Search(jnp.int32(0), jnp.full((B, max_tokens), end, jnp.int32), ~active, logits[:, -1], cache)
    unfinished = lambda search: (search.step < max_tokens) & ~jnp.all(search.finished)  # noqa: E731
    return jax.lax.while_loop(unfinished, step, start).answer
