"""The values of the macros that were parsed last."""

from __future__ import annotations

import copy
from typing import Any

import gin


def macro(name: str) -> Any:
    """A macro's value; gin resolves the references in it when it is copied."""
    return copy.deepcopy(gin.query_parameter(f"{name}/gin.macro.value"))
