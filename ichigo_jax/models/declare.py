"""Parameters and buffers: their shape, their logical axes and how they start, declared in one place.

Axis letters: B batch, T time, M mels, D model, N heads, K key/value heads, H head size, F feed-forward, V vocabulary,
C codes, Q quantisers, L layers.

Modules hold no dtype: they compute in the dtype of their parameters, so a caller chooses the precision by casting the
parameters (``cast_params``). Norms and softmax compute in float32 whatever the parameters are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Callable[[jax.Array, Sequence[int], Any], jax.Array]


class Buffer(nnx.Variable):
    """State that is saved with the model and that no gradient or optimizer touches: codebooks, their statistics."""


def param(rngs: nnx.Rngs, init: Initializer, shape: Sequence[int], axes: Sequence[str]) -> nnx.Param:
    """Declares one float32 parameter: its initial value, its shape and its logical axes (``parallel.RULES``)."""
    assert len(shape) == len(axes), f"shape {shape} and axes {axes} differ in length"
    return nnx.Param(init(rngs.params(), tuple(shape), jnp.float32), axes=tuple(axes))


def linear_param(
    rngs: nnx.Rngs, init: Callable[[int], Initializer], fan_in: int, shape: Sequence[int], axes: Sequence[str]
) -> nnx.Param:
    """``param`` for the weight or the bias of a linear layer, whose start and learning rate may depend on its fan-in."""
    declared = param(rngs, init(fan_in), shape, axes)
    return declared.replace(fan_in=fan_in)


def freeze(parameter: nnx.Param) -> None:
    """Declares that a parameter is not trained (``training.state.split``)."""
    parameter.set_metadata(frozen=True)


def is_frozen(variable: nnx.Variable) -> bool:
    """Whether a variable was declared so by ``freeze``."""
    return variable.get_metadata().get("frozen", False)


def normal(std: float) -> Initializer:
    return jax.nn.initializers.normal(std)


def truncated_normal(std: float) -> Initializer:
    """Normal with standard deviation ``std`` *before* it is cut at ±3 ``std``, as ``torch.nn.init.trunc_normal_``."""
    return lambda key, shape, dtype: std * jax.random.truncated_normal(key, -3.0, 3.0, shape, dtype)


def fan_in_normal(fan_in: int) -> Initializer:
    """Normal with standard deviation ``fan_in ** -0.5``."""
    return normal(1.0 / math.sqrt(fan_in))


zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones


def cast_params(tree: Any, dtype: Any) -> Any:
    """Every floating-point array of a tree in ``dtype``; integers stay."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
