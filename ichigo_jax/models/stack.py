"""Layers of one kind: stacked for training, apart for decoding, and the loop over both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ichigo_jax.models.linear import PRODUCT
from ichigo_jax.parallel import gather_weight

Remat = Literal["none", "dots", "full"]
M = TypeVar("M", bound=nnx.Module)


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
        arrays = _layers_apart(variable.get_value())
        apart = apart or [[] for _ in arrays]
        for layer, array in zip(apart, arrays):
            layer.append((path, variable.replace(array, axes=variable.axes[1:])))
        variable.set_value(None)
    return nnx.List([nnx.merge(graphdef, nnx.from_flat_state(layer)) for layer in apart])


def _layers_apart(stacked: jax.Array) -> list[jax.Array]:
    """[L, …] -> L arrays […], each laid out over its devices as the stack was."""
    sharding = stacked.sharding
    if not isinstance(sharding, NamedSharding):
        return list(stacked)
    of_layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return list(jax.jit(lambda stacked: tuple(stacked), out_shardings=of_layer)(stacked))


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
        layer_state = jax.tree.map(_gathered, layer_state, is_leaf=lambda node: isinstance(node, nnx.Variable))
        return apply(nnx.merge(graphdef, layer_state), carry, layer_input)

    body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(body, carry, (state, inputs))


def _gathered(variable: nnx.Variable) -> nnx.Variable:
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
