"""Beam search over a batch of prompts, as ``whisper.decoding`` does it (Radford et al. 2022, https://arxiv.org/abs/2212.04356).

Axis letters beside the usual ones: G beams of a prompt, C ended answers, S tokens of an answer.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ichigo_jax.decoding.loop import Choice


class Beams(NamedTuple):
    """G answers that go on and up to C that have ended, for each of B prompts.

    Attributes:
      step: int32, tokens of every answer that goes on.
      tokens: int32 [B, G, S].
      logprobs: float32 [B, G].
      ended: int32 [B], how many have.
      ended_tokens: int32 [B, C, S].
      ended_logprobs: float32 [B, C].
    """

    step: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    ended: jax.Array
    ended_tokens: jax.Array
    ended_logprobs: jax.Array


class BeamSearch(NamedTuple):
    """A ``loop.Selector``: the G likeliest beginnings at every step, until C answers have ended for every prompt.

    A prompt that has its C answers stands still, so that it does not depend on the others.

    Attributes:
      end: int32 scalar, the token that ends an answer.
      never: bool [V], tokens that no answer has.
      never_first: bool [V], tokens that no answer begins with.
    """

    end: jax.Array
    never: jax.Array
    never_first: jax.Array

    def initial_state(self, active: jax.Array, group: int, candidates: int, longest: int) -> Beams:
        """Before the first token; ``active`` is bool [B], the other prompts only fill the batch up."""
        B = len(active)
        return Beams(
            step=jnp.int32(0),
            tokens=jnp.full((B, group, longest), self.end, jnp.int32),
            logprobs=jnp.full((B, group), -jnp.inf).at[:, 0].set(0.0),  # at first all beams are alike: one of them counts
            ended=jnp.where(active, 0, candidates).astype(jnp.int32),
            ended_tokens=jnp.full((B, candidates, longest), self.end, jnp.int32),
            ended_logprobs=jnp.full((B, candidates), -jnp.inf),
        )

    def choose(self, state: Beams, logits: jax.Array) -> Choice:
        """See ``loop.Selector``; rows are beams, R = B · G."""
        B, G, _ = state.tokens.shape
        C = state.ended_tokens.shape[1]
        prompts = jnp.arange(B)[:, None]
        never = jnp.where(state.step == 0, self.never_first, self.never)
        # With one token more than beams to each beam, there are enough to go on with, should all beams end as well.
        logprobs = jax.nn.log_softmax(jnp.where(never, -jnp.inf, logits)).reshape(B, G, -1)
        best, tokens = jax.lax.top_k(logprobs, G + 1)
        totals = (state.logprobs[..., None] + best).reshape(B, -1)
        order = jnp.argsort(-totals, axis=-1, stable=True)
        totals = totals[prompts, order]
        tokens = tokens.reshape(B, -1)[prompts, order].astype(jnp.int32)
        parents = order // (G + 1)
        ends = tokens == self.end

        # Of the beams that end, only those that are likelier than the last that goes on.
        likelier = jnp.cumsum(~ends, axis=-1) - ~ends < G
        ending = ends & likelier
        places = jnp.where(ending, state.ended[:, None] + jnp.cumsum(ending, axis=-1) - 1, C)
        going_on = jnp.argsort(ends, axis=-1, stable=True)[:, :G]  # the first that do not end
        full = state.ended >= C
        keep = lambda old, new: jnp.where(full.reshape(B, *[1] * (old.ndim - 1)), old, new)  # noqa: E731
        sources = parents[prompts, going_on]
        longer = state.tokens[prompts, sources].at[:, :, state.step].set(tokens[prompts, going_on])
        ended_tokens = state.ended_tokens.at[prompts, places].set(state.tokens[prompts, parents], mode="drop")
        new = Beams(
            step=state.step + 1,
            tokens=keep(state.tokens, longer),
            logprobs=keep(state.logprobs, totals[prompts, going_on]),
            ended=jnp.minimum(state.ended + ending.sum(-1, dtype=jnp.int32), C),
            ended_tokens=keep(state.ended_tokens, ended_tokens),
            ended_logprobs=keep(state.ended_logprobs, state.ended_logprobs.at[prompts, places].set(totals, mode="drop")),
        )
        return Choice(new, tokens[prompts, going_on].reshape(-1), (prompts * G + sources).reshape(-1))

    def unfinished(self, state: Beams) -> jax.Array:
        """See ``loop.Selector``."""
        wanting = ~jnp.all(state.ended >= state.ended_tokens.shape[1])
        return wanting & (state.step < state.tokens.shape[-1])

    def answers(self, state: Beams) -> tuple[jax.Array, jax.Array]:
        """The ended answers in the order in which they ended, then the likeliest that have not, as many as make G in all.

        Returns:
          Tokens int32 [B, C + G, S] and log-probabilities float32 [B, C + G], -inf where there is no answer.
        """
        B, G, _ = state.tokens.shape
        prompts = jnp.arange(B)[:, None]
        missing = jnp.arange(G) < G - state.ended[:, None]
        likeliest = jnp.argsort(-state.logprobs, axis=-1)
        unended = jnp.where(missing, state.logprobs[prompts, likeliest], -jnp.inf)
        tokens = jnp.concatenate([state.ended_tokens, state.tokens[prompts, likeliest]], axis=1)
        return tokens, jnp.concatenate([state.ended_logprobs, unended], axis=1)
