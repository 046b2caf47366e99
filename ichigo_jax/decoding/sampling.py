"""Choosing one token a row from logits: the likeliest, or a draw. Every row has options of its own.

Filters and their order are those of Hugging Face ``generate``: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ichigo_jax.decoding.loop import Choice
from ichigo_jax.errors import InputError

MOST_TOP_K = (1 << 31) - 1  # of int32, and more than any vocabulary has
SEEDS = 1 << 32  # JAX takes no more bits of a seed unless it computes in 64 bits


class Sampling(NamedTuple):
    """How a token is chosen; numbers for one row, arrays [R] for R rows. All are traced, so other values compile nothing.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token and leaves the three filters without effect.
      top_k: keeps the k likeliest tokens; 0 keeps all.
      top_p: keeps the smallest set of likeliest tokens whose probabilities reach p; 1 keeps all.
      min_p: keeps tokens at least p times as likely as the likeliest; 0 keeps all.
      repetition_penalty: divides positive and multiplies negative logits of tokens seen before; 1 changes nothing.
    """

    temperature: float | jax.Array = 0.0
    top_k: int | jax.Array = 0
    top_p: float | jax.Array = 1.0
    min_p: float | jax.Array = 0.0
    repetition_penalty: float | jax.Array = 1.0


GREEDY = Sampling()


def checked(sampling: Sampling) -> Sampling:
    """``sampling`` with every number in range and of one type, so that 1 and 1.0 share a compiled program.

    Raises:
      InputError: a number outside its range.
    """
    ranges = {
        "temperature": (0 <= sampling.temperature < math.inf, "a number of at least 0"),
        "top_k": (sampling.top_k >= 0, "at least 0 (0: all)"),
        "top_p": (0 < sampling.top_p <= 1, "above 0 and at most 1"),
        "min_p": (0 <= sampling.min_p <= 1, "between 0 and 1"),
        "repetition_penalty": (0 < sampling.repetition_penalty < math.inf, "a number above 0 (1: none)"),
    }
    for name, (holds, expected) in ranges.items():
        if not holds:
            raise InputError(f"{name} {getattr(sampling, name)} found, expected {expected}")
    temperature, top_k, top_p, min_p, repetition_penalty = sampling
    return Sampling(float(temperature), min(int(top_k), MOST_TOP_K), float(top_p), float(min_p), float(repetition_penalty))


def check_seed(seed: int) -> None:
    """Refuses a seed of which JAX would use a part only, so that two seeds would give the same draws.

    Raises:
      InputError: not from 0 to 2**32 - 1.
    """
    if not 0 <= seed < SEEDS:
        raise InputError(f"seed {seed} found, expected 0 to {SEEDS - 1}")


def stacked(samplings: Sequence[Sampling]) -> Sampling:
    """The options of several rows as one value of arrays [R]."""
    dtypes = Sampling(np.float32, np.int32, np.float32, np.float32, np.float32)
    return Sampling(*(np.array(values, dtype) for values, dtype in zip(zip(*samplings), dtypes)))


class Rows(NamedTuple):
    """What ``Sampler`` knows of every row.

    Attributes:
      written: int32 [R], tokens chosen so far.
      finished: bool [R], rows that want no more tokens.
      tokens: int32 [R, S], the tokens chosen so far from column 0 on; the rest is as ``empty_rows`` filled it.
      logprobs: float32 [R], the sum of their log-probabilities.
      seen: bool [R, V], tokens of the prompt and of the answer, which the repetition penalty counts; None: nobody counts.
    """

    written: jax.Array
    finished: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    seen: jax.Array | None


def empty_rows(finished: jax.Array, longest: int, fill: int | jax.Array, seen: jax.Array | None) -> Rows:
    """Rows before their first token.

    Args:
      finished: bool [R], rows that only fill the batch up.
      longest: S.
      fill: int32, what stands after a row's last token.
      seen: bool [R, V] of the prompts, or None.
    """
    R = len(finished)
    tokens = jnp.full((R, longest), fill, jnp.int32)
    return Rows(jnp.zeros(R, jnp.int32), finished, tokens, jnp.zeros(R), seen)


class Sampler(NamedTuple):
    """A ``loop.Selector``: each row its likeliest token or a draw, until its stop token or its limit.

    Attributes:
      sampling: arrays [R].
      keys: random keys [R]; a row's n-th draw depends on its own key and on n alone.
      limits: int32 [R], the most tokens of each row.
      stop_ids: int32 [R, n], the tokens that end each row; -1 is none.
      never: bool [V], tokens that no row may have; None: all are allowed.
      never_first: bool [V], tokens that no row may begin with; None: as ``never``.
    """

    sampling: Sampling
    keys: jax.Array
    limits: jax.Array
    stop_ids: jax.Array
    never: jax.Array | None = None
    never_first: jax.Array | None = None

    def choose(self, state: Rows, logits: jax.Array) -> Choice:
        """See ``loop.Selector``."""
        logits = self._allowed(state, logits)
        keys = jax.vmap(jax.random.fold_in)(self.keys, state.written)
        tokens = choose(logits, state.seen, self.sampling, keys)
        logprobs = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
        rows, going = jnp.arange(len(tokens)), ~state.finished
        written = state.written + going
        state = Rows(
            written=written,
            finished=state.finished | (tokens[:, None] == self.stop_ids).any(-1) | (written >= self.limits),
            tokens=state.tokens.at[rows, jnp.where(going, state.written, state.tokens.shape[1])].set(tokens, mode="drop"),
            logprobs=state.logprobs + jnp.where(going, logprobs, 0.0),
            seen=None if state.seen is None else state.seen.at[rows, tokens].set(True),
        )
        return Choice(state, tokens, None)

    def unfinished(self, state: Rows) -> jax.Array:
        """See ``loop.Selector``."""
        return ~jnp.all(state.finished)

    def _allowed(self, state: Rows, logits: jax.Array) -> jax.Array:
        if self.never is None:
            return logits
        never = self.never
        if self.never_first is not None:
            never = jnp.where((state.written == 0)[:, None], self.never_first, never)
        return jnp.where(never, -jnp.inf, logits)


def choose(logits: jax.Array, seen: jax.Array | None, sampling: Sampling, keys: jax.Array) -> jax.Array:
    """The next token of every row.

    Args:
      logits: float32 [R, V].
      seen: bool [R, V], tokens that the repetition penalty makes less likely; None: none.
      sampling: arrays [R].
      keys: random keys [R].

    Returns:
      int32 [R].
    """
    if seen is not None:
        logits = penalise_repetition(logits, seen, sampling.repetition_penalty)

    def filtered(logits: jax.Array) -> jax.Array:
        return keep_min_p(keep_top_p(keep_top_k(logits, sampling.top_k), sampling.top_p), sampling.min_p)

    def draw(logits: jax.Array) -> jax.Array:
        drawn = sampling.temperature > 0
        # From the largest on, so that no temperature, however small, makes infinities of which one is like the other.
        warmed = (logits - logits.max(-1, keepdims=True)) / jnp.where(drawn, sampling.temperature, 1.0)[:, None]
        filters = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
        # Sorting a vocabulary takes longer than all else here, so it is left out where no row asks for it.
        warmed = jax.lax.cond((filters & drawn).any(), filtered, lambda logits: logits, warmed)
        return jnp.where(drawn, jax.vmap(jax.random.categorical)(keys, warmed), greedy(logits))

    def greedy(logits: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1)

    return jax.lax.cond((sampling.temperature > 0).any(), draw, greedy, logits).astype(jnp.int32)


def penalise_repetition(logits: jax.Array, seen: jax.Array, penalty: float | jax.Array) -> jax.Array:
    """Makes seen tokens less likely (Keskar et al. 2019, CTRL, as Hugging Face applies it to negative logits)."""
    penalty = _column(penalty)
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: jax.Array, k: int | jax.Array) -> jax.Array:
    """Minus infinity for all but the k largest of a row; ties with the k-th stay. 0 keeps all."""
    k = _column(k)
    ordered = jnp.sort(logits, axis=-1, descending=True)
    last = jnp.broadcast_to(jnp.clip(k, 1, logits.shape[-1]) - 1, (len(logits), 1))
    return jnp.where((k > 0) & (logits < jnp.take_along_axis(ordered, last, axis=-1)), -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: float | jax.Array) -> jax.Array:
    """Minus infinity for all but the likeliest tokens that together reach probability p (Holtzman et al. 2019)."""
    p = _column(p)
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The likeliest token has nothing before it, so at least one stays; p = 1 is exempt from rounding in the sum.
    smallest = jnp.min(jnp.where((before < p) | (p >= 1), ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < smallest, -jnp.inf, logits)


def keep_min_p(logits: jax.Array, p: float | jax.Array) -> jax.Array:
    """Minus infinity for tokens less than p times as likely as the likeliest one (Nguyen et al. 2024). 0 keeps all."""
    return jnp.where(logits < logits.max(axis=-1, keepdims=True) + jnp.log(_column(p)), -jnp.inf, logits)


def _column(value: float | jax.Array) -> jax.Array:
    """A number for all rows, or one for each: [1] or [R] -> [1 or R, 1]."""
    return jnp.asarray(value).reshape(-1, 1)
