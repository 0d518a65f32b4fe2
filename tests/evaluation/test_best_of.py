"""Best-of-n against all subsets, and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from jaxalign.evaluation import best_of

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("n", range(1, 8))
def test_the_expectation_is_that_of_all_subsets(n):
    scores = np.round(RNG.normal(size=7), 3)
    values = RNG.normal(size=7)
    every = [
        values[max(subset, key=lambda i: scores[i])]
        for subset in itertools.combinations(range(7), n)
    ]
    assert best_of.expected(scores, values, n) == pytest.approx(np.mean(every), 1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_ties_are_broken_by_chance(n):
    scores = np.array([1.0, 0.0, 1.0, 1.0, 0.0])
    values = np.array([3.0, 5.0, -1.0, 2.0, 7.0])
    every = []
    for subset in itertools.combinations(range(5), n):
        top = max(scores[i] for i in subset)
        every.append(np.mean([values[i] for i in subset if scores[i] == top]))
    assert best_of.expected(scores, values, n) == pytest.approx(np.mean(every), 1e-12)


def test_large_pools_stay_finite_and_sum_to_one():
    found = best_of.weights(RNG.normal(size=2048), 512)
    assert found.sum() == pytest.approx(1.0, abs=1e-9) and (found >= 0).all()


def test_the_gain_of_uniform_scores_is_known():
    scores = RNG.random((4000, 64))
    mean = np.mean([best_of.expected(s, s, 16) for s in scores])
    assert mean == pytest.approx(16 / 17, abs=2e-3)


def test_the_divergence_is_that_of_the_order_statistic():
    # The density of the best of n is n u^(n - 1): KL = integral of n u^(n-1) log(...).
    u = (np.arange(2_000_000) + 0.5) / 2_000_000
    for n in (2, 4, 16):
        density = n * u ** (n - 1)
        assert best_of.kl(n) == pytest.approx(np.mean(density * np.log(density)), 1e-4)
    assert best_of.kl(64) == pytest.approx(3.174508, abs=1e-6)


def test_over_optimisation_has_a_peak():
    """A score that is right up to a point and exploited beyond it."""
    scores = RNG.normal(size=(300, 64))
    gold = scores - 2.0 * np.maximum(scores - 1.0, 0.0) ** 2
    own, true = best_of.curve(scores, scores), best_of.curve(scores, gold)
    assert own.peak == 64 and 1 < true.peak < 64
    assert own.n == true.n == [1, 2, 4, 8, 16, 32, 64]
    assert all(
        a < m < b for a, m, b in zip(true.low, true.mean, true.high, strict=True)
    )
    assert true.kl[2] == pytest.approx(math.log(4) - 0.75)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="best-of-3 of a pool of 2"):
        best_of.weights([1.0, 2.0], 3)
    with pytest.raises(ValueError, match="finite score"):
        best_of.weights([1.0, np.nan], 1)
    with pytest.raises(ValueError, match="at least one prompt"):
        best_of.curve([], [])
