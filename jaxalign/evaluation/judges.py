"""Judges: any Python callable that scores a response or prefers one of two.

* ``judge(prompt, response) -> float``: a reward; larger is better.
* ``judge(prompt, a, b) -> preference``: in [0, 1], how strongly ``a`` is preferred;
  0.5 is a tie.

The number of required arguments tells them apart.
"""

from __future__ import annotations

import inspect
import math
import pathlib
from collections.abc import Callable
from typing import Any

from jaxalign import user_code

Judge = Callable[..., float]


class NoFunctionError(TypeError, ValueError):
    """What a user named is there, and cannot be called."""


def resolve_callable(spec: str) -> Callable[..., Any]:
    """The callable that a gin file or the command line names.

    Args:
      spec: ``"package.module:function"`` (``module:Class.method`` too) or
        ``"path/to/file.py:function"``.

    Returns:
      The callable.

    Raises:
      ValueError: saying which part was not found, and the nearest names there are.
      NoFunctionError: when the name is not callable.

    >>> resolve_callable("math:sqrt")(9.0)
    3.0
    """
    module_name, separator, qualified_name = spec.rpartition(":")
    if not separator or not module_name or not qualified_name:
        raise ValueError(
            f"Expected 'package.module:function' or 'file.py:function', got {spec!r}."
        )
    found: Any = user_code.load_module(module_name, asked_as=spec)
    is_file = module_name.endswith(".py")
    where = pathlib.Path(module_name).stem if is_file else module_name
    for name in qualified_name.split("."):
        if not hasattr(found, name):
            public = [n for n in dir(found) if not n.startswith("__")]
            raise ValueError(
                f"Cannot resolve {spec!r}: {where!r} has no {name!r}."
                f"{user_code.hint(name, public)}"
            )
        found = getattr(found, name)
        where = getattr(found, "__name__", name)
    if not callable(found):
        raise NoFunctionError(
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
