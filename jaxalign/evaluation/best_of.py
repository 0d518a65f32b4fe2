"""Best-of-n: what choosing the best of n samples by a score gains, and what it costs.

The estimator is unbiased: of a pool of M samples it averages over all subsets of n, in
closed form, where drawing one subset would add noise. Pure functions of arrays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.special

from jaxalign.evaluation.intervals import mean_with_ci


def kl(n: int) -> float:
    """``log n - (n - 1) / n``: the divergence of best-of-n from the policy, in nats.

    Exact for scores without ties and a continuous distribution of samples; with ties,
    or few distinct responses, an upper bound.

    >>> [round(kl(n), 6) for n in (1, 4, 16, 64)]
    [0.0, 0.636294, 1.835089, 3.174508]
    """
    if n < 1:
        raise ValueError(f"best-of-n needs n of at least 1, got {n}.")
    return math.log(n) - (n - 1) / n


def weights(scores: Sequence[float], n: int) -> np.ndarray:
    """The probability of each sample to be the best of n drawn without replacement.

    Of M samples the i-th lowest is the best of ``C(i - 1, n - 1)`` subsets out of
    ``C(M, n)``; equal scores share theirs, as when ties are broken by chance.

    Raises:
      ValueError: for more than there are, or a score that is not finite.

    >>> weights([0.0, 1.0, 2.0], 2).round(4).tolist()
    [0.0, 0.3333, 0.6667]
    """
    found = np.asarray(scores, np.float64)
    size = len(found)
    if not 1 <= n <= size:
        raise ValueError(f"best-of-{n} of a pool of {size} samples.")
    if not np.isfinite(found).all():
        raise ValueError("best-of-n needs a finite score of every sample.")
    rank = np.arange(size)  # samples below
    ways = scipy.special.gammaln(rank + 1.0) - scipy.special.gammaln(
        np.maximum(rank - n + 2.0, 1.0)
    )
    ways -= scipy.special.gammaln(n)
    total = scipy.special.gammaln(size + 1.0) - scipy.special.gammaln(size - n + 1.0)
    total -= scipy.special.gammaln(n + 1.0)
    own = np.where(rank >= n - 1, np.exp(ways - total), 0.0)
    own /= own.sum()
    _, group = np.unique(found, return_inverse=True)
    order = np.argsort(found, kind="stable")
    shared = np.bincount(group[order], own) / np.bincount(group)
    return shared[group]


def expected(scores: Sequence[float], values: Sequence[float], n: int) -> float:
    """The mean `values` of the sample with the best of n `scores`, over all subsets.

    >>> round(expected([0.0, 1.0, 2.0], [5.0, 1.0, 4.0], 2), 6)
    3.0
    """
    return float(np.dot(weights(scores, n), np.asarray(values, np.float64)))


def sizes(least: int) -> list[int]:
    """Powers of two up to the smallest pool, and that.

    >>> sizes(12)
    [1, 2, 4, 8, 12]
    """
    return sorted({2**k for k in range(least.bit_length())} | {least})


class Curve(NamedTuple):
    """By n, over prompts.

    Attributes:
      n: samples to choose among.
      kl: from the policy, in nats.
      mean, low, high: of the value, with a 95% interval over prompts.
    """

    n: list[int]
    kl: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        return self._asdict()

    @property
    def peak(self) -> int:
        """The n of the highest mean: after it the score is over-optimised.

        >>> Curve([1, 2, 4], [0.0, 0.2, 0.6], [0.1, 0.4, 0.3], [], []).peak
        2
        """
        return self.n[int(np.argmax(self.mean))]


def curve(
    scores: Sequence[Sequence[float]], values: Sequence[Sequence[float]]
) -> Curve:
    """The value of best-of-n by a score, for n up to the smallest pool.

    Args:
      scores: of each prompt's pool, who chooses.
      values: of the same samples, what is measured: the scores themselves for a model's
        own belief, a gold judge's for the truth.
    """
    if not len(scores):
        raise ValueError("A best-of-n curve needs a pool of at least one prompt.")
    every = sizes(min(map(len, scores)))
    found = [
        mean_with_ci([expected(s, v, n) for s, v in zip(scores, values, strict=True)])
        for n in every
    ]
    mean, low, high = (list(column) for column in zip(*found, strict=True))
    return Curve(every, [kl(n) for n in every], mean, low, high)
