"""Exact conversion between scanned and unscanned parameter layouts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.stacks import PARAM_SCAN_AXIS

_STACKS = ("encoder", "decoder")
_LAYER = re.compile(r"layers_(\d+)")


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Turns ``encoder/layers_i/...`` into ``encoder/encoder/...``, same for decoder.

    Layer ``i`` of a leaf of shape ``[a, ...]`` becomes entry ``[:, i]`` of one of
    shape ``[a, layers, ...]``. Bits are kept; so are leaves outside the layers and
    parameters already stacked.

    Args:
      params: parameters of a model with ``scan_layers=False``.

    Returns:
      Parameters of the same model with ``scan_layers=True``.

    Raises:
      ValueError: layer numbers with a gap.
    """

    def stack(*leaves):
        xp = np if isinstance(leaves[0], np.ndarray) else jnp
        return xp.stack(leaves, axis=PARAM_SCAN_AXIS)

    out = dict(params)
    for name in _STACKS:
        if name not in params:
            continue
        layers = {
            int(found[1]): leaf
            for key, leaf in params[name].items()
            if (found := _LAYER.fullmatch(key))
        }
        if sorted(layers) != list(range(len(layers))):
            raise ValueError(
                f"{name} must have layers_0 ... layers_{len(layers) - 1}, got the "
                f"numbers {sorted(layers)}."
            )
        rest = {k: v for k, v in params[name].items() if not _LAYER.fullmatch(k)}
        if layers:
            ordered = [layers[i] for i in range(len(layers))]
            rest[name] = jax.tree.map(stack, *ordered)
        out[name] = rest
    return out


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`stack_layers`, bit for bit.

    Args:
      params: parameters of a model with ``scan_layers=True``.

    Returns:
      Parameters of the same model with ``scan_layers=False``.
    """
    out = dict(params)
    for name in _STACKS:
        if name not in params or name not in params[name]:
            continue
        rest = dict(params[name])
        stacked = rest.pop(name)
        depth = jax.tree.leaves(stacked)[0].shape[PARAM_SCAN_AXIS]
        for i in range(depth):
            rest[f"layers_{i}"] = jax.tree.map(
                lambda x, i=i: x[(slice(None),) * PARAM_SCAN_AXIS + (i,)], stacked
            )
        out[name] = rest
    return out
