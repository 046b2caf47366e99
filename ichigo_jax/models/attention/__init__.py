"""Scaled dot-product attention: one function for every model, over several back ends."""

from __future__ import annotations

from typing import Literal

import jax

from ichigo_jax.errors import InputError
from ichigo_jax.models.attention import cudnn, splash, xla
from ichigo_jax.models.attention.mask import CAUSAL, EVERYWHERE, Mask, causal_segments, causal_to
from ichigo_jax.models.attention.xla import MASKED_SCOPE

__all__ = ["CAUSAL", "EVERYWHERE", "MASKED_SCOPE", "Backend", "Mask", "attend", "causal_segments", "causal_to", "check_backend"]

Backend = Literal["xla", "cudnn", "splash"]
_BACKENDS = {"xla": xla.attend, "cudnn": cudnn.attend, "splash": splash.attend}


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask = EVERYWHERE, backend: Backend = "xla") -> jax.Array:
    """Softmax(q·k/sqrt(H))·v with scores and softmax in float32.

    Args:
      q: [B, T, N, H].
      k: [B, S, K, H]; K divides N, and N/K consecutive query heads share one key/value head.
      v: [B, S, K, H].
      mask: where queries may look.
      backend: "xla", everywhere; "cudnn", on NVIDIA GPUs in bfloat16; "splash", on TPUs, causal rows of a multiple of 128
        tokens. Only "xla" takes memory of the square of the length for each head. A mask with positions is for "xla" alone.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    assert backend == "xla" or mask.positions is None, f"attention {backend!r} does not read from a cache"
    return _BACKENDS[backend](q, k, v, mask)


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
