"""Scaled dot-product attention, one function for every model here, and faster kernels for rows of a language model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from ichigo_jax.errors import InputError
from ichigo_jax.parallel import dividing_spec

Backend = Literal["xla", "cudnn", "splash"]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
SPLASH_BLOCKS = (512, 256, 128)  # tokens of a tile, the largest that divides a row

# Scores a head from which a CPU takes the heads one by one, and of a head so many keys at a time. All heads' scores at once fall
# out of its caches: of Whisper's 1500 x 1500 that takes twice as long. Of a few hundred positions it is as fast, and its
# gradient faster.
LONG = 1 << 20
KEYS_AT_A_TIME = 512

# The ``jax.named_scope`` of attention under a mask. All masks here are causal ones, so that a model needs about half of what is
# computed there; ``tasks.model_flops`` counts it so.
MASKED_SCOPE = "masked_attention"


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Softmax(q·k/sqrt(H))·v with scores and softmax in float32.

    Args:
      q: [B, T, N, H].
      k: [B, S, K, H]; K divides N, and N/K consecutive query heads share one key/value head.
      v: [B, S, K, H].
      mask: bool, broadcastable to [B, 1, T, S]; True where a query may look. None: everywhere.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    # Heads ahead of time: batched matrix products over contiguous [T, H] blocks are several times faster on CPU.
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    if mask is None and T * S >= LONG:
        out = jax.lax.platform_dependent(q, k, v, cpu=_head_by_head, default=_all_heads)
    else:
        with jax.named_scope(MASKED_SCOPE) if mask is not None else contextlib.nullcontext():
            out = _all_heads(q, k, v, mask)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _all_heads(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """[B, K, N/K, T, H], [B, K, S, H] twice -> [B, K, N/K, T, H]."""
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bksh->bkgth", weights, v)


def _head_by_head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The same one key/value head after the other, some of its keys at a time (Milakov and Gimelshein 2018, "Online normalizer
    calculation for softmax", https://arxiv.org/abs/1805.02867)."""
    S = k.shape[2]
    size = next(size for size in range(min(S, KEYS_AT_A_TIME), 0, -1) if S % size == 0)

    def head(qkv: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v = qkv
        q = q * q.shape[-1] ** -0.5

        def more_keys(so_far, keys_values):
            largest, total, out = so_far
            k, v = keys_values
            scores = jnp.einsum("gth,sh->gts", q, k, preferred_element_type=jnp.float32)
            new = jnp.maximum(largest, scores.max(-1, keepdims=True))
            weights, shrunk = jnp.exp(scores - new), jnp.exp(largest - new)
            out = out * shrunk + jnp.einsum("gts,sh->gth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return (new, total * shrunk + weights.sum(-1, keepdims=True), out), None

        column = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
        blocks = (k.reshape(-1, size, k.shape[-1]), v.reshape(-1, size, v.shape[-1]))
        (_, total, out), _ = jax.lax.scan(more_keys, (column - jnp.inf, column, jnp.zeros(q.shape, jnp.float32)), blocks)
        return (out / total).astype(v.dtype)

    heads = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    return jax.lax.map(head, tuple(heads)).reshape(q.shape)


def causal_mask(query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
    """True where a key is not after the query. [B, T], [B, S] -> [B, 1, T, S]."""
    return (key_positions[:, None, :] <= query_positions[:, :, None])[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# Causal attention over rows of tokens, by back end
# ---------------------------------------------------------------------------------------------------------------------


def causal_attention(backend: Backend, length: int, segment_ids: jax.Array | None) -> Attend:
    """A function of queries [B, T, N, H], keys and values [B, T, K, H] in which a token sees its segment up to itself.

    Made once and called in every layer, so that masks are not built anew.

    Args:
      backend: "xla", everywhere; "cudnn", flash attention on NVIDIA GPUs in bfloat16; "splash", flash attention on TPUs, for
        rows of a multiple of 128 tokens. Only "xla" takes memory of the square of the length for each head.
      length: T.
      segment_ids: int32 [B, T], tokens see only equal ids; None: a row is one sequence.
    """
    if backend == "splash":
        return functools.partial(splash_attention, segment_ids=segment_ids)
    mask = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    if backend == "cudnn":
        # Segments become a bias [B, 1, T, T] that all heads share. cuDNN's ragged layout would do without one, but takes a
        # fixed number of segments and is not in JAX's public interface. Without segments there is no bias.
        return functools.partial(jax.nn.dot_product_attention, mask=mask, is_causal=True, implementation="cudnn")
    index = jnp.arange(length)[None]
    causal = causal_mask(index, index)
    return functools.partial(attention, mask=causal if mask is None else causal & mask)


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, interpret: bool = False
) -> jax.Array:
    """``causal_attention`` by JAX's Pallas kernel for TPUs, each device on its own rows and heads.

    Args:
      q, k, v, segment_ids: as there.
      interpret: run the kernel's program without a TPU, for tests.

    Raises:
      InputError: rows of another length than a multiple of 128.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # Pallas takes long to import

    T, _, H = q.shape[1:]
    block = next((size for size in SPLASH_BLOCKS if T % size == 0), None)
    if block is None:
        raise InputError(
            f"rows of {T} tokens found, attention 'splash' expects a multiple of {SPLASH_BLOCKS[-1]}; change the length"
        )
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    blocks = splash.BlockSizes(**dict.fromkeys(names, block), block_kv_compute=block, block_kv_dkv_compute=block)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: splash.SegmentIds | None) -> jax.Array:
        q, k, v = (x.swapaxes(1, 2) for x in (q * H**-0.5, k, v))
        mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * q.shape[1])
        kernel = splash.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret)
        return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)

    segments = None if segment_ids is None else splash.SegmentIds(segment_ids, segment_ids)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q, k, v, segments)
    # By the key/value heads also for the queries, so that a device holds both of a group.
    heads = dividing_spec(mesh, ("batch", None, "kv_heads", None), k.shape)
    rows = dividing_spec(mesh, ("batch", None), q.shape[:2])
    return jax.shard_map(local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)(q, k, v, segments)


def check_backend(backend: Backend, platform: str, compute_dtype: str, context: int) -> None:
    """Refuses a back end that the devices, the precision or the mesh do not have.

    Args:
      backend: of the run.
      platform: "cpu", "gpu" or "tpu", as ``jax.Device.platform``.
      compute_dtype: of the run.
      context: devices along the mesh axis that time is split over.
    """
    needed = {"xla": platform, "cudnn": "gpu", "splash": "tpu"}[backend]
    if platform != needed:
        raise InputError(f"attention {backend!r} found on {platform} devices, expected {needed}; set train.attention to 'xla'")
    if backend == "cudnn" and compute_dtype != "bfloat16":
        raise InputError(f"attention 'cudnn' found with compute_dtype {compute_dtype!r}, expected 'bfloat16' or attention 'xla'")
    if backend != "xla" and context != 1:
        raise InputError(f"attention {backend!r} found with mesh.context {context}, expected 1: it needs whole rows; or 'xla'")
