"""Which keys a query may look at, said in a form that every back end can use."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mask(NamedTuple):
    """Where queries may look. ``EVERYWHERE``, ``CAUSAL``, or one of the functions below.

    A value and not a table: a flash kernel never has the table of all pairs, and elsewhere the compiler makes each entry
    where it is used.

    Attributes:
      causal: whether a query sees only keys at or before its own position.
      segments: int32 [B, T], of queries and keys alike, which see only equal ids; None: a row is one sequence.
      positions: int32 [B, T], of queries into keys 0, 1, …; None: query t is at position t.
    """

    causal: bool
    segments: jax.Array | None = None
    positions: jax.Array | None = None

    def table(self, queries: int, keys: int) -> jax.Array | None:
        """bool, broadcastable to [B, 1, queries, keys]; True where a query may look. None: everywhere."""
        table = None
        if self.causal:
            positions = jnp.arange(queries)[None] if self.positions is None else self.positions
            table = (jnp.arange(keys) <= positions[:, :, None])[:, None]
        if self.segments is not None:
            same = (self.segments[:, :, None] == self.segments[:, None, :])[:, None]
            table = same if table is None else table & same
        return table


EVERYWHERE = Mask(causal=False)
CAUSAL = Mask(causal=True)


def causal_segments(segments: jax.Array | None) -> Mask:
    """Packed rows: a token sees its segment up to itself. ``segments`` is int32 [B, T], or None for rows of one sequence."""
    return Mask(causal=True, segments=segments)


def causal_to(positions: jax.Array) -> Mask:
    """Queries into a cache: the query at position p, int32 [B, T], sees slots 0 to p."""
    return Mask(causal=True, positions=positions)
