"""Flash attention on TPUs: JAX's Pallas kernel, each device on its own rows and heads."""

from __future__ import annotations

import jax

from ichigo_jax.errors import InputError
from ichigo_jax.models.attention.mask import Mask
from ichigo_jax.parallel import dividing_spec

BLOCKS = (512, 256, 128)  # tokens of a tile, the largest that divides a row


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, interpret: bool = False) -> jax.Array:
    """See ``attention.attend``; ``interpret`` runs the kernel's program without a TPU, for tests.

    Raises:
      InputError: rows of another length than a multiple of 128.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # Pallas takes long to import

    assert mask.causal, "splash attention is made for causal rows here"
    T, _, H = q.shape[1:]
    block = next((size for size in BLOCKS if T % size == 0), None)
    if block is None:
        raise InputError(f"rows of {T} tokens found, attention 'splash' expects a multiple of {BLOCKS[-1]}; change the length")
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    blocks = splash.BlockSizes(**dict.fromkeys(names, block), block_kv_compute=block, block_kv_dkv_compute=block)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: splash.SegmentIds | None) -> jax.Array:
        q, k, v = (x.swapaxes(1, 2) for x in (q * H**-0.5, k, v))
        heads = splash.MultiHeadMask([splash.CausalMask((T, T))] * q.shape[1])
        kernel = splash.make_splash_mha(heads, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret)
        return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)

    segments = None if mask.segments is None else splash.SegmentIds(mask.segments, mask.segments)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q, k, v, segments)
    # By the key/value heads also for the queries, so that a device holds both of a group.
    heads = dividing_spec(mesh, ("batch", None, "kv_heads", None), k.shape)
    rows = dividing_spec(mesh, ("batch", None), q.shape[:2])
    return jax.shard_map(local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)(q, k, v, segments)
