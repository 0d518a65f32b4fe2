"""How far a reward model's verdicts on preference pairs can be trusted.

All of a pair that counts is the *difference*: the score of the chosen response minus
that of the rejected one, which Bradley-Terry takes for the logit of the preference.
Pure functions of arrays; NaN is no verdict, left out and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.stats

from jaxalign.evaluation.intervals import Interval, mean_with_ci, wilson_interval

COIN = float(np.log(2.0))  # the log-loss of a coin
_SURE = 1e-7  # a preference nearer to 0 or 1 is beyond float32


class PairMetrics(NamedTuple):
    """Of pairs with a verdict.

    Attributes:
      pairs: with a verdict.
      prompts: among them, the independent units of both intervals.
      no_verdict: pairs left out.
      ties: equal scores; half right.
      accuracy: share of pairs whose chosen response is ahead, Wilson's interval.
      log_loss: ``-log sigma(difference)``, Student's interval over prompts.
    """

    pairs: int
    prompts: int
    no_verdict: int
    ties: int
    accuracy: Interval
    log_loss: Interval

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; an interval is ``{"mean", "ci95"}``."""
        told = self._asdict()
        for name in ("accuracy", "log_loss"):
            value = told[name]
            told[name] = {"mean": value.mean, "ci95": [value.low, value.high]}
        return told


def differences(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """Float64 differences of scores, NaN where either has no verdict."""
    return np.asarray(chosen, np.float64) - np.asarray(rejected, np.float64)


def logits(preferences: np.ndarray) -> np.ndarray:
    """The differences that a judge of pairs implies by its preferences.

    >>> logits(np.array([0.5])).tolist()
    [0.0]
    """
    found = np.clip(np.asarray(preferences, np.float64), _SURE, 1.0 - _SURE)
    return np.log(found) - np.log1p(-found)


def right(gaps: np.ndarray) -> np.ndarray:
    """1 where the chosen response is ahead, 0 where it is behind, 0.5 for a tie."""
    return (np.sign(gaps) + 1.0) / 2.0


def pair_metrics(gaps: np.ndarray, prompts: Sequence[str]) -> PairMetrics:
    """Accuracy and log-loss of pairs, with 95% intervals.

    Several pairs of one prompt are not independent: the accuracy's interval is that of
    as many trials as there are prompts.

    Raises:
      ValueError: without a verdict on any pair, or for an infinite difference.

    >>> found = pair_metrics(np.array([1.0, -1.0, 0.0]), ["p", "q", "r"])
    >>> found.accuracy.mean, found.ties, round(found.log_loss.mean, 4)
    (0.5, 1, 0.7732)
    """
    gaps = np.asarray(gaps, np.float64)
    if gaps.shape != (len(prompts),):
        raise ValueError(f"{len(prompts)} prompts have differences {gaps.shape}.")
    if np.isinf(gaps).any():
        at = int(np.flatnonzero(np.isinf(gaps))[0])
        raise ValueError(f"The difference of pair {at} is {gaps[at]}; expected finite.")
    there = ~np.isnan(gaps)
    if not there.any():
        raise ValueError(f"The judge has no verdict on any of {len(gaps)} pairs.")
    known = gaps[there]
    names = np.array(prompts, dtype=object)[there]
    _, of = np.unique(names.astype(str), return_inverse=True)
    units = int(of.max()) + 1
    rate = float(right(known).mean())
    return PairMetrics(
        len(known),
        units,
        int((~there).sum()),
        int((known == 0).sum()),
        wilson_interval(min(rate * units, units), units)._replace(mean=rate),
        mean_with_ci(np.logaddexp(0.0, -known), of),
    )


class Reliability(NamedTuple):
    """How sure a model is, and how often it is right then.

    Attributes:
      ece: expected calibration error: the mean gap between the two, by pairs.
      confidence, accuracy: means of each bin that holds pairs.
      count: pairs of each.
    """

    ece: float
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


def reliability(gaps: np.ndarray, bins: int = 10) -> Reliability:
    """Calibration of ``sigma(|difference|)``, in equally wide bins from 0.5 to 1.

    A pair's label says only that the chosen one is better, so that confidence is that
    of the response that the model prefers; a tie is half right at 0.5.

    >>> found = reliability(np.array([2.0, 2.0, -2.0, 2.0]))
    >>> round(found.ece, 4), found.accuracy.tolist()
    (0.1308, [0.75])
    """
    known = np.asarray(gaps, np.float64)
    known = known[~np.isnan(known)]
    sure = 1.0 / (1.0 + np.exp(-np.abs(known)))
    of = np.minimum(((sure - 0.5) * 2.0 * bins).astype(int), bins - 1)
    count = np.bincount(of, minlength=bins)
    kept = count > 0
    confidence = np.bincount(of, sure, bins)[kept] / count[kept]
    accuracy = np.bincount(of, right(known), bins)[kept] / count[kept]
    count = count[kept]
    ece = float(np.sum(count * np.abs(confidence - accuracy)) / max(count.sum(), 1))
    return Reliability(ece, confidence, accuracy, count)


def best_scale(gaps: np.ndarray) -> float:
    """The factor on the differences with the least log-loss, between 0.001 and 1000.

    Below 1 the model is too sure of itself. NaN where every pair is right or every
    pair wrong, so that no factor is best.
    """
    known = np.asarray(gaps, np.float64)
    known = known[~np.isnan(known)]
    if not ((known > 0).any() and (known < 0).any()):
        return float("nan")
    found = scipy.optimize.minimize_scalar(
        lambda log: np.logaddexp(0.0, -np.exp(log) * known).mean(),
        bounds=(np.log(1e-3), np.log(1e3)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))


def agreement(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """How far two models say the same of the pairs that both have a verdict on.

    Returns:
      ``{"pairs", "same", "kappa", "spearman"}``: the share of equal verdicts, the same
      beyond chance (Cohen's kappa), the rank correlation of differences.
    """
    both = ~(np.isnan(one) | np.isnan(other))
    a, b = np.sign(one[both]), np.sign(other[both])
    if not a.size:
        return {"pairs": 0, "same": np.nan, "kappa": np.nan, "spearman": np.nan}
    same = float((a == b).mean())
    chance = float(sum((a == v).mean() * (b == v).mean() for v in (-1, 0, 1)))
    varied = a.size > 1 and np.ptp(one[both]) > 0 and np.ptp(other[both]) > 0
    rho = scipy.stats.spearmanr(one[both], other[both])[0] if varied else np.nan
    kappa = (same - chance) / (1.0 - chance) if chance < 1.0 else float("nan")
    return {"pairs": int(a.size), "same": same, "kappa": kappa, "spearman": float(rho)}


def length_probe(
    gaps: np.ndarray, longer: np.ndarray, prompts: Sequence[str]
) -> dict[str, Any]:
    """Whether a model judges by length.

    Args:
      gaps: differences of scores.
      longer: differences of lengths, chosen minus rejected.
      prompts: of the pairs.

    Returns:
      ``prefers_longer``: how often the longer response is ahead; ``baseline``: the
      accuracy of choosing the longer one; ``spearman`` of both differences, and
      accuracy where the chosen response is the ``longer`` and the ``shorter`` one.
    """
    there = ~np.isnan(gaps)
    gaps, longer = gaps[there], np.asarray(longer, np.float64)[there]
    names = [name for name, kept in zip(prompts, there, strict=True) if kept]
    unequal = longer != 0
    told: dict[str, Any] = {
        "baseline": pair_metrics(longer, names).to_json()["accuracy"],
        "spearman": None,
        "prefers_longer": None,
    }
    if unequal.any():
        ahead = float(right(gaps[unequal] * longer[unequal]).sum())
        found = wilson_interval(ahead, int(unequal.sum()))
        told["prefers_longer"] = {"mean": found.mean, "ci95": [found.low, found.high]}
    if np.ptp(gaps) > 0 and np.ptp(longer) > 0:
        told["spearman"] = float(scipy.stats.spearmanr(gaps, longer)[0])
    for name, part in (("longer", longer > 0), ("shorter", longer < 0)):
        if part.any():
            own = [n for n, kept in zip(names, part, strict=True) if kept]
            told[name] = pair_metrics(gaps[part], own).to_json()
    return told
