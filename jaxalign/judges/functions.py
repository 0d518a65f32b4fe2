"""A user's function as a judge: called one by one, or once if it takes lists."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxalign import user_code
from jaxalign.evaluation.judging import Judge, Metadata, PairwiseJudge

_LISTS = ("list", "List", "Sequence", "tuple", "Tuple")


def from_function(
    function: Callable[..., Any], name: str | None = None
) -> Judge | PairwiseJudge:
    """A judge that asks a function; the number of required arguments tells them apart.

    * ``function(prompt, response) -> float``: a score; larger is better.
    * ``function(prompt, a, b) -> preference``: in [0, 1], how strongly ``a`` is
      preferred; 0.5 is a tie.

    One whose first arguments are named ``prompts`` or annotated as a list gets lists
    and gives as many numbers. None and NaN are no verdict. An argument ``metadata``
    gets what is known of a row, None if nothing is.

    Args:
      function: a function, or any callable.
      name: what the user calls it; by default where it is written.

    Raises:
      ValueError: when it requires neither two nor three arguments.

    >>> from_function(lambda prompt, response: len(response))(["p", "q"], ["a", "bb"])
    array([1., 2.], dtype=float32)
    """
    where = getattr(function, "__qualname__", None) or type(function).__qualname__
    found = inspect.signature(function).parameters
    required = [
        p
        for p in found.values()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        and p.name != "metadata"
    ]
    if len(required) not in (2, 3):
        raise ValueError(
            "A judge takes (prompt, response) and returns a score, or takes (prompt, "
            f"a, b) and returns a preference in [0, 1]; {where} requires "
            f"{[p.name for p in required]}."
        )
    kind = ScoreFunction if len(required) == 2 else PreferenceFunction
    name = name or f"{getattr(function, '__module__', '')}:{where}"
    # Postponed annotations are texts; other kinds are written as they begin.
    text = inspect.formatannotation(required[0].annotation).strip("'")
    is_list = text.partition("[")[0].rpartition(".")[2] in _LISTS
    takes_lists = required[0].name == "prompts" or is_list
    return kind(function, name, takes_lists, "metadata" in found)


class _Function:
    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        takes_lists: bool,
        takes_metadata: bool,
    ):
        self._function, self._name = function, name
        self._takes_lists, self._takes_metadata = takes_lists, takes_metadata
        self.fingerprint = user_code.function_key(name, function)

    def values(self, *texts: Sequence[str], metadata: Metadata | None = None) -> list:
        """What the function itself says, unchecked: a potential's is told as it is."""
        if self._takes_lists:
            named = {"metadata": metadata} if self._takes_metadata else {}
            values = list(self._function(*map(list, texts), **named))
            if len(values) != len(texts[0]):
                raise ValueError(
                    f"{self._name} was given {len(texts[0])} prompts and returned "
                    f"{len(values)} numbers; one for each is expected."
                )
            return values
        more: list[dict[str, Any]] = [{}] * len(texts[0])
        if self._takes_metadata:
            more = [{"metadata": m} for m in metadata or [None] * len(texts[0])]
        rows = zip(more, *texts, strict=True)
        return [self._function(*row, **named) for named, *row in rows]

    def _numbers(self, metadata: Metadata | None, *texts: Sequence[str]) -> np.ndarray:
        values = self.values(*texts, metadata=metadata)
        found = np.full(len(values), np.nan)
        for i, value in enumerate(values):
            if value is None:
                continue
            try:
                found[i] = float(value)
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(
                    f"{self._name} returned {value!r} for prompt {texts[0][i][:80]!r}; "
                    "expected a number, or None for no verdict."
                ) from error
        with np.errstate(over="ignore"):  # inf, which whoever asked refuses
            return found.astype(np.float32)


class ScoreFunction(_Function):
    """``(prompt, response) -> score``; see `from_function`."""

    def __call__(self, prompts, responses, metadata=None):
        """Float32 ``[n]``."""
        return self._numbers(metadata, prompts, responses)


class PreferenceFunction(_Function):
    """``(prompt, a, b) -> preference``; see `from_function`."""

    def compare(self, prompts, a, b, metadata=None):
        """Float32 ``[n]``."""
        return self._numbers(metadata, prompts, a, b)
