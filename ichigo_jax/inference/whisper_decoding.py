"""Audio states to text tokens: the searches over a Whisper decoder, with its key/value cache, for use inside one jit.

They follow ``whisper.decoding`` (Radford et al. 2022, https://arxiv.org/abs/2212.04356) token by token, for a batch of clips.
Axis letters beside the usual ones: G answers to a clip, P tokens of the prompt, S tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ichigo_jax.models.whisper import KeyValues, TextDecoder


class Start(NamedTuple):
    """Where an answer starts from.

    Attributes:
      prompt: [B, P] int32.
      never: [V] bool, tokens that no answer holds.
      never_first: [V] bool, tokens that no answer begins with.
      active: [B] bool; the other rows only fill up the batch and have ended from the start.
    """

    prompt: jax.Array
    never: jax.Array
    never_first: jax.Array
    active: jax.Array


class Answers(NamedTuple):
    """What a search found.

    Attributes:
      tokens: [B, G, S] int32, filled with the end token after an answer.
      logprobs: [B, G] float32, of each answer's tokens and its end, where it has one; -inf: no answer.
      no_speech: [B] float32, probability of the "no speech" token.
    """

    tokens: jax.Array
    logprobs: jax.Array
    no_speech: jax.Array


class Sampling(NamedTuple):
    """Steps of ``sample``; R = B·G rows."""

    step: jax.Array
    tokens: jax.Array  # [R, S]
    logprobs: jax.Array  # [R]
    finished: jax.Array  # [R] bool


class Beams(NamedTuple):
    """Steps of ``beam_search``: G answers that go on and up to C that have ended."""

    step: jax.Array
    tokens: jax.Array  # [B, G, S]
    logprobs: jax.Array  # [B, G]
    ended: jax.Array  # [B] int32, how many have
    ended_tokens: jax.Array  # [B, C, S]
    ended_logprobs: jax.Array  # [B, C]


def language_logits(decoder: TextDecoder, states: jax.Array, start: jax.Array, languages: jax.Array) -> jax.Array:
    """How likely each language is, judged by the decoder's first step.

    Args:
      decoder: of Whisper.
      states: [B, T, D], the encoder's or the quantiser's.
      start: int32 scalar, the token that starts a transcript.
      languages: [n] int32, the languages' tokens.

    Returns:
      [B, n] float32.
    """
    tokens = jnp.full((len(states), 1), start)
    logits, _ = decoder.decode(tokens, jnp.zeros_like(tokens), decoder.prefill_cross(states), decoder.init_cache(len(states), 1))
    return logits[:, 0, languages]


def sample(
    decoder: TextDecoder,
    states: jax.Array,
    start: Start,
    end: jax.Array,
    no_speech: jax.Array,
    heat: tuple[jax.Array, jax.Array] | None,
    *,
    group: int,
    max_tokens: int,
    no_speech_at: int,
) -> Answers:
    """The likeliest token at every step, or a random one, until every answer has ended.

    Args:
      decoder: of Whisper.
      states: [B, T, D], the encoder's or the quantiser's.
      start: prompts and what is not written.
      end: int32 scalar, the token that ends an answer.
      no_speech: int32 scalar, the token for "no speech".
      heat: temperature, a float32 scalar above 0, and random keys [B·G]; None takes the likeliest.
      group: G.
      max_tokens: S; P + S - 1 is at most ``n_text_ctx``, as the last token is not looked at.
      no_speech_at: index in the prompt after which "no speech" is asked for.
    """
    B, P = start.prompt.shape

    def choose(found: Sampling, never: jax.Array, logits: jax.Array) -> tuple[Sampling, jax.Array, None]:
        logits = jnp.where(never, -jnp.inf, logits)
        if heat is None:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            temperature, keys = heat
            draw = lambda key, row: jax.random.categorical(jax.random.fold_in(key, found.step), row)  # noqa: E731
            token = jax.vmap(draw)(keys, logits / temperature).astype(jnp.int32)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
        token = jnp.where(found.finished, end, token)
        found = Sampling(
            step=found.step + 1,
            tokens=found.tokens.at[:, found.step].set(token),
            logprobs=found.logprobs + jnp.where(found.finished, 0.0, logprob),
            finished=found.finished | (token == end),
        )
        return found, token, None

    none = Sampling(
        step=jnp.int32(0),
        tokens=jnp.full((B * group, max_tokens), end, jnp.int32),
        logprobs=jnp.zeros(B * group),
        finished=jnp.repeat(~start.active, group),
    )
    going = lambda found: ~jnp.all(found.finished)  # noqa: E731
    found, silence = _search(decoder, states, start, no_speech, none, choose, going, group, max_tokens, no_speech_at)
    return Answers(found.tokens.reshape(B, group, max_tokens), found.logprobs.reshape(B, group), silence)


def beam_search(
    decoder: TextDecoder,
    states: jax.Array,
    start: Start,
    end: jax.Array,
    no_speech: jax.Array,
    *,
    group: int,
    candidates: int,
    max_tokens: int,
    no_speech_at: int,
) -> Answers:
    """The ``group`` likeliest beginnings at every step, until ``candidates`` answers have ended in every row.

    Arguments as ``sample``. A row that has its candidates stands still, so that it does not depend on the others.

    Returns:
      The ended answers in the order in which they ended, then those that have not, the likeliest first, as many as make
      ``group`` in all: [B, max(candidates, group), S].
    """
    B = len(states)
    rows = jnp.arange(B)[:, None]

    def choose(found: Beams, never: jax.Array, logits: jax.Array) -> tuple[Beams, jax.Array, jax.Array]:
        # With one token more than beams to each beam, there are enough to go on with, should all beams end as well.
        logprobs = jax.nn.log_softmax(jnp.where(never, -jnp.inf, logits)).reshape(B, group, -1)
        best, tokens = jax.lax.top_k(logprobs, group + 1)
        totals = (found.logprobs[..., None] + best).reshape(B, -1)
        order = jnp.argsort(-totals, axis=-1, stable=True)
        totals = totals[rows, order]
        tokens = tokens.reshape(B, -1)[rows, order].astype(jnp.int32)
        parents = order // (group + 1)
        ends = tokens == end

        # Of what ends, only that which is likelier than the last that goes on.
        likelier = jnp.cumsum(~ends, axis=-1) - ~ends < group
        ending = ends & likelier
        slots = jnp.where(ending, found.ended[:, None] + jnp.cumsum(ending, axis=-1) - 1, candidates)
        on = jnp.argsort(ends, axis=-1, stable=True)[:, :group]  # the first that do not end
        full = found.ended >= candidates
        keep = lambda old, new: jnp.where(full.reshape(B, *[1] * (old.ndim - 1)), old, new)  # noqa: E731
        sources = parents[rows, on]
        going_on = found.tokens[rows, sources].at[:, :, found.step].set(tokens[rows, on])
        found = Beams(
            step=found.step + 1,
            tokens=keep(found.tokens, going_on),
            logprobs=keep(found.logprobs, totals[rows, on]),
            ended=jnp.minimum(found.ended + ending.sum(-1, dtype=jnp.int32), candidates),
            ended_tokens=keep(
                found.ended_tokens, found.ended_tokens.at[rows, slots].set(found.tokens[rows, parents], mode="drop")
            ),
            ended_logprobs=keep(found.ended_logprobs, found.ended_logprobs.at[rows, slots].set(totals, mode="drop")),
        )
        return found, tokens[rows, on].reshape(-1), (rows * group + sources).reshape(-1)

    none = Beams(
        step=jnp.int32(0),
        tokens=jnp.full((B, group, max_tokens), end, jnp.int32),
        logprobs=jnp.full((B, group), -jnp.inf).at[:, 0].set(0.0),  # at first all beams are the same: one of them counts
        ended=jnp.where(start.active, 0, candidates).astype(jnp.int32),
        ended_tokens=jnp.full((B, candidates, max_tokens), end, jnp.int32),
        ended_logprobs=jnp.full((B, candidates), -jnp.inf),
    )
    going = lambda found: ~jnp.all(found.ended >= candidates)  # noqa: E731
    found, silence = _search(decoder, states, start, no_speech, none, choose, going, group, max_tokens, no_speech_at)

    missing = jnp.arange(group) < group - found.ended[:, None]
    likeliest = jnp.argsort(-found.logprobs, axis=-1)
    unended = jnp.where(missing, found.logprobs[rows, likeliest], -jnp.inf)
    tokens = jnp.concatenate([found.ended_tokens, found.tokens[rows, likeliest]], axis=1)
    return Answers(tokens, jnp.concatenate([found.ended_logprobs, unended], axis=1), silence)


def _search(
    decoder: TextDecoder,
    states: jax.Array,
    start: Start,
    no_speech: jax.Array,
    none,
    choose: Callable,
    going: Callable,
    group: int,
    max_tokens: int,
    no_speech_at: int,
):
    """Prompt, then step after step.

    Args:
      none: nothing found yet; has ``step``, how many tokens every answer has got.
      choose: (found, tokens that are out of the question [V], logits [B·G, V]) -> what is found now, the next tokens [B·G]
        and which row each goes on from, or None where every row goes on from itself.
      going: found -> whether to go on, before the ``max_tokens`` are written.

    Returns:
      What was found and the probability of "no speech", [B].
    """
    B, P = start.prompt.shape
    cross = decoder.prefill_cross(states)
    positions = jnp.broadcast_to(jnp.arange(P), (B, P))
    cache = decoder.init_cache(B, P + max_tokens - 1)
    logits, cache = decoder.decode(start.prompt, positions, cross, cache, wanted=(no_speech_at, P - 1))
    silence = jax.nn.softmax(logits[:, 0])[:, no_speech]

    cache = jax.tree.map(lambda x: jnp.repeat(x, group, axis=1), cache)
    found, tokens, _ = choose(none, start.never_first, jnp.repeat(logits[:, 1], group, axis=0))  # rows of a clip are alike yet

    def step(carry):
        found, tokens, cache = carry
        positions = jnp.full((B * group, 1), P - 1) + found.step
        logits, cache = decoder.decode(tokens[:, None], positions, cross, cache)
        found, tokens, sources = choose(found, start.never, logits[:, 0])
        if sources is not None:
            cache = KeyValues(cache.k[:, sources], cache.v[:, sources])
        return found, tokens, cache

    more = lambda carry: (carry[0].step < max_tokens) & going(carry[0])  # noqa: E731
    return jax.lax.while_loop(more, step, (found, tokens, cache))[0], silence
