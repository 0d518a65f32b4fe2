"""Arrays of a checkpoint onto devices, each part straight to where it is held."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxalign.interop.leaves import Leaf, of_array

# Up to so many bytes the parts of a process are read in one go: chunks that lie in many
# of them are unpacked once.
_AT_ONCE = 1 << 30


def sharding_of(like: Any) -> jax.sharding.Sharding:
    """That of an array or a ``ShapeDtypeStruct``; the first local device by default."""
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return getattr(like, "sharding", None) or alone


def place_leaf(leaf: Leaf, sharding: jax.sharding.Sharding, dtype: Any) -> jax.Array:
    """Reads a parameter onto its devices; devices that hold copies share one read."""
    dtype = np.dtype(dtype)
    held = sharding.addressable_devices_indices_map(leaf.shape).values()
    parts = {_bounds(index, leaf.shape) for index in held}
    box = tuple(
        (min(low for low, _ in axis), max(high for _, high in axis))
        for axis in zip(*parts, strict=True)
    )
    source, corner = leaf, tuple(0 for _ in box)
    size = math.prod(high - low for low, high in box) * leaf.dtype.itemsize
    if len(parts) > 1 and size <= _AT_ONCE:
        block = leaf.read([slice(*bounds) for bounds in box])
        source, corner = of_array(block), tuple(low for low, _ in box)
    blocks: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def block_of(index: tuple[slice, ...]) -> np.ndarray:
        part = _bounds(index, leaf.shape)
        if part not in blocks:
            shifted = [
                slice(low - first, high - first)
                for (low, high), first in zip(part, corner, strict=True)
            ]
            blocks[part] = source.read(shifted).astype(dtype, copy=False)
        return blocks[part]

    return jax.make_array_from_callback(leaf.shape, sharding, block_of)


def _bounds(
    index: Sequence[slice], shape: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    return tuple(
        part.indices(size)[:2] for part, size in zip(index, shape, strict=True)
    )
