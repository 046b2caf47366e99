"""Losses as sums, so that parts of a batch add up to exactly the loss of the whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ichigo_jax.data.loading import IGNORE


def cross_entropy_sums(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy and number of correct predictions over the targets that are not ``IGNORE``.

    float32 [B, T, V], int32 [B, T] -> two float32 scalars. ``targets=[[5, -100]]`` counts the first position only.
    """
    counted = targets != IGNORE
    safe = jnp.where(counted, targets, 0)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, safe[..., None], axis=-1)[..., 0]
    loss = jnp.where(counted, log_normalizer - picked, 0.0).sum()
    correct = (counted & (logits.argmax(-1) == targets)).sum()
    return loss, correct.astype(jnp.float32)


def divergence_sum(logits: jax.Array, teacher_logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Kullback-Leibler divergence of the teacher's predictions from the student's, summed over all positions.

    Where a target is ``IGNORE`` the teacher is taken to find every token equally likely, as in ``ichigo_asr``, which sets its
    logits to zero there; a row without any target does not count at all.

    [B, T, V] twice and int32 [B, T] -> float32 scalar.
    """
    counted = targets != IGNORE
    teacher = jax.nn.log_softmax(jnp.where(counted[..., None], teacher_logits, 0.0), axis=-1)
    divergence = (jnp.exp(teacher) * (teacher - jax.nn.log_softmax(logits, axis=-1))).sum(-1)
    return jnp.where(counted.any(-1, keepdims=True), divergence, 0.0).sum()


def count_rows(targets: jax.Array) -> jax.Array:
    """Number of rows with a target, at least 1, as a float32 scalar."""
    return jnp.maximum((targets != IGNORE).any(-1).sum(), 1).astype(jnp.float32)


def count_targets(targets: jax.Array) -> jax.Array:
    """Number of targets that carry loss, at least 1, as a float32 scalar."""
    return jnp.maximum((targets != IGNORE).sum(), 1).astype(jnp.float32)
