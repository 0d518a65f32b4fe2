"""Floating-point operations of a function, counted on its jaxpr."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def matmul_flops(function: Callable[..., Any], *args: Any, loop_trips: int = 1) -> int:
    """Operations of every matrix product of one call, over all devices together.

    Two for each multiply-add. Scans are multiplied out, a ``while_loop`` runs
    ``loop_trips`` times, and what rematerialisation computes again is counted again;
    element-wise work, which is some percent in a transformer, is not counted.

    >>> import jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    >>> matmul_flops(lambda x: x @ x.T, x)
    256
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    # What nobody reads, such as the gradient of a kernel that rests, is not computed.
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(jaxpr, loop_trips)


def _count(jaxpr: core.Jaxpr, loop_trips: int) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            result = math.prod(equation.outvars[0].aval.shape)
            total += 2 * result * math.prod(left[axis] for axis in contracted)
            continue
        inner = [_count(j, loop_trips) for j in core.jaxprs_in_params(params)]
        times = 1
        if name == "scan":
            times = params["length"]
        elif name == "while":
            times = loop_trips
        elif name == "shard_map":  # inside are one device's shapes
            times = params["mesh"].size
        elif name == "pallas_call":  # inside is one block; skipped blocks count
            times = math.prod(params["grid_mapping"].grid)
        total += max(inner) if name == "cond" else times * sum(inner)
    return total
