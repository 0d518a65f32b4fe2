"""Exact conversion between scanned and unscanned parameter layouts."""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxalign.models.stacks import PARAM_SCAN_AXIS

_STACKS = ("encoder", "decoder")
_LAYER = re.compile(r"layers_(\d+)")


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Turns ``encoder/layers_i/...`` into ``encoder/encoder/...``, same for decoder.

    Layer ``i`` of a leaf of shape ``[a, ...]`` becomes entry ``[:, i]`` of one of
    shape ``[a, layers, ...]``. Bits are kept; so are leaves outside the layers and
    parameters already stacked.

    Raises:
      ValueError: layer numbers with a gap.
    """
    out: dict[tuple[str, ...], Any] = {}
    apart: dict[tuple[str, ...], dict[int, Any]] = collections.defaultdict(dict)
    for (name, *tail), leaf in traverse_util.flatten_dict(dict(params)).items():
        layer = name in _STACKS and _LAYER.fullmatch(tail[0])
        if layer:
            apart[name, name, *tail[1:]][int(layer[1])] = leaf
        else:
            out[name, *tail] = leaf
    for names, leaves in apart.items():
        if sorted(leaves) != list(range(len(leaves))):
            raise ValueError(
                f"{names[0]} must have layers_0 ... layers_{len(leaves) - 1}, got the "
                f"numbers {sorted(leaves)}."
            )
        xp = np if isinstance(leaves[0], np.ndarray) else jnp
        ordered = [leaves[i] for i in range(len(leaves))]
        out[names] = xp.stack(ordered, axis=PARAM_SCAN_AXIS)
    return traverse_util.unflatten_dict(out)


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`stack_layers`, bit for bit."""
    out = {}
    for (name, *tail), leaf in traverse_util.flatten_dict(dict(params)).items():
        if name in _STACKS and tail[0] == name:
            for i in range(leaf.shape[PARAM_SCAN_AXIS]):
                out[name, f"layers_{i}", *tail[1:]] = _layer(leaf, i)
        else:
            out[name, *tail] = leaf
    return traverse_util.unflatten_dict(out)


def _layer(leaf: Any, i: int) -> Any:
    return leaf[(slice(None),) * PARAM_SCAN_AXIS + (i,)]


def relayout(tree: Any, like: Any) -> Any:
    """A train state, or any tree that embeds parameters, in another layout.

    The arrays of `tree` in the structure of `like` (arrays or shapes), bit for bit.
    What an optimizer keeps one of for a whole stack, such as an unused moment, it keeps
    one of for each layer, all alike.
    """
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]

    def names_of(path):
        return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)

    known = {names_of(path): leaf for path, leaf in flat}

    def one(path, wanted):
        names = names_of(path)
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


def _stacked(known: Any, head: Any, tail: Any, wanted: Any) -> Any:
    names = ((*head, f"layers_{i}", *tail) for i in itertools.count())
    leaves = [known[n] for n in itertools.takewhile(known.__contains__, names)]
    if leaves[0].shape == wanted.shape:
        return leaves[0]
    if wanted.shape[PARAM_SCAN_AXIS] == 1:  # one for the whole stack
        leaves = leaves[:1]
    return jnp.stack(leaves, axis=PARAM_SCAN_AXIS)


def _cut(leaf: Any, layer: int, wanted: Any) -> Any:
    if leaf.shape == wanted.shape:
        return leaf
    return _layer(leaf, min(layer, leaf.shape[PARAM_SCAN_AXIS] - 1))
