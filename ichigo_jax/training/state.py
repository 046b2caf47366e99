"""What a training step changes, and how it is laid out over the mesh.

Everything is a nested dictionary of arrays, so that Orbax, optax and ``nnx.merge`` read it without adapters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ichigo_jax.models.declare import Buffer, is_frozen
from ichigo_jax.parallel import named_sharding, replicated


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """The whole state of a run; together with the config and the data it determines every later step.

    Attributes:
      step: int32, optimizer steps taken.
      params: trained parameters, in ``train.param_dtype``.
      frozen: parameters that are not trained, in the dtype that the task keeps them in.
      buffers: codebooks and their statistics.
      opt_state: the optimizer's.
      skipped: int32, steps skipped so far because a loss or gradient was not finite or spiked.
      skipped_in_a_row: int32, of these, the ones just before this step.
      recent: float32 [2, train.spike_window], losses and gradient norms of the last steps that were not skipped, the newest
        last; NaN where there are none yet.
    """

    step: Any
    params: Any
    frozen: Any
    buffers: Any
    opt_state: Any
    skipped: Any
    skipped_in_a_row: Any
    recent: Any


def split(model: nnx.Module, frozen: tuple[str, ...]) -> tuple[Any, dict, dict, dict]:
    """A model as graph definition, trained parameters, frozen parameters and buffers.

    Args:
      model: some of whose parameters may be declared frozen (``declare.freeze``).
      frozen: the others that are: those whose dotted name begins with one of these.
    """

    def is_stuck(path, value) -> bool:
        return isinstance(value, nnx.Param) and (is_frozen(value) or ".".join(map(str, path)).startswith(frozen))

    graphdef, stuck, params, buffers = nnx.split(model, is_stuck, nnx.Param, Buffer)
    return graphdef, *map(nnx.to_pure_dict, (params, stuck, buffers))


def declarations(model: nnx.Module, frozen: tuple[str, ...]) -> tuple[dict, dict, dict]:
    """For trained parameters, frozen ones and buffers, the tree of each array's variable: what the model declares of it."""
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    _, *parts = split(model, frozen)
    return tuple(unflatten_dict({path: flat[path] for path in flatten_dict(part)}) for part in parts)  # type: ignore[return-value]


def logical_axes(model: nnx.Module, frozen: tuple[str, ...]) -> tuple[dict, dict, dict]:
    """As ``declarations``, the tree of each array's logical axes."""
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    parts = declarations(model, frozen)
    return tuple(jax.tree.map(lambda v: v.axes, part, is_leaf=is_variable) for part in parts)  # type: ignore[return-value]


def make_state(params: Any, frozen: Any, buffers: Any, optimizer: optax.GradientTransformation, spike_window: int) -> TrainState:
    """The state at step 0."""
    zero = jnp.zeros((), jnp.int32)
    recent = jnp.full((2, spike_window), jnp.nan, jnp.float32)
    return TrainState(zero, params, frozen, buffers, optimizer.init(params), zero, zero, recent)


def is_spike(recent: jax.Array, now: jax.Array, factor: float | None) -> jax.Array:
    """Whether the loss or the gradient norm of a step, [2], is above ``factor`` times its median in ``TrainState.recent``.

    Never while some of those are NaN, which makes the median NaN, and never where ``factor`` is None.
    """
    return (now > (jnp.inf if factor is None else factor * jnp.median(recent, axis=1))).any()


def state_shardings(state: TrainState, axes: tuple[dict, dict, dict], mesh: Mesh) -> TrainState:
    """A ``TrainState`` of shardings: arrays by their logical axes, optimizer moments as their parameters, the rest everywhere.

    A moment belongs to the parameter that its path in the optimizer's state ends in. One that is of size 1 along some of the
    parameter's axes is sharded along the others.

    Args:
      state: abstract or real, for the shapes.
      axes: from ``logical_axes``.
      mesh: from ``parallel.make_mesh``.
    """

    def shard(arrays: dict, names: dict) -> dict:
        flat_names = flatten_dict(names)
        flat = flatten_dict(arrays)
        return unflatten_dict(
            {path: named_sharding(mesh, flat_names[path], x.shape, ".".join(map(str, path))) for path, x in flat.items()}
        )

    everywhere = replicated(mesh)
    params = shard(state.params, axes[0])
    shapes, shardings = flatten_dict(state.params), flatten_dict(params)

    def shard_moment(path: tuple, moment: Any) -> NamedSharding:
        name = tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))
        if name not in shapes:
            return everywhere
        sizes = zip(shardings[name].spec, shapes[name].shape, moment.shape, strict=True)
        return NamedSharding(mesh, PartitionSpec(*(entry if kept == size else None for entry, size, kept in sizes)))

    opt_state = jax.tree_util.tree_map_with_path(shard_moment, state.opt_state)
    frozen, buffers = shard(state.frozen, axes[1]), shard(state.buffers, axes[2])
    return TrainState(everywhere, params, frozen, buffers, opt_state, everywhere, everywhere, everywhere)


class Program(NamedTuple):
    """A run's step and what it works on, before any array exists; ``plan`` compiles it for devices that are not there.

    Attributes:
      graphdef: the model's structure.
      state: shapes, dtypes and shardings of the state.
      initial_state: a model to the state at step 0.
      step: ``train.make_step``, jitted; gives up its state's memory.
    """

    graphdef: nnx.GraphDef
    state: TrainState
    initial_state: Callable[[nnx.Module], TrainState]
    step: Callable
