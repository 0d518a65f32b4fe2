"""Arrays of a checkpoint that are read by parts, and one layout seen as another.

A `Leaf` knows its shape and reads any block of itself. Views are leaves made of leaves:
a stack of layers, one layer of a stack, heads joined into one axis. So a model is read
straight into the layout that a network wants, block by block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Index = tuple[slice, ...]
Read = Callable[[Index], np.ndarray]


class T5XError(ValueError):
    """A checkpoint of T5X that cannot be read, or does not hold what is wanted."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array that is read by blocks.

    Attributes:
      names: of the stored arrays that it is made of.
      shape: its shape.
      dtype: its dtype.
      block: reads a block, given one slice with start and stop for each axis.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    block: Read = dataclasses.field(repr=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)

    def read(self, index: Sequence[slice] | None = None) -> np.ndarray:
        """A block in memory of its own; the whole array by default.

        Args:
          index: one slice for each axis, without steps, as JAX gives them to the
            callback of ``jax.make_array_from_callback``.
        """
        index = (slice(None),) * len(self.shape) if index is None else tuple(index)
        bounds = tuple(
            slice(*part.indices(size)[:2])
            for part, size in zip(index, self.shape, strict=True)
        )
        return np.array(self.block(bounds), order="C")


def of_array(name: str, array: np.ndarray) -> Leaf:
    """A leaf of an array that is there, or of anything that slices like one."""
    shape = tuple(array.shape)
    return Leaf((name,), shape, np.dtype(array.dtype), lambda index: array[index])


def layer(leaf: Leaf, number: int, axis: int) -> Leaf:
    """One entry along an axis, which is dropped."""

    def block(index: Index) -> np.ndarray:
        wider = (*index[:axis], slice(number, number + 1), *index[axis:])
        return leaf.block(wider).squeeze(axis)

    shape = leaf.shape[:axis] + leaf.shape[axis + 1 :]
    return Leaf(leaf.names, shape, leaf.dtype, block)


def stacked(leaves: Sequence[Leaf], axis: int) -> Leaf:
    """Leaves of one shape as entries along a new axis."""
    first = leaves[0]
    for leaf in leaves:
        if (leaf.shape, leaf.dtype) != (first.shape, first.dtype):
            raise T5XError(
                f"Layers of one stack must be alike, but {first.names[0]!r} is "
                f"{first.dtype} {first.shape} and {leaf.names[0]!r} is {leaf.dtype} "
                f"{leaf.shape}."
            )

    def block(index: Index) -> np.ndarray:
        inner = index[:axis] + index[axis + 1 :]
        blocks = [leaf.block(inner) for leaf in leaves[index[axis]]]
        if blocks:
            return np.stack(blocks, axis)
        sizes = [part.stop - part.start for part in index]
        return np.empty(sizes, first.dtype)

    shape = (*first.shape[:axis], len(leaves), *first.shape[axis:])
    names = tuple(name for leaf in leaves for name in leaf.names)
    return Leaf(names, shape, first.dtype, block)


def transposed(leaf: Leaf, axes: Sequence[int]) -> Leaf:
    """The axes in another order, as ``numpy.transpose``."""

    def block(index: Index) -> np.ndarray:
        inner = [slice(0)] * len(axes)
        for ours, theirs in enumerate(axes):
            inner[theirs] = index[ours]
        return leaf.block(tuple(inner)).transpose(axes)

    shape = tuple(leaf.shape[axis] for axis in axes)
    return Leaf(leaf.names, shape, leaf.dtype, block)


def joined(leaf: Leaf, axis: int) -> Leaf:
    """An axis and the one after it as one, such as heads and their width."""
    width = leaf.shape[axis + 1]

    def block(index: Index) -> np.ndarray:
        low, high = index[axis].start, index[axis].stop
        first = low // width
        whole = slice(first, -(-high // width))
        wider = (*index[:axis], whole, slice(0, width), *index[axis + 1 :])
        found = leaf.block(wider)
        length = found.shape[axis] * width
        found = found.reshape(*found.shape[:axis], length, *found.shape[axis + 2 :])
        part = slice(low - first * width, high - first * width)
        return found[(*(slice(None),) * axis, part)]

    shape = (*leaf.shape[:axis], leaf.shape[axis] * width, *leaf.shape[axis + 2 :])
    return Leaf(leaf.names, shape, leaf.dtype, block)


def split(leaf: Leaf, axis: int, count: int) -> Leaf:
    """An axis as two, of ``count`` and of the rest: the inverse of `joined`."""
    width = leaf.shape[axis] // count

    def block(index: Index) -> np.ndarray:
        first, second = index[axis], index[axis + 1]
        whole = slice(first.start * width, first.stop * width)
        found = leaf.block((*index[:axis], whole, *index[axis + 2 :]))
        length = first.stop - first.start
        shape = (*found.shape[:axis], length, width, *found.shape[axis + 1 :])
        return found.reshape(shape)[(*(slice(None),) * (axis + 1), second)]

    shape = (*leaf.shape[:axis], count, width, *leaf.shape[axis + 1 :])
    return Leaf(leaf.names, shape, leaf.dtype, block)
