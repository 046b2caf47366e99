"""Products by weights: one function for all of them, and linear layers that may have adapters."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ichigo_jax.models.quantized_weights import QuantizedKernel
from ichigo_jax.parallel import RULES

TIME_AXIS = RULES["time"]  # the mesh axis that activations' time is split over
PRODUCT = "product"  # how rematerialisation knows the results of ``project``, whose own gradient hides them from it


def project(x: jax.Array, kernel: jax.Array | QuantizedKernel, axes: int = 1, dtype: Any = None) -> jax.Array:
    """Contracts the last ``axes`` axes of x with as many first axes of a kernel: [B, T, D], [D, N, H] -> [B, T, N, H].

    As one matrix product over all rows: XLA's CPU back end takes about half the time for the gradient of that than of the
    same product over [B, T, …]. Where time itself is sharded the axes stay apart, since rows of both could not be.

    Args:
      x: [..., contracted].
      kernel: [contracted, ...]; one in few bits has its contracted axes in its two first ones.
      axes: how many axes of x are contracted.
      dtype: of the result and of the sums; None takes x's.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if isinstance(kernel, QuantizedKernel):
        y = kernel.project(x, axes, dtype)
    elif not mesh.empty and mesh.shape.get(TIME_AXIS, 1) > 1:
        y = jnp.tensordot(x, kernel, axes, preferred_element_type=dtype)
    else:
        contracted = math.prod(kernel.shape[:axes])
        y = _product(x.reshape(-1, contracted), kernel.reshape(contracted, -1), dtype)
        y = y.reshape(*x.shape[:-axes], *kernel.shape[axes:])
    return checkpoint_name(y, PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """[R, I], [I, O] -> [R, O]."""
    return jnp.dot(x, kernel, preferred_element_type=dtype)


def _product_forward(x: Any, kernel: Any, dtype: Any) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array | None]]:
    """Keeps what the wanted gradients need: of a frozen kernel not the x."""
    kept = (x.value if kernel.perturbed else None, kernel.value if x.perturbed else None)
    return _product(x.value, kernel.value, dtype), kept


def _product_backward(dtype: Any, kept: tuple[jax.Array | None, jax.Array | None], y: Any) -> tuple[Any, Any]:
    x, kernel = kept
    if isinstance(y, jax.custom_derivatives.SymbolicZero):
        return None, None
    of_x = None if kernel is None else jnp.dot(y, kernel.T, preferred_element_type=kernel.dtype)
    of_kernel = None if x is None else product_over_rows(x, y, x.dtype)
    return of_x, of_kernel


def product_over_rows(x: jax.Array, y: jax.Array, dtype: Any) -> jax.Array:
    """``x.T @ y``, what a weight's gradient is. [R, I], [R, O] -> [I, O].

    XLA's CPU back end takes up to a fifth less time where x is transposed in memory first; others choose layouts themselves.
    """

    def transposed_first(x, y):
        return jnp.dot(jax.lax.optimization_barrier(x.T), y, preferred_element_type=dtype)

    def at_once(x, y):
        return jnp.dot(x.T, y, preferred_element_type=dtype)

    return jax.lax.platform_dependent(x, y, cpu=transposed_first, default=at_once)


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


class Adaptable(nnx.Module):
    """A module whose linear layers may have adapters beside their weights.

    Attributes:
      adapters: by the name of the weight, what adds to its product (``models.lora``); None where there are none.
    """

    adapters = None

    def linear(self, name: str, x: jax.Array, axes: int = 1) -> jax.Array:
        """``project`` by the weight of that name, plus what its adapter adds."""
        y = project(x, getattr(self, name)[...], axes)
        return y if self.adapters is None or name not in self.adapters else y + self.adapters[name](x)
