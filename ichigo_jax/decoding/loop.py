"""The loop that every decoder here runs in: read the prompts, then choose a token for every row, step after step.

Three parts meet in it. A ``Decoder`` turns tokens into logits and keeps a cache. A ``Selector`` chooses from logits
(``sampling.Sampler``, ``beam_search.BeamSearch``) and keeps its own state. ``Decoding`` is what one step hands to the next.
All functions are pure and run inside ``jax.jit``. Axis letters beside the usual ones: R rows, P tokens of a prompt.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ichigo_jax.models.kv_cache import Caches, repeat_rows, take_rows


class Decoder(Protocol):
    """A model that goes on from a cache; ``models.llama.Llama`` is one, and ``whisper.ClipDecoder``."""

    def init_cache(self, batch: int, length: int) -> Caches:
        """An empty cache of ``length`` slots for each of ``batch`` rows."""

    def decode(
        self, tokens: jax.Array, positions: jax.Array, cache: Caches, wanted: jax.Array | None = None
    ) -> tuple[jax.Array, Caches]:
        """Reads tokens.

        Args:
          tokens: int32 [R, T].
          positions: int32 [R, T], each token's position, which is its slot.
          cache: from ``init_cache`` or the call before.
          wanted: int32 [R, n], which of the T tokens' logits to return; None: of all.

        Returns:
          float32 logits [R, n or T, V] and the cache with these tokens.
        """


class Choice(NamedTuple):
    """What a selector made of one step's logits.

    Attributes:
      state: the selector's state with the choice in it.
      tokens: int32 [R], the tokens to read next.
      sources: int32 [R], the row that each row goes on from; None: every row goes on from itself.
    """

    state: Any
    tokens: jax.Array
    sources: jax.Array | None


class Selector(Protocol):
    """Chooses the next token of every row."""

    def choose(self, state: Any, logits: jax.Array) -> Choice:
        """From logits float32 [R, V]."""

    def unfinished(self, state: Any) -> jax.Array:
        """bool scalar: whether any row still wants a token."""


class Decoding(NamedTuple):
    """What one step hands to the next.

    Attributes:
      state: the selector's.
      tokens: int32 [R], the newest token of every row, not yet in the cache.
      positions: int32 [R], where they go.
      cache: keys and values of all tokens before.
    """

    state: Any
    tokens: jax.Array
    positions: jax.Array
    cache: Caches


def read_prompts(
    decoder: Decoder, prompts: jax.Array, cache_length: int, wanted: jax.Array
) -> tuple[jax.Array, Caches]:  # fmt: skip
    """Logits after the ``wanted`` tokens [B, n] of prompts [B, P], padded on the right, and the cache that holds them."""
    positions = jnp.broadcast_to(jnp.arange(prompts.shape[1]), prompts.shape)
    return decoder.decode(prompts, positions, decoder.init_cache(len(prompts), cache_length), wanted)


def begin(
    selector: Selector, state: Any, logits: jax.Array, lengths: jax.Array, cache: Caches, group: int = 1
) -> Decoding:  # fmt: skip
    """Chooses the first token of every row.

    Args:
      selector: chooses.
      state: the selector's, before any choice.
      logits: float32 [B, V], after each prompt's last token.
      lengths: int32 [B], tokens of each prompt.
      cache: from ``read_prompts``.
      group: answers to each prompt, which become as many rows in a row: R = B · group.
    """
    if group > 1:
        logits, lengths, cache = jnp.repeat(logits, group, axis=0), jnp.repeat(lengths, group), repeat_rows(cache, group)
    choice = selector.choose(state, logits)
    return Decoding(choice.state, choice.tokens, lengths, cache)  # all rows of a group are alike, so sources do not matter


def step(decoder: Decoder, selector: Selector, decoding: Decoding) -> Decoding:
    """Reads every row's newest token and chooses the next."""
    logits, cache = decoder.decode(decoding.tokens[:, None], decoding.positions[:, None], decoding.cache)
    choice = selector.choose(decoding.state, logits[:, 0])
    if choice.sources is not None:
        cache = take_rows(cache, choice.sources)
    return Decoding(choice.state, choice.tokens, decoding.positions + 1, cache)


def run(decoder: Decoder, selector: Selector, decoding: Decoding) -> Decoding:
    """Steps until no row wants a token, without a return to the host."""
    return jax.lax.while_loop(
        lambda decoding: selector.unfinished(decoding.state), lambda decoding: step(decoder, selector, decoding), decoding
    )
