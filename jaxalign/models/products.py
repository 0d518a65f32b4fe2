"""Products of two arrays, accumulated in float32 whatever their dtype.

XLA's CPU compiler takes a bfloat16 product to the processor's bfloat16 unit
(AVX512-BF16, AMX) where its result is float32, and not where it is bfloat16: then it is
slower than a float32 product. So on CPUs the result is asked for in float32 and rounded
afterwards, forward and backward. Accelerators accumulate in float32 in any case; there
the rounded result is asked for, which is half as much to send between devices.

In float32 a product is what JAX makes of it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# The products with a kernel, which `remat_policy = 'minimal'` keeps. By this name they
# are kept as they were rounded; by their kind they would be as float32 sums.
WITH_KERNEL = "product_with_kernel"


def einsum(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """``jnp.einsum`` of two arrays of one dtype, in that dtype.

    Of the letters each operand has, the other or the result must have each.

    >>> einsum("ab,bc->ac", jnp.ones((2, 3)), jnp.ones((3, 1))).tolist()
    [[3.0], [3.0]]
    """
    if x.dtype == jnp.bfloat16:
        return _rounded(_spelt(subscripts, x), x, y)
    return jnp.einsum(subscripts, x, y)


def float32_einsum(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`einsum` with a float32 result."""
    if x.dtype == jnp.bfloat16:
        return _summed(_spelt(subscripts, x), x, y)
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``x [..., E] @ kernel [E, F]``, whose gradients need no transposed copies.

    JAX's own rule for the kernel's gradient contracts ``dy`` with ``x`` and transposes
    the result; CPUs then write the elementwise work before ``dy`` a second time, column
    by column.
    """
    if x.dtype == jnp.bfloat16:
        product = einsum("...e,ef->...f", x, kernel)
    else:
        product = _matmul(x, kernel)
    return checkpoint_name(product, WITH_KERNEL)


def _spelt(subscripts: str, x: jax.Array) -> str:
    """Letters for the ``...`` of the first operand.

    >>> _spelt("...e,ef->...f", jnp.ones((2, 3, 4)))
    'ABe,ef->ABf'
    """
    of_x = subscripts.split(",")[0]
    count = x.ndim - len(of_x.replace("...", ""))
    return subscripts.replace("...", "ABCDEFGH"[:count])


@jax.custom_vjp
def _matmul(x, kernel):
    return jnp.dot(x, kernel)


def _matmul_forward(x, kernel):
    return jnp.dot(x, kernel), (x, kernel)


def _matmul_backward(residuals, dy):
    x, kernel = residuals
    dx = jnp.einsum("...f,ef->...e", dy, kernel)
    return dx, jnp.einsum("...e,...f->ef", x, dy)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _in_float32(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(
        x,
        y,
        cpu=functools.partial(_as_one_matrix_product, subscripts),
        default=functools.partial(
            jnp.einsum, subscripts, preferred_element_type=jnp.float32
        ),
    )


def _once_rounded(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(
        x,
        y,
        cpu=lambda x, y: _as_one_matrix_product(subscripts, x, y).astype(x.dtype),
        default=functools.partial(jnp.einsum, subscripts),
    )


def _as_one_matrix_product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A float32 einsum as ``[batch, m, k] x [batch, k, n]`` or ``x [batch, n, k]``.

    XLA's CPU compiler decides early which products it leaves to its library, and takes
    these. Were it to fold a transpose into one of them after that, the library would
    refuse it and nothing else could run it: barriers keep transposes out.
    """
    operands, of_z = subscripts.split("->")
    of_x, of_y = operands.split(",")
    batch = [a for a in of_x if a in of_y and a in of_z]
    inner = [a for a in of_x if a in of_y and a not in of_z]
    rows = [a for a in of_x if a not in of_y]
    columns = [a for a in of_y if a not in of_x]

    def ordered(array: jax.Array, axes: str, wanted: list[str]) -> jax.Array:
        return jnp.transpose(array, [axes.index(a) for a in wanted])

    first, last = len(batch) + len(rows), len(batch)
    x = ordered(x, of_x, [*batch, *rows, *inner])
    if list(of_y) == [*batch, *columns, *inner]:
        last += len(columns)
    else:
        y = ordered(y, of_y, [*batch, *inner, *columns])
    x, y = jax.lax.optimization_barrier((x, y))
    over = range(len(inner))
    z = jax.lax.dot_general(
        x,
        y,
        (
            ([first + i for i in over], [last + i for i in over]),
            (range(len(batch)), range(len(batch))),
        ),
        preferred_element_type=jnp.float32,
    )
    found = [*batch, *rows, *columns]
    if found == list(of_z):
        return z
    return ordered(jax.lax.optimization_barrier(z), "".join(found), list(of_z))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded(subscripts, x, y):
    return _once_rounded(subscripts, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(subscripts, x, y):
    return _in_float32(subscripts, x, y)


def _backward(subscripts: str, residuals: Any, dz: jax.Array) -> Any:
    # The cotangent is rounded too: a float32 one would leave the unit.
    x, y = residuals
    dz = dz.astype(x.dtype)
    operands, of_z = subscripts.split("->")
    of_x, of_y = operands.split(",")
    dx = _once_rounded(f"{of_z},{of_y}->{of_x}", dz, y)
    return dx, _once_rounded(f"{of_x},{of_z}->{of_y}", x, dz)


_rounded.defvjp(lambda s, x, y: (_once_rounded(s, x, y), (x, y)), _backward)
_summed.defvjp(lambda s, x, y: (_in_float32(s, x, y), (x, y)), _backward)
