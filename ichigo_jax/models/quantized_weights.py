"""Matrices in few bits, for inference: int8 with a scale for each output, int4 with a scale for each group of inputs.

Symmetric: the largest weight of a group becomes 127 (or 7), zero stays zero, and each weight is off by at most half a scale.
Activations are not quantised. Nothing here is trained; a model is quantised as it is loaded.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ichigo_jax.errors import InputError

Quantization = Literal["int8", "int4"]
LARGEST = {"int8": 127, "int4": 7}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKernel:
    """A kernel [contracted, ...outputs] as ``values * scales``. Stands in a parameter where the float array stood.

    Attributes:
      values: int8 or int4 [groups, contracted / groups, ...outputs].
      scales: float32 [groups, ...outputs].
    """

    values: jax.Array
    scales: jax.Array

    def __getitem__(self, index: Any) -> QuantizedKernel:
        """The whole: modules read a parameter as ``self.q[...]``."""
        assert index is ..., f"index {index} found, a quantised kernel is read as a whole"
        return self

    def project(self, x: jax.Array, axes: int, dtype: Any) -> jax.Array:
        """As ``linear.project``. One scale an output is applied to the result, more are applied to the weights."""
        groups, size, *outputs = self.values.shape
        assert math.prod(x.shape[-axes:]) == groups * size, f"{x.shape} found, expected {groups * size} inputs"
        rows = x.reshape(-1, groups * size)
        # Without the barrier, a loop of decoding steps has the compiler keep the weights as floats from before the loop on.
        rows, values = jax.lax.optimization_barrier((rows, self.values.reshape(groups, size, -1)))
        scales = self.scales.reshape(groups, 1, -1)
        if groups == 1:
            y = jnp.dot(rows, values[0].astype(x.dtype), preferred_element_type=dtype) * scales[0].astype(dtype or x.dtype)
        else:
            kernel = (values.astype(x.dtype) * scales.astype(x.dtype)).reshape(groups * size, -1)
            y = jnp.dot(rows, kernel, preferred_element_type=dtype)
        return y.reshape(*x.shape[:-axes], *outputs)


def quantize(kernel: jax.Array, axes: int, to: Quantization, group_size: int | None) -> QuantizedKernel:
    """Quantises one kernel.

    Args:
      kernel: float, its first ``axes`` axes are contracted.
      axes: how many those are.
      to: "int8" or "int4".
      group_size: inputs that share a scale; None: all.

    Raises:
      InputError: a group size that does not divide the inputs.
    """
    inputs, outputs = math.prod(kernel.shape[:axes]), kernel.shape[axes:]
    size = inputs if group_size is None else group_size
    if size < 1 or inputs % size:
        raise InputError(f"group_size {group_size} found, expected a divisor of {inputs}, the inputs of one of the matrices")
    weights = kernel.reshape(-1, size, *outputs).astype(jnp.float32)
    largest = LARGEST[to]
    scales = jnp.abs(weights).max(1) / largest
    values = jnp.round(weights / jnp.where(scales == 0, 1, scales)[:, None])
    return QuantizedKernel(jnp.clip(values, -largest, largest).astype(to), scales)
