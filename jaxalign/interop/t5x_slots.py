"""What T5X's Adafactor keeps of a parameter before its first step.

Its trainer restores no checkpoint that lacks this, be it all zeros.
"""

from __future__ import annotations

import re

import numpy as np

from jaxalign.interop import t5x_layouts

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
