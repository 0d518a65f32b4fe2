"""Intervals against scipy's and against simulated coverage."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from jaxalign.evaluation import mean_with_ci, wilson_interval


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_independent_values_give_student_t(confidence):
    values = np.random.default_rng(0).normal(3.0, 2.0, 17)
    found = mean_with_ci(values, confidence=confidence)
    expected = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(confidence)
    np.testing.assert_allclose(found, [values.mean(), *expected], rtol=1e-12)


def test_equal_clusters_give_the_interval_of_their_means():
    values = np.random.default_rng(1).normal(size=(9, 4)) + np.arange(9)[:, None]
    labels = np.repeat([f"prompt {i}" for i in range(9)], 4)
    order = np.random.default_rng(2).permutation(36)
    found = mean_with_ci(values.ravel()[order], labels[order])
    expected = scipy.stats.ttest_1samp(values.mean(1), 0.0).confidence_interval(0.95)
    np.testing.assert_allclose(found[1:], expected, rtol=1e-12)
    # Ignoring the clusters would claim more than is known.
    naive = mean_with_ci(values.ravel())
    assert naive.high - naive.low < 0.7 * (found.high - found.low)


def test_unequal_clusters_by_hand():
    # mean 3; residual totals of the clusters (1, 2), (6,): -3, 3;
    # se^2 = 2/1 * (9 + 9) / 3^2 = 4; t(1 df, 97.5%) = 12.7062...
    found = mean_with_ci([1.0, 6.0, 2.0], ["a", "b", "a"])
    np.testing.assert_allclose(found, [3.0, 3 - 25.41240947, 3 + 25.41240947])


def test_unequal_clusters_agree_with_a_bootstrap_over_clusters():
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 9, 200)
    clusters = np.repeat(np.arange(200), sizes)
    values = rng.normal(size=200)[clusters] + 0.3 * rng.normal(size=len(clusters))
    totals = np.bincount(clusters, weights=values)
    bootstrap = scipy.stats.bootstrap(
        (totals, sizes),
        lambda t, n, axis: t.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=4000,
        rng=np.random.default_rng(4),
    )
    found = mean_with_ci(values, clusters)
    error = (found.high - found.mean) / scipy.stats.t.ppf(0.975, 199)
    np.testing.assert_allclose(error, bootstrap.standard_error, rtol=0.05)


def test_one_cluster_says_nothing_about_spread():
    mean, low, high = mean_with_ci([1.0, 2.0], [7, 7])
    assert mean == 1.5 and np.isnan(low) and np.isnan(high)


@pytest.mark.parametrize("wins, n", [(0, 10), (10, 10), (3, 10), (61, 100), (1, 1)])
def test_wilson_equals_scipy(wins, n):
    expected = scipy.stats.binomtest(wins, n).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(
        wilson_interval(wins, n), [wins / n, *expected], atol=1e-12
    )


def test_ties_count_half():
    # By hand, z = 1.959964 and p = 1/2: half width = z / (2 sqrt(n + z^2)).
    half = 1.9599639845 / (2 * (5 + 1.9599639845**2) ** 0.5)
    np.testing.assert_allclose(wilson_interval(2.5, 5), [0.5, 0.5 - half, 0.5 + half])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"values": []}, "non-empty vector, got shape"),
        ({"values": [[1.0, 2.0]]}, "non-empty vector, got shape"),
        ({"values": [1.0, float("nan")]}, "values.1. is nan"),
        ({"values": [1.0, 2.0], "clusters": [1]}, "label each of the 2 values"),
        ({"values": [1.0, 2.0], "confidence": 95}, "strictly between 0 and 1, got 95"),
    ],
)
def test_bad_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mean_with_ci(**arguments)


@pytest.mark.parametrize("wins, n", [(-1, 3), (4, 3), (0, 0)])
def test_bad_counts_are_refused(wins, n):
    with pytest.raises(ValueError, match=f"got {wins} of {n}"):
        wilson_interval(wins, n)
