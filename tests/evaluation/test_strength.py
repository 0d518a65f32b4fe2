"""Strengths of preferences: the paper's published row, bands, repairs, AUROC."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from jaxalign.evaluation import strength

# Of the authors' graded HH-RLHF.
CHOSEN = [3.71875, 0.58984375, 3.390625, 0.006805419921875, -0.6953125, 1.0390625]
CHOSEN += [1.4140625, 0.8359375, 3.078125, 2]
REJECTED = [3.546875, 0.9921875, 2.125, -0.330078125, 1.171875, 1.2578125]
REJECTED += [1.078125, 1.0546875, 3.546875, 2.265625]


def test_the_published_row():
    found = strength.strengths(np.array([CHOSEN]) - np.array([REJECTED]))
    assert found.mean[0] == pytest.approx(-0.1331085, abs=1e-6)
    assert found.deviation[0] == pytest.approx(0.7559609, abs=1e-6)


def test_bands_are_shares_of_the_pairs():
    differences = np.random.default_rng(0).normal(size=(1000, 3))
    found = strength.strengths(differences)
    assert np.bincount(found.band).tolist() == [200, 200, 500, 100]
    order = np.argsort(found.mean)
    assert (np.diff(found.band[order]) >= 0).all()
    assert (np.diff(found.percentile[order]) > 0).all()


def test_models_of_other_scales_count_the_same_by_zscore():
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(2, 200))
    plain = strength.strengths(np.stack([one, 100 * other], 1))
    scaled = strength.strengths(np.stack([one, 100 * other], 1), zscore=True)
    expected = (one / one.std() + other / other.std()) / 2
    np.testing.assert_allclose(scaled.mean, expected, rtol=1e-12)
    assert scipy.stats.spearmanr(plain.mean, other).statistic > 0.99


@pytest.mark.parametrize("mode", strength.MODES)
def test_repairs_do_what_the_mode_says(mode):
    differences = np.random.default_rng(2).normal(0.5, 1.0, size=(500, 4))
    found = strength.strengths(differences)
    done = strength.repair(found, mode, flip_share=0.15, smoothing=0.25)
    mean, negative = found.mean, found.mean < 0
    weakest = found.percentile < (0.2 if mode == "bands" else 0.15)
    flips = negative & weakest if mode.startswith("flip") or mode == "bands" else []
    assert done.flip.tolist() == (list(flips) or [False] * 500)
    # A margin that goes with a flip is positive.
    assert (done.margin[done.flip] >= 0).all()
    if mode in ("flip_margin", "margin", "soft_margin"):
        np.testing.assert_array_equal(np.abs(done.margin), np.abs(mean))
    soft = {"soft_margin": negative, "bands": found.band == 3}.get(mode)
    expected = np.where(soft, 0.25, 0.0) if soft is not None else np.zeros(500)
    np.testing.assert_array_equal(done.smoothing, expected)
    words = done.actions()
    assert [("flip" in w) for w in words] == done.flip.tolist()
    assert {w for w in words} <= {
        "keep", "flip", "margin", "flip+margin", "margin+smooth"
    }  # fmt: skip


def test_auroc_counts_pairs():
    rng = np.random.default_rng(3)
    scores, positive = rng.integers(0, 5, 60).astype(float), rng.random(60) < 0.3
    wins = [
        (a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]
    ]
    assert strength.auroc(scores, positive) == pytest.approx(np.mean(wins))
    assert np.isnan(strength.auroc(scores, np.ones(60)))


def test_flips_planted_in_linear_rewards_are_found():
    """Twenty per cent of labels, logistic models of five folds, sixteen features."""
    rng = np.random.default_rng(4)
    weights, features = rng.normal(size=16), rng.normal(size=(1500, 16))
    truth = features @ weights > 0
    pairs = np.where(truth[:, None], features, -features)
    planted = rng.random(1500) < 0.2
    pairs[planted] *= -1
    fold = rng.integers(0, 5, 1500)
    differences = np.zeros((1500, 3))
    for k in range(5):
        for m in range(3):
            inside = np.flatnonzero(fold != k)
            drawn = rng.choice(inside, len(inside))
            w = np.zeros(16)
            for _ in range(200):
                p = 1 / (1 + np.exp(pairs[drawn] @ w))
                w += 0.5 * (pairs[drawn] * p[:, None]).mean(0)
            differences[fold == k, m] = pairs[fold == k] @ w
    found = strength.strengths(differences)
    assert strength.auroc(-found.mean, planted) > 0.95
    by_decile = strength.deciles(~planted, found.percentile)
    assert by_decile[0] < 0.1 and by_decile[-1] > 0.95


def test_what_says_nothing_is_refused():
    with pytest.raises(ValueError, match="All 4 pairs have the strength 0"):
        strength.strengths(np.zeros((4, 2)))
    hole = np.ones((3, 2))
    hole[1, 1] = np.nan
    with pytest.raises(ValueError, match=r"Model 1 has no verdict on pair 1 \(1 of 3"):
        strength.strengths(hole)
    found = strength.strengths(np.array([[0.0], [1.0]]))
    with pytest.raises(ValueError, match="mode must be one of"):
        strength.repair(found, "flop")
    with pytest.raises(ValueError, match="got 2 and 0.2"):
        strength.repair(found, flip_share=2)
