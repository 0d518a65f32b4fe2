"""How strongly an ensemble of reward models agrees with each preference.

Wang et al. 2024, *Secrets of RLHF in Large Language Models Part II* (arXiv 2401.06080):
a pair's strength is the mean over the models of how far they score the chosen response
above the rejected one. Weak or negative strengths are wrong or undecidable labels.
Pure functions of arrays.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.stats

BANDS = ("wrong", "ambiguous", "normal", "strong")
CUTS = (0.2, 0.4, 0.9)  # percentiles where a band ends
MODES = ("flip_margin", "flip", "margin", "soft_margin", "bands")


class Strengths(NamedTuple):
    """Of each pair.

    Attributes:
      mean: of the models' differences, float64 ``[N]``.
      deviation: of them (population).
      percentile: of the mean among all pairs, in (0, 1); equal means share theirs.
      band: index into `BANDS`.
    """

    mean: np.ndarray
    deviation: np.ndarray
    percentile: np.ndarray
    band: np.ndarray


def strengths(differences: np.ndarray, *, zscore: bool = False) -> Strengths:
    """The strengths of pairs.

    Args:
      differences: ``[N, M]``, model ``m``'s score of the chosen response minus that of
        the rejected one.
      zscore: divide those of each model by their own deviation first, where models
        live on different scales; the paper does not.

    Raises:
      ValueError: for numbers that are not finite, or where all pairs tie.

    >>> found = strengths(np.array([[1.0, 3.0], [-1.0, -1.0]]))
    >>> found.mean.tolist(), found.deviation.tolist(), found.percentile.tolist()
    ([2.0, -1.0], [1.0, 0.0], [0.75, 0.25])
    """
    differences = np.asarray(differences, np.float64)
    if differences.ndim != 2 or not differences.size:
        raise ValueError(
            f"differences must be [pairs, models], got shape {differences.shape}."
        )
    if not (good := np.isfinite(differences)).all():
        pair, model = np.argwhere(~good)[0]
        raise ValueError(
            f"Model {model} has no verdict on pair {pair} "
            f"({int((~good).any(1).sum())} of {len(good)} pairs have none of some "
            "model): leave such pairs out, or look at the model."
        )
    if zscore:
        spread = differences.std(axis=0)
        differences = differences / np.where(spread > 0, spread, 1.0)
    mean = differences.mean(axis=1)
    if len(mean) > 1 and not np.ptp(mean):
        raise ValueError(
            f"All {len(mean)} pairs have the strength {mean[0]:g}: the models tell "
            "nothing apart. Train them longer, or look at their data."
        )
    percentile = (scipy.stats.rankdata(mean) - 0.5) / len(mean)
    band = np.searchsorted(CUTS, percentile, side="right")
    return Strengths(mean, differences.std(axis=1), percentile, band)


class Repair(NamedTuple):
    """What is done about each pair.

    Attributes:
      flip: whether chosen and rejected change places.
      margin: that the scores are to differ by, after a flip.
      smoothing: assumed probability that the label, after a flip, is wrong.
    """

    flip: np.ndarray
    margin: np.ndarray
    smoothing: np.ndarray

    def actions(self) -> list[str]:
        """In words: ``"flip+margin"``, ``"keep"``."""
        return [
            "+".join(
                name
                for name, done in (("flip", f), ("margin", m != 0), ("smooth", s > 0))
                if done
            )
            or "keep"
            for f, m, s in zip(*self, strict=True)
        ]


def repair(
    found: Strengths,
    mode: str = "flip_margin",
    *,
    flip_share: float = 0.1,
    smoothing: float = 0.2,
) -> Repair:
    """What the paper does about pairs of different strength.

    * ``"flip_margin"``: the weakest `flip_share` change places, where their strength is
      negative; every pair's margin is its strength, positive after a flip.
    * ``"flip"``, ``"margin"``: either alone.
    * ``"soft_margin"``: labels of negative strength are smoothed, none is flipped.
    * ``"bands"``: wrong ones change places, normal and strong ones get their margin,
      strong ones are smoothed too, the undecidable stay as they are.

    Raises:
      ValueError: for another mode, or shares out of range.

    >>> found = strengths(np.array([[-2.0], [1.0], [3.0]]))
    >>> repair(found, flip_share=0.4).actions()
    ['flip+margin', 'margin', 'margin']
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}.")
    if not 0.0 <= flip_share <= 1.0 or not 0.0 <= smoothing < 0.5:
        raise ValueError(
            "flip_share must lie in [0, 1] and smoothing in [0, 0.5), got "
            f"{flip_share} and {smoothing}."
        )
    mean, negative = found.mean, found.mean < 0
    flip = np.zeros(len(mean), bool)
    margin, alpha = np.zeros(len(mean)), np.zeros(len(mean))
    if mode in ("flip", "flip_margin"):
        flip = negative & (found.percentile < flip_share)
    if mode == "bands":
        flip = negative & (found.band == 0)
        graded = found.band >= 2
        margin = np.where(graded, mean, 0.0)
        alpha = np.where(found.band == 3, smoothing, 0.0)
        margin = np.where(flip, -mean, margin)
    elif mode != "flip":
        margin = np.where(flip, -mean, mean)
    if mode == "soft_margin":
        alpha = np.where(negative, smoothing, 0.0)
    return Repair(flip, margin, alpha)


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive scores above a negative; a tie is half.

    NaN where there is but one kind.

    >>> auroc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 0, 1, 1]))
    0.875
    """
    positive = np.asarray(positive, bool)
    count, others = int(positive.sum()), int((~positive).sum())
    if not count or not others:
        return float("nan")
    ranks = scipy.stats.rankdata(np.asarray(scores, np.float64))
    above = ranks[positive].sum() - count * (count + 1) / 2
    return float(above / (count * others))


def deciles(values: np.ndarray, percentile: np.ndarray, parts: int = 10) -> np.ndarray:
    """The mean of `values` in each tenth of the percentiles; NaN where one is empty."""
    of = np.minimum((percentile * parts).astype(int), parts - 1)
    counts = np.bincount(of, minlength=parts)
    sums = np.bincount(of, weights=np.asarray(values, np.float64), minlength=parts)
    with np.errstate(invalid="ignore"):
        return sums / np.where(counts, counts, np.nan)
