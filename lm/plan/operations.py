"""Floating-point operations of a step as it is written: products of matrices, loops counted as often as they run."""

from __future__ import annotations

import math
from typing import Any

from jax.extend import core


def product_flops(jaxpr: core.Jaxpr) -> int:
    """Operations of all matrix products in a program: 2 for each multiplication and addition.

    Counts what is computed again in a backward pass, and the masked half of attention where it is computed; of branches
    the most expensive; of loops whose length nobody knows one round.

    Args:
      jaxpr: from `jax.make_jaxpr(step)(state, batch).jaxpr` or a traced step.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), (batched, _) = equation.params["dimension_numbers"]
            left, right = (_shape(variable) for variable in equation.invars)
            shared = math.prod(left[i] for i in contracted) * math.prod(left[i] for i in batched)
            # Of the result's axes, shared ones stand in both operands.
            total += 2 * math.prod(left) * math.prod(right) // max(shared, 1)
            continue
        inner = [product_flops(found) for found in _inner(equation.params)]
        if equation.primitive.name == "cond":
            total += max(inner, default=0)
        else:
            total += sum(inner) * equation.params.get("length", 1) if equation.primitive.name == "scan" else sum(inner)
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _inner(params: Any) -> list[core.Jaxpr]:
    """Programs among the parameters of an equation."""
    found: list[core.Jaxpr] = []
    for value in params.values():
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                found.append(one.jaxpr)
            elif isinstance(one, core.Jaxpr):
                found.append(one)
    return found
