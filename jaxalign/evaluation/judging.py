"""What a judge is, and its verdicts: checked, in both orders, NaN where there is none.

A judge answers in batches and may fail to answer: NaN is no verdict, never 0. Whoever
asks is told how many there are, and leaves them out.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

_log = logging.getLogger(__name__)

Metadata = Sequence[Mapping[str, Any]]


class Judge(Protocol):
    """Scores responses; larger is better.

    Attributes:
      fingerprint: says what its verdicts depend on; part of the keys of outputs.
    """

    fingerprint: str

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        metadata: Metadata | None = None,
    ) -> np.ndarray:
        """Float32 ``[n]``, NaN for no verdict; `metadata` is more about each row."""


class PairwiseJudge(Protocol):
    """Prefers one of two responses."""

    fingerprint: str

    def compare(
        self,
        prompts: Sequence[str],
        a: Sequence[str],
        b: Sequence[str],
        metadata: Metadata | None = None,
    ) -> np.ndarray:
        """Float32 ``[n]`` in [0, 1]: 1 prefers ``a``, 0.5 is a tie, NaN no verdict."""


def is_pairwise(judge: Judge | PairwiseJudge) -> bool:
    """Whether a judge compares two responses rather than scoring one."""
    return hasattr(judge, "compare")


def scores(
    judge: Judge,
    prompts: Sequence[str],
    responses: Sequence[str],
    metadata: Metadata | None = None,
) -> np.ndarray:
    """A judge's scores of responses, float32 ``[n]``, and a log line on those missing.

    Raises:
      ValueError: for an infinite score, or another number of scores than responses.
    """
    found = _numbers(judge(prompts, responses, metadata), len(responses))
    for i in np.flatnonzero(np.isinf(found)):
        raise ValueError(
            f"The judge returned {found[i]} for prompt {prompts[i][:80]!r}; expected a "
            "finite score, or NaN for no verdict."
        )
    _tell_missing(found, "responses")
    return found


def preferences(
    judge: PairwiseJudge,
    prompts: Sequence[str],
    a: Sequence[str],
    b: Sequence[str],
    metadata: Metadata | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """A pairwise judge's preferences for ``a``, asked in both orders.

    Judges favour a place as well as an answer; the mean over both orders cancels the
    part that does not depend on the answers.

    Returns:
      ``(preference, bias)``, float64 ``[n]``: the mean preference for ``a`` in [0, 1],
      and by how much the judge favoured what stood first, in [-1, 1]. Both are NaN
      where an order has no verdict.
    """

    def both(one: Sequence[Any], other: Sequence[Any]) -> list[Any]:
        return [x for pair in zip(one, other, strict=True) for x in pair]

    asked = both(prompts, prompts)
    more = both(metadata, metadata) if metadata is not None else None
    found = judge.compare(asked, both(a, b), both(b, a), more)
    found = _numbers(found, len(asked)).astype(np.float64)
    for i in np.flatnonzero((found < 0.0) | (found > 1.0)):
        raise ValueError(
            f"The judge returned {found[i]} for prompt {asked[i][:80]!r}; expected a "
            "preference in [0, 1] (1: the first response, 0.5: a tie)."
        )
    forward, backward = found[0::2], found[1::2]
    # In this form equal preferences give exactly 0.5: a tie, whatever the rounding.
    preferred = 0.5 + (forward - backward) / 2.0
    _tell_missing(preferred, "comparisons")
    return preferred, forward + backward - 1.0


def verdicts(
    groups: Iterable[tuple[str, Sequence[str]]],
    judge: Judge | PairwiseJudge,
    metadata: Metadata | None = None,
) -> list[np.ndarray]:
    """The scores of every response of every group, asked for in one batch.

    Args:
      groups: ``(prompt, responses)``.
      judge: where it compares, a response's score is its mean preference over the
        others of its group; 0.5 for one that is alone.
      metadata: one mapping for each group.

    Returns:
      For each group an array, NaN where there is no verdict.

    >>> class Length:
    ...     fingerprint = "length"
    ...     def __call__(self, prompts, responses, metadata=None):
    ...         return np.array([len(r) for r in responses], np.float32)
    >>> verdicts([("p", ["a", "bb"]), ("q", ["ccc"])], Length())
    [array([1., 2.], dtype=float32), array([3.], dtype=float32)]
    """
    groups = list(groups)
    about = metadata or [None] * len(groups)
    if not is_pairwise(judge):
        sizes = [len(responses) for _, responses in groups]
        if not sum(sizes):
            return [np.zeros(0, np.float32) for _ in groups]
        texts = [text for _, responses in groups for text in responses]
        of = np.repeat(np.arange(len(groups)), sizes)
        each = [about[g] for g in of] if metadata else None
        found = scores(judge, [groups[g][0] for g in of], texts, each)
        return np.split(found, np.cumsum(sizes)[:-1])
    pairs = [
        (g, i, j)
        for g, (_, responses) in enumerate(groups)
        for i, j in itertools.combinations(range(len(responses)), 2)
    ]
    # Per group, the preference of each response over each of the others.
    won = [np.full((len(r), len(r)), np.nan) for _, r in groups]
    if pairs:
        preferred, _ = preferences(
            judge,
            [groups[g][0] for g, _, _ in pairs],
            [groups[g][1][i] for g, i, _ in pairs],
            [groups[g][1][j] for g, _, j in pairs],
            [about[g] for g, _, _ in pairs] if metadata else None,
        )
        for (g, i, j), value in zip(pairs, preferred, strict=True):
            won[g][i, j], won[g][j, i] = value, 1.0 - value
    with np.errstate(invalid="ignore"):  # no verdict on any: 0/0
        means = [np.nansum(w, 1) / np.sum(w == w, 1) for w in won]
    alone = np.array([0.5], np.float32)
    return [m.astype(np.float32) if len(m) != 1 else alone for m in means]


def _numbers(found: Any, expected: int) -> np.ndarray:
    found = np.asarray(found, np.float32)
    if found.shape != (expected,):
        raise ValueError(
            f"The judge was asked for {expected} verdicts and gave an array of shape "
            f"{found.shape}; expected [{expected}]."
        )
    return found


def _tell_missing(found: np.ndarray, what: str) -> None:
    missing = int(np.isnan(found).sum())
    if missing:
        _log.warning("%d of %d %s have no verdict.", missing, len(found), what)
