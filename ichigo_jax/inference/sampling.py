"""Choosing the next token from logits: pure functions of [B, V] float32 and a key.

Filters and their order are those of Hugging Face ``generate``: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ichigo_jax.errors import InputError

MOST_TOP_K = 2**31 - 1  # of int32, and more than any vocabulary has
MOST_SEED = 2**32 - 1  # JAX takes no more bits of a seed unless it computes in 64 bits


class Sampling(NamedTuple):
    """How a token is chosen. All are traced under jit, so another value does not compile anew.

    Attributes:
      temperature: divides the logits; 0 always takes the most likely token and leaves the three filters without effect.
      top_k: keeps the k most likely tokens; 0 keeps all.
      top_p: keeps the smallest set of most likely tokens whose probabilities reach p; 1 keeps all.
      min_p: keeps tokens at least this likely relative to the most likely one; 0 keeps all.
      repetition_penalty: divides positive and multiplies negative logits of tokens seen before; 1 changes nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def checked(sampling: Sampling) -> Sampling:
    """``sampling`` with every value in range and of one type, so that 1 and 1.0 share a compiled program.

    Raises:
      InputError: a value outside its range.
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
    if not 0 <= seed <= MOST_SEED:
        raise InputError(f"seed {seed} found, expected 0 to {MOST_SEED}")


def choose(logits: jax.Array, seen: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """The next token of every row.

    Args:
      logits: float32 [B, V].
      seen: bool [B, V], tokens of the prompt and of the answer so far.
      sampling: how to choose.
      key: random key; a row's draw depends on the key and the row's number, not on the size of the batch.

    Returns:
      int32 [B].
    """
    logits = penalise_repetition(logits, seen, sampling.repetition_penalty)

    def draw(logits: jax.Array) -> jax.Array:
        logits = logits / sampling.temperature
        logits = keep_top_k(logits, sampling.top_k)
        logits = keep_top_p(logits, sampling.top_p)
        logits = keep_min_p(logits, sampling.min_p)
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits.shape[0]))
        return jax.vmap(jax.random.categorical)(keys, logits)

    greedy = lambda logits: jnp.argmax(logits, axis=-1)  # noqa: E731
    return jax.lax.cond(sampling.temperature > 0, draw, greedy, logits).astype(jnp.int32)


def penalise_repetition(logits: jax.Array, seen: jax.Array, penalty: float | jax.Array) -> jax.Array:
    """Makes seen tokens less likely (Keskar et al. 2019, CTRL, as Hugging Face applies it to negative logits)."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: jax.Array, k: int | jax.Array) -> jax.Array:
    """Minus infinity for all but the k largest of a row; ties with the k-th stay. 0 keeps all."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    smallest = jnp.take(ordered, jnp.clip(k, 1, logits.shape[-1]) - 1, axis=-1)
    return jnp.where((k > 0) & (logits < smallest[:, None]), -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: float | jax.Array) -> jax.Array:
    """Minus infinity for all but the most likely tokens that together reach probability p (Holtzman et al. 2019)."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The most likely token has nothing before it, so at least one stays; p = 1 is exempt from rounding in the sum.
    smallest = jnp.min(jnp.where((before < p) | (p >= 1), ordered, jnp.inf), axis=-1)
    return jnp.where(logits < smallest[:, None], -jnp.inf, logits)


def keep_min_p(logits: jax.Array, p: float | jax.Array) -> jax.Array:
    """Minus infinity for tokens less than p times as likely as the most likely one (Nguyen et al. 2024). 0 keeps all."""
    return jnp.where(logits < logits.max(axis=-1, keepdims=True) + jnp.log(p), -jnp.inf, logits)
