"""Arithmetic of a traced function: floating-point operations of its matrix products and convolutions, loops multiplied out.

A multiply-add counts as two. What a backward pass computes anew (rematerialisation) counts each time it is computed, and what
is computed and then masked counts in full, unless it is said to count as half.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count_flops(function: Callable[..., Any], *arguments: Any, halved: str | None = None) -> float:
    """Operations of ``function`` on (abstract) arguments, over all devices together.

    Args:
      function: to be traced.
      arguments: what it is called with; their values do not matter.
      halved: a ``jax.named_scope`` whose operations, and those of its gradient, count as half; None: all count in full.
    """
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr, halved)


def _flops(jaxpr: core.Jaxpr, halved: str | None) -> float:
    return sum(_of_equation(equation, halved) for equation in jaxpr.eqns)


def _of_equation(equation: core.JaxprEqn, halved: str | None) -> float:
    if halved is not None and halved in str(equation.source_info.name_stack):
        return _of_equation(equation, None) / 2
    name = equation.primitive.name
    if name == "dot_general":
        (contracting, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracting)
    if name == "conv_general_dilated":
        numbers = equation.params["dimension_numbers"]
        kernel = equation.invars[1].aval.shape
        products = math.prod(kernel) / kernel[numbers.rhs_spec[0]]  # all but the kernel's output channels
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * products
    if name == "cond":  # as the dearest branch; a program that chooses by device runs one of them
        return max(_flops(branch.jaxpr, halved) for branch in equation.params["branches"])
    times = 1.0
    if name == "scan":
        times = equation.params["length"]
    elif name == "pallas_call":
        times = math.prod(equation.params["grid_mapping"].grid)
    elif name == "shard_map":
        times = equation.params["mesh"].size
    return times * sum(_flops(inner, halved) for inner in _inner(equation.params))


def _inner(params: dict[str, Any]) -> list[core.Jaxpr]:
    """Functions that an equation calls."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found
