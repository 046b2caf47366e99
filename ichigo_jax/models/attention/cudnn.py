"""Flash attention on NVIDIA GPUs in bfloat16 (cuDNN)."""

from __future__ import annotations

import jax

from ichigo_jax.models.attention.mask import Mask


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """See ``attention.attend``."""
    # Segments become a bias [B, 1, T, T] that all heads share. cuDNN's ragged layout would do without one, but takes a
    # fixed number of segments and is not in JAX's public interface. Without segments there is no bias.
    table = None if mask.segments is None else Mask(causal=False, segments=mask.segments).table(q.shape[1], k.shape[1])
    return jax.nn.dot_product_attention(q, k, v, mask=table, is_causal=mask.causal, implementation="cudnn")
