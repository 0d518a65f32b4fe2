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


def relayout(tree: Any, like: Any) -> Any:
    """A train state, or any tree that embeds parameters, in another layout.

    Args:
      tree: of a model with its layers apart, or stacked.
      like: the same of the same model in the layout that is wanted; arrays or shapes.

    Returns:
      The arrays of `tree` in the structure of `like`, bit for bit. What an optimizer
      keeps one of for a whole stack, such as an unused moment, it keeps one of for each
      layer, all alike.

    Raises:
      ValueError: naming what `like` has and `tree` has not.
    """
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    known = {_names(path): leaf for path, leaf in flat}

    def one(path, wanted):
        names = _names(path)
        if names in known:
            return known[names]
        for i, name in enumerate(names):
            if name in _STACKS and i + 1 < len(names):
                head, tail = names[: i + 1], names[i + 2 :]
                layer = _LAYER.fullmatch(names[i + 1])
                if names[i + 1] == name and (*head, "layers_0", *tail) in known:
                    return _stacked(known, head, tail, wanted)
                if layer and (*head, name, *tail) in known:
                    return _cut(known[*head, name, *tail], int(layer[1]), wanted)
        raise ValueError(f"There is no {'/'.join(names)} in any layout of layers.")

    return jax.tree_util.tree_map_with_path(one, like)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _stacked(known: Any, head: Any, tail: Any, wanted: Any) -> Any:
    leaves = []
    while (*head, f"layers_{len(leaves)}", *tail) in known:
        leaves.append(known[*head, f"layers_{len(leaves)}", *tail])
    if leaves[0].shape == wanted.shape:
        return leaves[0]
    if wanted.shape[PARAM_SCAN_AXIS] == 1:  # one for the whole stack
        leaves = leaves[:1]
    return jnp.stack(leaves, axis=PARAM_SCAN_AXIS)


def _cut(leaf: Any, layer: int, wanted: Any) -> Any:
    if leaf.shape == wanted.shape:
        return leaf
    layer = min(layer, leaf.shape[PARAM_SCAN_AXIS] - 1)
    return leaf[(slice(None),) * PARAM_SCAN_AXIS + (layer,)]
