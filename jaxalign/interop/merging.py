"""An adapter merged into a network's kernels as they are read, part by part.

`jaxalign.models.adapters.merge` does it on devices; this needs a kernel's part and what
is beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

from jaxalign.interop.leaves import Index, Leaf
from jaxalign.models import adapters


def merged(
    adapter: adapters.Adapter, base: Mapping[str, Leaf], own: Mapping[str, Leaf]
) -> dict[str, Leaf]:
    """The leaves of a network with an adapter in it; a soft prompt is one more leaf.

    Args:
      adapter: its kind and settings.
      base: the network's parameters by path, layers apart.
      own: the adapter's, likewise, and whatever else stands in the place of the base's.
    """
    if not adapter.merges:
        return {**base, **own}
    beside: dict[str, dict[str, Leaf]] = {}
    replaced = {}
    for path, leaf in own.items():
        module, _, name = path.rpartition("/")
        if adapters.is_adapter(path):
            beside.setdefault(f"{module}/kernel", {})[name] = leaf
        else:
            replaced[path] = leaf
    scale = getattr(adapter, "scale", 1.0)
    return {
        path: _merged(leaf, beside[path], scale) if path in beside else leaf
        for path, leaf in {**base, **replaced}.items()
    }


def _merged(kernel: Leaf, beside: Mapping[str, Leaf], scale: float) -> Leaf:
    """``kernel`` with what is beside it merged in, part by part."""

    @functools.cache
    def held(name: str) -> np.ndarray:
        return np.asarray(beside[name].read(), np.float32)

    @functools.cache
    def gain() -> np.ndarray:
        full = np.asarray(kernel.read(), np.float32)
        updated = full + scale * (held("lora_a") @ held("lora_b"))
        return held("magnitude") / np.linalg.norm(updated, axis=0)

    def read(at: Index) -> np.ndarray:
        values = np.asarray(kernel.read(at), np.float32)
        if "lora_a" in beside:
            a, b = held("lora_a")[at[0]], held("lora_b")[:, at[1]]
            values = values + scale * (a @ b)
        if "magnitude" in beside:
            values = values * gain()[at[1]]
        if "gain_in" in beside:
            values = values * held("gain_in")[at[0], None]
        if "gain" in beside:
            values = values * held("gain")[at[1]]
        return values

    return Leaf(kernel.shape, np.dtype(np.float32), read)
