"""Arrays of a checkpoint that are read by parts, and one layout seen as another.

A `Leaf` knows its shape and reads any block of itself. Views are leaves made of leaves:
a stack of layers, one layer of a stack, heads joined into one axis. So a model is read
straight into the layout that a network wants, block by block.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

Index = tuple[slice, ...]
Read = Callable[[Index], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array that is read by blocks.

    Attributes:
      shape: of the whole.
      dtype: of what is read.
      block: reads a block, given one slice with start and stop for each axis.
      names: of the stored arrays that it is made of, where it matters which.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    block: Read = dataclasses.field(repr=False)
    names: tuple[str, ...] = ()

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

    @property
    def transposed(self) -> Leaf:
        """The same with its axes in reverse."""
        return transposed(self, range(len(self.shape))[::-1])


def of_array(array: Any, name: str = "") -> Leaf:
    """A leaf of an array that is there, or of anything that slices like one.

    Of a sharded array of several processes, all of them have to read, and it is
    gathered.
    """
    return Leaf(
        tuple(array.shape), np.dtype(array.dtype), _reader(array), (name,) * bool(name)
    )


def _reader(array: Any) -> Read:
    if not isinstance(array, jax.Array):
        return lambda index: array[index]
    if not array.is_fully_addressable:
        return lambda index: np.asarray(
            multihost_utils.process_allgather(array[index], tiled=True)
        )

    def block(index: Index) -> np.ndarray:
        # Only the part comes to the host; one program cuts all parts of a size.
        starts = [part.start for part in index]
        sizes = [part.stop - part.start for part in index]
        return np.asarray(jax.lax.dynamic_slice(array, starts, sizes))

    return block


def fingerprint(leaves: Mapping[str, Leaf]) -> str:
    """SHA-256 over names and float32 values in name order, one leaf at a time.

    A jaxalign checkpoint's, so that a conversion has that of what it was made from.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(leaves.items()):
        digest.update(name.encode())
        values = leaf.read().astype(np.float32, copy=False)
        digest.update(values.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def layer(leaf: Leaf, number: int, axis: int) -> Leaf:
    """One entry along an axis, which is dropped."""

    def block(index: Index) -> np.ndarray:
        wider = (*index[:axis], slice(number, number + 1), *index[axis:])
        return leaf.block(wider).squeeze(axis)

    shape = leaf.shape[:axis] + leaf.shape[axis + 1 :]
    return Leaf(shape, leaf.dtype, block, leaf.names)


def stacked(leaves: Sequence[Leaf], axis: int) -> Leaf:
    """Leaves of one shape as entries along a new axis."""
    first = leaves[0]
    for leaf in leaves:
        if (leaf.shape, leaf.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"Layers of one stack must be alike, but {first.names} is "
                f"{first.dtype} {first.shape} and {leaf.names} is {leaf.dtype} "
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
    return Leaf(shape, first.dtype, block, names)


def transposed(leaf: Leaf, axes: Sequence[int]) -> Leaf:
    """The axes in another order, as ``numpy.transpose``."""

    def block(index: Index) -> np.ndarray:
        inner = [slice(0)] * len(axes)
        for ours, theirs in enumerate(axes):
            inner[theirs] = index[ours]
        return leaf.block(tuple(inner)).transpose(axes)

    shape = tuple(leaf.shape[axis] for axis in axes)
    return Leaf(shape, leaf.dtype, block, leaf.names)


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
    return Leaf(shape, leaf.dtype, block, leaf.names)


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
    return Leaf(shape, leaf.dtype, block, leaf.names)
