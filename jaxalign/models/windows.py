"""Attention of a chunk of queries to the keys around it, where the others are masked.

Packed rows hold several segments, and a query sees its own. The keys that a chunk of
queries sees lie close together, so that on a CPU the scores of the rest, which would be
multiplied out and then masked, need not be made. Which keys those are is known when
the step runs, and how many there may be when it is compiled: a branch for each of a few
widths. Accelerators compute all keys, as one product of a fixed size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Widths are multiples of this, and at most so many: each is compiled.
_UNIT = 128
_WIDTHS = 4


def widths(length: int) -> tuple[int, ...]:
    """How many keys of a row a chunk may be given, the last of them all.

    >>> widths(512), widths(1024), widths(200)
    ((128, 256, 384, 512), (256, 512, 768, 1024), (128, 200))
    """
    step = _UNIT * -(-length // (_UNIT * _WIDTHS))
    return (*range(step, length, step), length)


def span(start: jax.Array, segments: Any) -> tuple[jax.Array, jax.Array]:
    """The first key that any query of a chunk sees in any row, and how many from there.

    Queries of padding do not count: what they get is not read.

    Args:
      start: the position of the first query in its row.
      segments: `attention_paths.Segments` of the chunk's queries and all keys.
    """
    seen = segments.between(start, 0)[:, 0] & (segments.queries > 0)[:, :, None]
    any_row = jnp.any(seen, axis=(0, 1))
    first = jnp.argmax(any_row)
    last = any_row.shape[0] - 1 - jnp.argmax(any_row[::-1])
    return first, jnp.where(jnp.any(any_row), last - first + 1, 0)


def attend(
    of: Callable[..., jax.Array],
    start: jax.Array | int,
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    segments: Any,
    bias: jax.Array | None,
) -> jax.Array:
    """``of(query, keys, values, mask, bias)`` for the queries of a row from `start` on.

    The backward pass keeps these arguments only, and computes scores and shares again.

    Args:
      of: the function, which masks what a query does not see.
      start: the position of the first query.
      query: ``[B, Lq, H, D]``.
      keys: ``[B, Lk, H, D]``, all of them.
      values: as many.
      segments: `attention_paths.Segments` of the queries and all keys.
      bias: float32 ``[1, H, Lq, Lk]`` or None.
    """
    return _attend(of, jnp.int32(start), query, keys, values, bias, segments)


def _whole(of, start, query, keys, values, bias, segments):
    return of(query, keys, values, segments.between(start, 0), bias)


def _at(width, first, keys, values, bias, segments):
    """The window of `width` keys from `first` on, or before where a row ends."""
    first = jnp.minimum(first, keys.shape[1] - width)

    def cut(x, axis):
        return jax.lax.dynamic_slice_in_dim(x, first, width, axis)

    part = None if bias is None else cut(bias, 3)
    segments = segments.replace(keys=cut(segments.keys, 1))
    return first, cut(keys, 1), cut(values, 1), part, segments


def _windowed(of, width, first, start, query, keys, values, bias, segments):
    first, *parts, segments = _at(width, first, keys, values, bias, segments)
    keys, values, bias = parts
    return of(query, keys, values, segments.between(start, first), bias)


def _by_width(branch, start, segments, *operands):
    """The branch of the smallest width that holds all keys that are seen."""
    first, count = span(start, segments)
    found = widths(segments.keys.shape[1])
    if len(found) == 1:
        return branch(*found, first, *operands)
    index = sum((count > width).astype(jnp.int32) for width in found[:-1])
    return jax.lax.switch(
        index, [functools.partial(branch, w) for w in found], first, *operands
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(of, start, query, keys, values, bias, segments):
    arguments = start, query, keys, values, bias, segments

    def near(*arguments):
        branch = functools.partial(_windowed, of)
        return _by_width(branch, arguments[0], arguments[-1], *arguments)

    return jax.lax.platform_dependent(
        *arguments, cpu=near, default=functools.partial(_whole, of)
    )


def _forward(of, *arguments):
    return _attend(of, *arguments), arguments


def _backward(of: Callable[..., jax.Array], residuals: Any, out: jax.Array) -> Any:
    # As in `jax.checkpoint`: outside of a loop XLA would merge the second pass with the
    # first, and keep its scores.
    out, residuals = jax.lax.optimization_barrier((out, residuals))
    start, *operands, segments = residuals

    def whole(out, start, segments, *operands):
        def again(*operands):
            return _whole(of, start, *operands, segments)

        return jax.vjp(again, *operands)[1](out)

    def window(width, first, out, start, segments, query, keys, values, bias):
        first, *parts, segments = _at(width, first, keys, values, bias, segments)

        def again(query, keys, values, bias):
            mask = segments.between(start, first)
            return of(query, keys, values, mask, bias)

        query, *parts = jax.vjp(again, query, *parts)[1](out)

        def back(part, like, axis):
            zeros = jnp.zeros(like.shape, part.dtype)
            return jax.lax.dynamic_update_slice_in_dim(zeros, part, first, axis)

        more = None if bias is None else back(parts[2], bias, 3)
        return query, back(parts[0], keys, 1), back(parts[1], values, 1), more

    def near(out, start, segments, *operands):
        return _by_width(window, start, segments, out, start, segments, *operands)

    found = jax.lax.platform_dependent(
        out, start, segments, *operands, cpu=near, default=whole
    )
    # None for what has no gradient: the position and the segments.
    return None, *found, None


_attend.defvjp(_forward, _backward)
