"""Judges: any Python callable that scores a response or prefers one of two.

* ``judge(prompt, response) -> float``: a reward; larger is better.
* ``judge(prompt, a, b) -> preference``: in [0, 1], how strongly ``a`` is preferred;
  0.5 is a tie.

The number of required arguments tells them apart.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import pathlib
import pkgutil
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

Judge = Callable[..., float]


def _hint(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def _import_module(spec: str, module: str) -> ModuleType:
    """Imports a dotted module, and says which of its parts is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not f"{module}.".startswith(f"{missing}."):
            raise  # the module is there; something that it imports is not
        parent, _, name = missing.rpartition(".")
        path = None  # the top level
        names: list[str] = []
        if parent:
            package = importlib.import_module(parent)
            if not hasattr(package, "__path__"):
                raise ValueError(
                    f"Cannot resolve {spec!r}: {parent!r} is a module, not a package; "
                    f"use '{parent}:function'."
                ) from error
            path = package.__path__
        else:
            names += sys.stdlib_module_names
        names += [found.name for found in pkgutil.iter_modules(path)]
        raise ValueError(
            f"Cannot resolve {spec!r}: no module named {missing!r}."
            f"{_hint(name, names)} Modules are looked up on the Python path; a file is "
            "named 'path/to/file.py:function'."
        ) from error


def _import_file(spec: str, path: pathlib.Path) -> ModuleType:
    if not path.is_file():
        folder = path.parent
        files = [p.name for p in folder.glob("*.py")] if folder.is_dir() else []
        raise ValueError(
            f"Cannot resolve {spec!r}: no file {path}.{_hint(path.name, files)}"
        )
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def resolve_callable(spec: str) -> Callable[..., Any]:
    """The callable that a gin file or the command line names.

    Args:
      spec: ``"package.module:function"`` (``module:Class.method`` too) or
        ``"path/to/file.py:function"``.

    Returns:
      The callable.

    Raises:
      ValueError: saying which part was not found, and the nearest names there are.
      TypeError: when the name is not callable.

    >>> resolve_callable("math:sqrt")(9.0)
    3.0
    """
    module_name, separator, qualified_name = spec.rpartition(":")
    if not separator or not module_name or not qualified_name:
        raise ValueError(
            f"Expected 'package.module:function' or 'file.py:function', got {spec!r}."
        )
    if module_name.endswith(".py"):
        found: Any = _import_file(spec, pathlib.Path(module_name).expanduser())
    else:
        found = _import_module(spec, module_name)
    for name in qualified_name.split("."):
        if not hasattr(found, name):
            public = [n for n in dir(found) if not n.startswith("__")]
            where = getattr(found, "__name__", module_name)
            raise ValueError(
                f"Cannot resolve {spec!r}: {where!r} has no {name!r}."
                f"{_hint(name, public)}"
            )
        found = getattr(found, name)
    if not callable(found):
        raise TypeError(
            f"{spec!r} is a {type(found).__name__}, not a function or other callable."
        )
    return found


def is_pairwise(judge: Judge) -> bool:
    """Whether a judge compares two responses rather than scoring one.

    Raises:
      ValueError: when it requires neither two nor three arguments.
    """
    positional = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    required = [
        p.name
        for p in inspect.signature(judge).parameters.values()
        if p.default is p.empty and p.kind in positional
    ]
    if len(required) not in (2, 3):
        name = getattr(judge, "__qualname__", None) or type(judge).__qualname__
        raise ValueError(
            "A judge takes (prompt, response) and returns a score, or takes (prompt, "
            f"a, b) and returns a preference in [0, 1]; {name} requires {required}."
        )
    return len(required) == 3


def score(judge: Judge, prompt: str, response: str) -> float:
    """A judge's score of a response, checked to be a finite number."""
    value = float(judge(prompt, response))
    if not math.isfinite(value):
        raise ValueError(
            f"The judge returned {value} for prompt {prompt[:80]!r}; expected a finite "
            "score."
        )
    return value


def preference(judge: Judge, prompt: str, a: str, b: str) -> tuple[float, float]:
    """A pairwise judge's preference for ``a``, asked in both orders.

    Judges favour a place as well as an answer; the mean over both orders cancels the
    part that does not depend on the answers.

    Returns:
      ``(preference, bias)``: the mean preference for ``a`` in [0, 1], and by how much
      the judge favoured what stood first, in [-1, 1].
    """
    forward, backward = float(judge(prompt, a, b)), float(judge(prompt, b, a))
    for value in (forward, backward):
        if not 0.0 <= value <= 1.0:
            raise ValueError(
                f"The judge returned {value} for prompt {prompt[:80]!r}; expected a "
                "preference in [0, 1] (1: the first response, 0.5: a tie)."
            )
    # In this form equal preferences give exactly 0.5: a tie, whatever the rounding.
    return 0.5 + (forward - backward) / 2.0, forward + backward - 1.0
