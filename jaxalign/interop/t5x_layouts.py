"""T5X's layouts of parameters and this library's, each seen as the other.

T5X's T5 (``examples/t5``) and this library's have the same names and shapes, layers
apart. T5X's other one (``examples/scalable_t5``, umT5's) stacks layers on the second
axis, as this library does with ``scan_layers``, but keeps heads apart in the kernels of
attention, and has a position bias in every layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
from flax import traverse_util

from jaxalign.interop import leaves as views
from jaxalign.interop.folders import unstack
from jaxalign.interop.leaves import Leaf
from jaxalign.models.stacks import PARAM_SCAN_AXIS

_LAYER = re.compile(r"(.*)\b(encoder|decoder)/layers_(\d+)/(.+)")
_STACK = re.compile(r"(.*)\b(encoder|decoder)/\2/(.+)")
_HEADS = re.compile(r".*attention/(query|key|value|out)/kernel")
_BIAS = "relpos_bias/rel_embedding"


def find(leaves: Mapping[str, Leaf], name: str) -> Leaf | None:
    """The array of a name in either layout of layers, whichever the checkpoint has.

    Args:
      leaves: of a checkpoint.
      name: as T5X's, such as ``target/encoder/layers_0/mlp/wo/kernel``, or
        ``target/encoder/encoder/mlp/wo/kernel`` for the stack of all layers.

    Returns:
      Heads joined, as this library has them; None where the checkpoint has no such
      array in any layout.
    """
    if name in leaves:
        return _joined(name, leaves[name])
    if match := _LAYER.fullmatch(name):
        above, stack, number, rest = match.groups()
        whole = f"{above}{stack}/{stack}/{rest}"
        if whole in leaves:
            leaf = _joined(whole, leaves[whole])
            if int(number) < leaf.shape[PARAM_SCAN_AXIS]:
                return views.layer(leaf, int(number), PARAM_SCAN_AXIS)
    if match := _STACK.fullmatch(name):
        above, stack, rest = match.groups()
        parts: list[Leaf] = []
        while (part := f"{above}{stack}/layers_{len(parts)}/{rest}") in leaves:
            parts.append(_joined(part, leaves[part]))
        return views.stacked(parts, PARAM_SCAN_AXIS) if parts else None
    return None


def _joined(name: str, leaf: Leaf) -> Leaf:
    """A kernel of attention with its heads in one axis, ``[E, H * D]``."""
    match = _HEADS.fullmatch(name)
    scanned = is_scanned(name)
    if not match or len(leaf.shape) != 3 + scanned:
        return leaf
    if match[1] != "out":
        return views.joined(leaf, len(leaf.shape) - 2)
    # [H, D, E], or [H, layers, D, E] where layers are scanned.
    leaf = views.transposed(leaf, (0, 2, 1, 3)) if scanned else leaf
    return views.joined(leaf, 0)


def is_scanned(name: str) -> bool:
    """Whether a name is that of a stack of all layers.

    >>> is_scanned("encoder/encoder/mlp/wo/kernel")
    True
    """
    return bool(_STACK.fullmatch(name))


def written(params: Mapping[str, Any]) -> dict[str, Leaf]:
    """Parameters by the names, and in the layout, of the T5X network that they fit.

    Args:
      params: nested or flat by path, in either layout of layers; arrays or `Leaf`.

    Returns:
      Those of ``examples/t5``, or of ``examples/scalable_t5`` where every layer has a
      position bias.

    Raises:
      ValueError: for an array of which this process has a part only.
    """
    for path, value in traverse_util.flatten_dict(dict(params), sep="/").items():
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            raise ValueError(
                f"{path} lies on several processes; write a checkpoint of the run, and "
                "convert that in one process."
            )
    apart = unstack(params)
    bias = apart.get(f"encoder/layers_0/{_BIAS}")
    return apart if bias is None else _scalable(apart, heads=bias.shape[0])


def _scalable(apart: Mapping[str, Leaf], heads: int) -> dict[str, Leaf]:
    found: dict[str, Leaf] = {}
    for path, leaf in apart.items():
        match = _LAYER.fullmatch(path)
        if not match:
            found[path] = leaf
        elif match[3] == "0":
            name = f"{match[2]}/{match[2]}/{match[4]}"
            whole = find(apart, name)
            assert whole is not None  # it has layer 0 at least
            found[name] = _heads_apart(name, whole, heads)
    return found


def _heads_apart(name: str, leaf: Leaf, heads: int) -> Leaf:
    match = _HEADS.fullmatch(name)
    if not match:
        return leaf
    if match[1] != "out":
        return views.split(leaf, len(leaf.shape) - 1, heads)
    return views.transposed(views.split(leaf, 0, heads), (0, 2, 1, 3))
