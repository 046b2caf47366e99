"""Losses as sums, so that parts of a batch add up to exactly the loss of the whole."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ichigo_jax.data.loading import IGNORE
from ichigo_jax.models.linear import product_over_rows
from ichigo_jax.parallel import dividing_spec, mesh_axes

Scalars = dict[str, jax.Array]  # sums over a batch, or over a part of it, by name


def token_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of each target, 0 where it is ``IGNORE``. float32 [B, T, V], int32 [B, T] -> float32 [B, T]."""
    counted = targets != IGNORE
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, jnp.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(counted, log_normalizer - picked, 0.0)


class CrossEntropy(NamedTuple):
    """Over the targets that are not ``IGNORE``.

    Attributes:
      total: the sum, a float32 scalar.
      correct: number of targets with the largest logit, a float32 scalar.
      of_tokens: of each target, float32 [B, T]; 0 where it is ``IGNORE``.
    """

    total: jax.Array
    correct: jax.Array
    of_tokens: jax.Array


def cross_entropy_sums(logits: jax.Array, targets: jax.Array) -> CrossEntropy:
    """float32 [B, T, V], int32 [B, T]. ``targets=[[5, -100]]`` counts the first position only."""
    of_tokens = token_cross_entropy(logits, targets)
    correct = ((targets != IGNORE) & (logits.argmax(-1) == targets)).sum()
    return CrossEntropy(of_tokens.sum(), correct.astype(jnp.float32), of_tokens)


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


def count_examples(targets: jax.Array) -> jax.Array:
    """Number of rows with a target, as an int32 scalar: a row whose clip or text cannot be used has none."""
    return (targets != IGNORE).any(-1).sum()


def count_rows(targets: jax.Array) -> jax.Array:
    """Number of rows with a target, at least 1, as a float32 scalar."""
    return jnp.maximum(count_examples(targets), 1).astype(jnp.float32)


def count_targets(targets: jax.Array) -> jax.Array:
    """Number of targets that carry loss, at least 1, as a float32 scalar."""
    return jnp.maximum((targets != IGNORE).sum(), 1).astype(jnp.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Cross-entropy of hidden states, a chunk of tokens at a time
# ---------------------------------------------------------------------------------------------------------------------


class VocabularyLoss(NamedTuple):
    """Sums over the targets that are not ``IGNORE``, float32 scalars but for the last; only ``loss`` has a gradient.

    Attributes:
      loss: cross-entropy plus z-loss, what is minimised.
      cross_entropy: alone.
      correct: number of targets with the largest logit.
      of_tokens: the cross-entropy of each target, float32 [B, T]; 0 where it is ``IGNORE``.
    """

    loss: jax.Array
    cross_entropy: jax.Array
    correct: jax.Array
    of_tokens: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def vocabulary_loss(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, vocab_size: int, chunk: int | None, z_loss: float
) -> VocabularyLoss:
    """``cross_entropy_sums`` of ``hidden @ kernel`` with the logits of ``chunk`` tokens in memory at a time.

    The forward pass computes a chunk's gradient while it has its logits, as the gradient of a sum it is known but for a
    factor; so nothing is computed twice (Hsu et al. 2024, "Liger Kernel", https://arxiv.org/abs/2410.10989). On a mesh every
    device goes through its own rows' tokens and its own part of the vocabulary, and the kernel's gradient is summed over
    devices once, after the last chunk.

    Args:
      hidden: [B, T, D].
      kernel: [D, V'], V' >= vocab_size.
      targets: int32 [B, T].
      vocab_size: V; the kernel's columns from V on exist for the mesh only and have no logits.
      chunk: tokens whose logits one device holds at a time; None: all of them.
      z_loss: weight of the squared log-normaliser, which keeps logits from drifting (PaLM, https://arxiv.org/abs/2204.02311).
    """
    return _over_mesh(hidden, kernel, targets, vocab_size, chunk, z_loss, with_gradients=False)[0]


def _forward(hidden, kernel, targets, vocab_size, chunk, z_loss):
    return _over_mesh(hidden, kernel, targets, vocab_size, chunk, z_loss, with_gradients=True)


def _backward(vocab_size, chunk, z_loss, gradients, cotangent):
    hidden, kernel = ((cotangent.loss * gradient).astype(gradient.dtype) for gradient in gradients)
    return hidden, kernel, None


vocabulary_loss.defvjp(_forward, _backward)


def _over_mesh(hidden, kernel, targets, vocab_size, chunk, z_loss, with_gradients):
    """The sums, and the gradients of ``loss`` for hidden [B, T, D] and kernel [D, V'], in their dtypes, or None."""
    local = functools.partial(_chunk_by_chunk, vocab_size=vocab_size, chunk=chunk, z_loss=z_loss, with_gradients=with_gradients)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(hidden, kernel, targets, token_axes=(), vocab_axes=(), embed_axes=())
    tokens = dividing_spec(mesh, ("batch", "time"), targets.shape)
    embed, vocab = dividing_spec(mesh, ("embed", "vocab"), kernel.shape)
    token_axes, vocab_axes, embed_axes = (
        tuple(axis for entry in entries for axis in mesh_axes(entry) if mesh.shape[axis] > 1)
        for entries in (tokens, (vocab,), (embed,))
    )
    if not set(embed_axes) <= set(token_axes):
        embed, embed_axes = None, ()  # every device along them has the whole sum already
    local = functools.partial(local, token_axes=token_axes, vocab_axes=vocab_axes, embed_axes=embed_axes)
    sums = VocabularyLoss(*(PartitionSpec(),) * 3, of_tokens=tokens)
    gradients = (PartitionSpec(*tokens, None), PartitionSpec(embed, vocab)) if with_gradients else None
    return jax.shard_map(
        local,
        in_specs=(PartitionSpec(*tokens, None), PartitionSpec(None, vocab), tokens),
        out_specs=(sums, gradients),
        check_vma=False,
    )(hidden, kernel, targets)


def _chunk_by_chunk(
    hidden, kernel, targets, *, vocab_size, chunk, z_loss, with_gradients, token_axes, vocab_axes, embed_axes
):  # fmt: skip
    """One device's part of ``_over_mesh``: its tokens [b, t], its columns of the kernel [D, v]."""
    columns = jax.lax.axis_index(vocab_axes) * kernel.shape[1] + jnp.arange(kernel.shape[1])
    exists = columns < vocab_size

    def one_chunk(carry, tokens):
        sums, kernel_gradient = carry
        x, target = tokens
        counted = target != IGNORE
        logits = jnp.dot(x, kernel, preferred_element_type=jnp.float32)
        logits = jnp.where(exists, logits, jnp.finfo(jnp.float32).min)
        largest = _across(jax.lax.pmax, logits.max(-1), vocab_axes)
        exponentials = jnp.exp(logits - largest[:, None])
        total = _across(jax.lax.psum, exponentials.sum(-1), vocab_axes)
        place = target - columns[0]
        mine = (place >= 0) & (place < columns.size)
        picked = jnp.take_along_axis(logits, jnp.where(mine, place, 0)[:, None], axis=-1)[:, 0]
        picked = _across(jax.lax.psum, jnp.where(mine, picked, 0.0), vocab_axes)
        normalizer = jnp.log(total) + largest
        of_tokens = jnp.where(counted, normalizer - picked, 0.0)
        drift = jnp.where(counted, jnp.square(normalizer), 0.0).sum()
        correct = (counted & (picked >= largest)).sum().astype(jnp.float32)
        cross_entropy = of_tokens.sum()
        sums = jax.tree.map(jnp.add, sums, (cross_entropy + z_loss * drift, cross_entropy, correct))
        if not with_gradients:
            return (sums, None), (of_tokens, None)
        weight = jnp.where(counted, (1 + 2 * z_loss * normalizer) / total, 0.0)
        gradient = weight[:, None] * exponentials - (counted[:, None] & (columns == target[:, None]))
        gradient = gradient.astype(kernel.dtype)
        kernel_gradient += product_over_rows(x, gradient, jnp.float32)
        x_gradient = jnp.dot(gradient, kernel.T, preferred_element_type=jnp.float32).astype(x.dtype)
        return (sums, kernel_gradient), (of_tokens, x_gradient)

    D = hidden.shape[-1]
    x, target = hidden.reshape(-1, D), targets.reshape(-1)
    size = len(target) if chunk is None else min(chunk, len(target))
    missing = -len(target) % size
    x = jnp.pad(x, ((0, missing), (0, 0))).reshape(-1, size, D)
    target = jnp.pad(target, (0, missing), constant_values=IGNORE).reshape(-1, size)
    start = ((jnp.zeros((), jnp.float32),) * 3, jnp.zeros(kernel.shape, jnp.float32) if with_gradients else None)
    (sums, kernel_gradient), (of_tokens, hidden_gradient) = jax.lax.scan(one_chunk, start, (x, target))
    of_tokens = of_tokens.reshape(-1)[: targets.size].reshape(targets.shape)
    sums = VocabularyLoss(*_across(jax.lax.psum, sums, token_axes), of_tokens)
    if not with_gradients:
        return sums, None
    hidden_gradient = hidden_gradient.reshape(-1, D)[: targets.size].reshape(hidden.shape)
    hidden_gradient = _across(jax.lax.psum, hidden_gradient, vocab_axes)
    if embed_axes:
        kernel_gradient = jax.lax.psum_scatter(kernel_gradient, embed_axes, scatter_dimension=0, tiled=True)
    kernel_gradient = _across(jax.lax.psum, kernel_gradient, tuple(axis for axis in token_axes if axis not in embed_axes))
    return sums, (hidden_gradient, kernel_gradient.astype(kernel.dtype))


def _across(collective, x, axes):
    """Nothing to exchange where no mesh axis is named; XLA would still be asked to."""
    return collective(x, axes) if axes else x
