"""Models as arguments of compiled functions: split once, merged again inside ``jax.jit``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh


class _Structure:
    """What a model is but for its arrays. Hashed once, since flax hashes a whole graph anew each time."""

    def __init__(self, graphdef: nnx.GraphDef, tree: Any):
        self.graphdef, self.tree = graphdef, tree
        self._hash = hash((graphdef, tree))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, _Structure) and (self.graphdef, self.tree) == (other.graphdef, other.tree)


class SplitModel:
    """A model as a flat tuple of arrays and a structure.

    A call sends the tuple, which JAX takes apart in C++; a tree of flax variables is taken apart in Python, at every call.

    Attributes:
      arrays: the leaves.
      structure: the rest.
      mesh: that functions of the model run under (``jax.set_mesh``); None: what the caller has set, if anything.
    """

    def __init__(self, model: nnx.Module, mesh: Mesh | None = None):
        self.mesh = mesh
        graphdef, state = nnx.split(model)
        arrays, tree = jax.tree.flatten(state)
        self.arrays: tuple[jax.Array, ...] = tuple(arrays)
        self.structure = _Structure(graphdef, tree)

    def state(self) -> dict[str, Any]:
        """The arrays as a nested dictionary."""
        return nnx.to_pure_dict(jax.tree.unflatten(self.structure.tree, self.arrays))


def jit_model(static: Iterable[str] = (), donate: Iterable[str] = ()) -> Callable[[Callable], Callable]:
    """``jax.jit`` for functions whose first argument is a model, which callers give as a ``SplitModel``.

    Args:
      static: names of further arguments that are compile-time constants, given by keyword.
      donate: names of further arguments whose memory the result may take, given by keyword.
    """

    def decorate(function: Callable) -> Callable:
        @functools.partial(jax.jit, static_argnames=("structure", *static), donate_argnames=tuple(donate))
        def run(arrays: tuple[jax.Array, ...], *args: Any, structure: _Structure, **kwargs: Any) -> Any:
            model = nnx.merge(structure.graphdef, jax.tree.unflatten(structure.tree, arrays))
            return function(model, *args, **kwargs)

        @functools.wraps(function)
        def call(model: SplitModel, *args: Any, **kwargs: Any) -> Any:
            with contextlib.nullcontext() if model.mesh is None else jax.set_mesh(model.mesh):
                return run(model.arrays, *args, structure=model.structure, **kwargs)

        call.compiled_programs = run._cache_size
        return call

    return decorate
