"""What every model here is built of: declared parameters, norms, stacked layers and the scan over them.

Axis letters: B batch, T time, M mels, D model, N heads, K key/value heads, H head size, F feed-forward, V vocabulary,
C codes, Q quantisers, L layers.

Modules hold no dtype: they compute in the dtype of their parameters, so a caller chooses the precision by casting the
parameters (``cast_params``); norms and softmax compute in float32 whatever the parameters are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ichigo_jax.models.quantized_weights import QuantizedKernel
from ichigo_jax.parallel import RULES, gather_weight

TIME_AXIS = RULES["time"]  # the mesh axis that activations' time is split over
Initializer = Callable[[jax.Array, Sequence[int], Any], jax.Array]
Remat = Literal["none", "dots", "full"]
PRODUCT = "product"  # how rematerialisation knows the results of ``project``, whose own gradient hides them from it
M = TypeVar("M", bound=nnx.Module)


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


zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, computed in float32. [..., D] -> [..., D]."""

    def __init__(self, size: int, eps: float, rngs: nnx.Rngs):
        self.scale = param(rngs, ones, (size,), ("norm",))
        self.bias = param(rngs, zeros, (size,), ("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        mean = y.mean(-1, keepdims=True)
        variance = jnp.square(y - mean).mean(-1, keepdims=True)
        y = (y - mean) * jax.lax.rsqrt(variance + self.eps)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32. [..., D] -> [..., D]."""

    def __init__(self, size: int, eps: float, rngs: nnx.Rngs):
        self.scale = param(rngs, ones, (size,), ("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return self.scale[...] * y.astype(x.dtype)


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


def rotary_angles(positions: jax.Array, inverse_frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of rotary positions, float32. [B, T], [H/2] -> two of [B, T, H/2]."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding in the rotate-half layout (first half with second half), as Hugging Face Llama and the Ichigo quantiser.

    [B, T, N, H], [B, T, H/2] twice -> [B, T, N, H].
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def stack_layers(make: Callable[[nnx.Rngs], M], layers: int, rngs: nnx.Rngs) -> M:
    """``layers`` independently initialised copies of one block as a single block whose arrays have a leading L axis."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), layers)
    state = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key))))(keys)
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    state = jax.tree.map(lambda v: v.replace(axes=("layers", *v.axes)), state, is_leaf=is_variable)
    return nnx.merge(graphdef, state)


def unstack_layers(stacked: M) -> nnx.List:
    """The blocks of ``stack_layers`` one by one, for inference.

    A step that decodes one token reads every weight once. To slice a layer out of the stack first would copy it, which on a
    CPU takes as long again. Training keeps the stack, whose program does not grow with depth.

    Args:
      stacked: is emptied on the way, so that no more than one of its arrays is in memory twice.
    """
    graphdef, state = nnx.split(stacked)
    apart: list[list[tuple[Any, nnx.Variable]]] = []
    for path, variable in nnx.to_flat_state(state):
        arrays = list(variable.get_value())
        apart = apart or [[] for _ in arrays]
        for layer, array in zip(apart, arrays):
            layer.append((path, variable.replace(array, axes=variable.axes[1:])))
        variable.set_value(None)
    return nnx.List([nnx.merge(graphdef, nnx.from_flat_state(layer)) for layer in apart])


def scan_layers(
    layers: M | nnx.List,
    apply: Callable[[M, Any, Any], tuple[Any, Any]],
    carry: Any,
    inputs: Any = None,
    remat: Remat = "none",
) -> tuple[Any, Any]:
    """Runs ``apply(block, carry, input) -> (carry, output)`` over layers, with ``lax.scan`` where they are stacked.

    Args:
      layers: from ``stack_layers`` or ``unstack_layers``.
      apply: one layer.
      carry: what flows from layer to layer.
      inputs: what each layer gets (a cache, say): a tree with leading axis L, for layers apart a list of L trees; or None.
      remat: what the backward pass computes anew: "none", all but products by weights ("dots"), or everything ("full").

    Returns:
      The last carry and the layers' outputs, stacked or listed as the inputs are.
    """
    if isinstance(layers, nnx.List):
        outputs = []
        for block, layer_input in zip(layers, [None] * len(layers) if inputs is None else inputs):
            carry, output = apply(block, carry, layer_input)
            outputs.append(output)
        return carry, outputs
    graphdef, state = nnx.split(layers)

    def body(carry, layer):
        layer_state, layer_input = layer
        layer_state = jax.tree.map(_whole, layer_state, is_leaf=lambda node: isinstance(node, nnx.Variable))
        return apply(nnx.merge(graphdef, layer_state), carry, layer_input)

    body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(body, carry, (state, inputs))


def _whole(variable: nnx.Variable) -> nnx.Variable:
    """One layer's slice of a stacked parameter, gathered for use."""
    value = variable.get_value()
    return variable.replace(gather_weight(value, variable.axes[1:])) if isinstance(value, jax.Array) else variable


# Gathered weights are never kept for the backward pass, which gathers them anew: all layers' would be the whole model on every
# device. They are what comes out of a pinned sharding, reshaped or not; of anything else these operations cost nothing, nor
# does a name, before which the same array is kept.
_COST_NOTHING = frozenset({"sharding_constraint", "reshape", "transpose", "squeeze", "name"})
REMAT_POLICIES = {
    "none": lambda primitive, *_, **__: primitive.name not in _COST_NOTHING,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def cast_params(tree: Any, dtype: Any) -> Any:
    """Every floating-point array of a tree in ``dtype``; integers stay."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def fan_in_normal(fan_in: int) -> Initializer:
    """Normal with standard deviation ``fan_in ** -0.5``."""
    return normal(1.0 / math.sqrt(fan_in))
