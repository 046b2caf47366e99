"""Arithmetic of a traced function: floating-point operations of its matrix products and convolutions, loops multiplied out.

A multiply-add counts as two. What a backward pass computes anew (rematerialisation) counts each time it is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Operations of ``function`` on (abstract) arguments, over all devices together."""
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flops(jaxpr: core.Jaxpr) -> float:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: core.JaxprEqn) -> float:
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
        return max(_flops(branch.jaxpr) for branch in equation.params["branches"])
    times = 1.0
    if name == "scan":
        times = equation.params["length"]
    elif name == "pallas_call":
        times = math.prod(equation.params["grid_mapping"].grid)
    elif name == "shard_map":
        times = equation.params["mesh"].size
    return times * sum(_flops(inner) for inner in _inner(equation.params))


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
