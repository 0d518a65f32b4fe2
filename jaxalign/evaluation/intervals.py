"""Confidence intervals for rewards and win rates.

Two methods, chosen for what they assume:

* **Mean rewards**: several samples of one prompt are not independent, so the variance
  comes from cluster totals (the linearised ratio estimator, "CR1" in econometrics)
  with Student's t at ``clusters - 1`` degrees of freedom. With equally large clusters
  it is exactly the t interval of the cluster means. A bootstrap over prompts estimates
  the same variance with added noise and needs a seed.
* **Win rates**: Wilson's score interval, which stays inside [0, 1] and keeps its
  coverage near 0 and 1, where the normal interval collapses to a point. Its ``n`` is
  the number of *prompts*: a tie or an average over samples lies between 0 and 1 and
  varies less than a coin of the same mean, so the interval is conservative there.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.special


class Interval(NamedTuple):
    """An estimate and its confidence bounds."""

    mean: float
    low: float
    high: float


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise ValueError(
            f"confidence must lie strictly between 0 and 1, got {confidence!r}."
        )


def mean_with_ci(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[object] | np.ndarray | None = None,
    *,
    confidence: float = 0.95,
) -> Interval:
    """The mean of all values and its interval when values come in clusters.

    With ``n`` values in ``G`` clusters and residuals ``e = value - mean``, the squared
    standard error is ``G / (G - 1) * sum_g (sum_{i in g} e_i)^2 / n^2`` (Cochran 1977,
    *Sampling Techniques*, §6.3, ratio of cluster totals to cluster sizes).

    Args:
      values: ``[n]`` finite numbers.
      clusters: ``[n]`` labels, such as the prompt each sample answers; None: every
        value is its own cluster.

    Returns:
      An ``Interval``; its bounds are nan when there is only one cluster, which says
      nothing about the spread.

    >>> mean_with_ci([1.0, 1.0, 3.0, 3.0], [0, 0, 1, 1]).mean
    2.0
    """
    _check_confidence(confidence)
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(
            f"values must be a non-empty vector, got shape {values.shape}; flatten "
            "samples and pass clusters= to say which prompt each belongs to."
        )
    if not np.isfinite(values).all():
        first = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"values[{first}] is {values[first]}; expected finite values.")
    labels = np.arange(len(values)) if clusters is None else np.asarray(clusters)
    if labels.shape != values.shape:
        raise ValueError(
            f"clusters must label each of the {len(values)} values, got shape "
            f"{labels.shape}."
        )
    mean = float(values.mean())
    _, index = np.unique(labels, return_inverse=True)
    totals = np.bincount(index, weights=values - mean)
    groups = len(totals)
    if groups == 1:
        return Interval(mean, float("nan"), float("nan"))
    error = np.sqrt(groups / (groups - 1) * np.sum(totals**2)) / len(values)
    half = float(scipy.special.stdtrit(groups - 1, (1 + confidence) / 2) * error)
    return Interval(mean, mean - half, mean + half)


def wilson_interval(wins: float, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a proportion (Wilson 1927).

    Args:
      wins: successes, between 0 and ``n``; ties may count as halves.
      n: independent trials.

    >>> wilson_interval(5, 10).mean
    0.5
    """
    _check_confidence(confidence)
    if n < 1 or not 0 <= wins <= n:
        raise ValueError(f"Expected n >= 1 and 0 <= wins <= n, got {wins} of {n}.")
    z2 = statistics.NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    rate = wins / n
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = (z2 * rate * (1 - rate) / n + z2**2 / (4 * n**2)) ** 0.5 / (1 + z2 / n)
    # Rounding must not push the bound past an observed rate of exactly 0 or 1.
    low, high = min(centre - half, rate), max(centre + half, rate)
    return Interval(rate, max(low, 0.0), min(high, 1.0))
