"""Objectives: model forward, loss and metrics; something the training loop can step."""

import importlib
import inspect
import pkgutil

from jaxalign.objectives import metrics
from jaxalign.objectives.base import LossOutput, Objective
from jaxalign.objectives.reference import reference_columns


def _discover() -> dict[str, type[Objective]]:
    """Every concrete objective of this package, by class name."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        members = vars(importlib.import_module(f"{__name__}.{module.name}"))
        for value in members.values():
            if not isinstance(value, type) or not issubclass(value, Objective):
                continue
            if not inspect.isabstract(value):
                found[value.__name__] = value
    return dict(sorted(found.items()))


OBJECTIVES = _discover()
globals().update(OBJECTIVES)

__all__ = ["OBJECTIVES", "LossOutput", "Objective", "metrics", "reference_columns"]
__all__ += list(OBJECTIVES)
