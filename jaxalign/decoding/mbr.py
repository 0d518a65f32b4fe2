"""Minimum Bayes risk: of a pool of samples, the one most like the others.

Kumar and Byrne 2004; for neural generation Eikema and Aziz 2020 (arXiv 2005.10283).
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence

import numpy as np


def expected_utilities(
    pool: Sequence[str], metric: Callable[[str, str], float]
) -> np.ndarray:
    """The mean of ``metric(candidate, reference)`` over the pool, ``[len(pool)]``.

    A candidate is among its own references, which ranks as leaving it out does where
    ``metric(x, x)`` is the same for all ``x``.

    Args:
      pool: the candidates, usually samples of the model.
      metric: ``metric(hypothesis, reference)``, larger is better, for example
        ``lambda h, r: sacrebleu.sentence_chrf(h, [r]).score``. Called once for each
        pair of different texts.

    >>> overlap = lambda a, b: len(set(a) & set(b)) / len(set(a) | set(b))
    >>> expected_utilities(["ab", "abc", "z"], overlap).round(2).tolist()
    [0.56, 0.56, 0.33]
    """
    counts = collections.Counter(pool)
    if not counts:
        raise ValueError("Minimum Bayes risk needs at least one candidate.")

    @functools.cache
    def utility(candidate: str) -> float:
        total = sum(n * metric(candidate, text) for text, n in counts.items())
        return total / counts.total()

    return np.array([utility(candidate) for candidate in pool])


def minimum_bayes_risk(pool: Sequence[str], metric: Callable[[str, str], float]) -> int:
    """The index of the candidate of highest expected utility; of equals the first.

    >>> minimum_bayes_risk(["red", "blue", "red"], lambda a, b: float(a == b))
    0
    """
    return int(np.argmax(expected_utilities(pool, metric)))
