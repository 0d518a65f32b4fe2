"""What T5X's Adafactor keeps of each parameter, read and begun anew.

T5X's trainer restores no checkpoint that lacks it, be it all zeros.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from jaxalign.interop import t5x_layouts
from jaxalign.interop.leaves import Leaf
from jaxalign.interop.t5x_files import Checkpoint
from jaxalign.interop.t5x_formats import T5XError

_SLOTS = ("m", "v", "v_col", "v_row")
_MIN_DIM_TO_FACTOR = 128  # of fewer rows or columns nothing is factored

# T5X's standard_logical_factor_rules for the kernels of scanned layers: the axes that
# v_row keeps, and v_col; the layers' axis, 1, is in both. No size is too small there.
_RULES = (
    (r".*attention/out/kernel", (3,), (0, 2)),
    (r".*attention/.*/kernel", (0,), (2, 3)),
    (r".*mlp/wo/kernel", (2,), (0,)),
    (r".*/kernel", (0,), (2,)),
)


def fresh(name: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Zeros in the shapes of T5X; a slot that is not in use holds one.

    Args:
      name: of the parameter, in the layout of T5X's network.
      shape: of the parameter there.

    >>> {slot: x.shape for slot, x in fresh("encoder/x/kernel", (128, 256)).items()}
    {'m': (1,), 'v': (1,), 'v_col': (256,), 'v_row': (128,)}
    """
    slots = {slot: np.zeros(1, np.float32) for slot in _SLOTS}
    rows, columns = _factored(name, shape)
    if rows == columns == ():
        slots["v"] = np.zeros(shape, np.float32)
    else:
        slots["v_row"] = np.zeros(np.delete(shape, columns), np.float32)
        slots["v_col"] = np.zeros(np.delete(shape, rows), np.float32)
    return slots


def _factored(
    name: str, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if t5x_layouts.is_scanned(name):
        for pattern, rows, columns in _RULES:
            if re.fullmatch(pattern, name):
                return rows, columns
        return (), ()
    order = np.argsort(shape, kind="stable")
    if len(shape) != 2 or shape[order[0]] < _MIN_DIM_TO_FACTOR:
        return (), ()
    return (int(order[0]),), (int(order[1]),)


def moments(checkpoint: Checkpoint, like: Mapping[str, Any]) -> dict[str, Any]:
    """Adafactor's second moments, in the shapes of this library's own.

    The two factor the same axes of a parameter with its layers apart. T5X drops the
    axis that a factor averages over, this library keeps it with size 1.

    Args:
      checkpoint: of T5X's ``examples/t5`` network.
      like: shapes of ``v_row``, ``v_col`` and ``v``, each a tree of the parameters with
        layers apart, as an ``AdafactorState`` has them; ``models.relayout`` brings the
        result to another layout.

    Returns:
      Numpy arrays in the structure of `like`. The state's ``count`` is the
      checkpoint's step.

    Raises:
      T5XError: a parameter of which the checkpoint keeps nothing, or which its
        optimizer factored otherwise (``min_dim_size_to_factor``, another optimizer).
    """
    states = checkpoint.param_states()
    found = {}
    for slot, tree in like.items():
        flat = traverse_util.flatten_dict(dict(tree), sep="/")
        found[slot] = traverse_util.unflatten_dict(
            {
                path: _moment(checkpoint, states.get(path, {}).get(slot), path, slot, x)
                for path, x in flat.items()
            },
            sep="/",
        )
    return found


def _moment(
    checkpoint: Checkpoint, leaf: Leaf | None, path: str, slot: str, like: Any
) -> np.ndarray:
    if leaf is None:
        raise T5XError(
            f"{checkpoint.found.path} keeps no {slot!r} of {path}: it was saved "
            "without the optimizer's state, by another optimizer, or in another layout "
            "of layers."
        )
    if math.prod(leaf.shape) != math.prod(like.shape):
        raise T5XError(
            f"{slot!r} of {path} must have shape {tuple(like.shape)} but for axes of "
            f"size 1; {checkpoint.found.path} has {leaf.shape}. Its optimizer factors "
            "other parameters: min_dim_size_to_factor differs."
        )
    return leaf.read().reshape(like.shape)
