"""The rules of West-of-N, one by one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.special

from jaxalign.pipelines import selection

RNG = np.random.default_rng(0)


def test_duplicates_differ_by_more_than_spaces():
    pool = ["a b", "a  b", " a b\n", "A b", "", "  ", None, "c"]
    assert selection.distinct(pool) == ["a b", "A b", "c"]


def test_prompts_of_held_out_sets_are_left_out_whatever_their_case():
    found = selection.unseen(["P one", "p ONE ", "Two", " ", "Three"], ["two "])
    assert found == ["P one", "Three"]


@pytest.mark.parametrize("scores", [[], [1.0], [2.0, 2.0, 2.0]])
def test_what_cannot_be_told_apart_makes_no_pair(scores):
    assert selection.extremes(scores) is None


def test_ties_go_to_the_first():
    assert selection.extremes([1.0, 3.0, 0.0, 3.0, 0.0]) == (1, 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_is_refused_by_name(bad):
    with pytest.raises(ValueError, match="score of response 2 is .*expected finite"):
        selection.extremes([0.0, 1.0, bad])


@pytest.mark.parametrize(("n", "gap"), [(2, 1 / 3), (64, 63 / 65)])
def test_the_gap_of_uniform_scores_is_known(n, gap):
    pools = RNG.random((20_000, n))
    found = [p[a] - p[b] for p in pools for a, b in [selection.extremes(p)]]
    assert np.mean(found) == pytest.approx(gap, abs=5e-3)


def test_labels_of_a_noisy_scorer_become_right_as_n_grows():
    right = []
    for n in (2, 4, 16, 64):
        truth = RNG.normal(size=(4000, n))
        noisy = truth + RNG.normal(size=(4000, n)) * 1.5
        found = [selection.extremes(s) for s in noisy]
        ahead = [t[a] > t[b] for t, (a, b) in zip(truth, found, strict=True)]
        right.append(np.mean(ahead))
    assert right == sorted(right) and right[0] < 0.75 and right[-1] > 0.97


@pytest.mark.parametrize("n", range(2, 34))
def test_a_tournament_finds_the_extremes_with_few_comparisons(n):
    pools = [RNG.permutation(n).astype(float) for _ in range(5)]
    calls = []

    def prefer(asked):
        calls.append(len(asked))
        gaps = [pools[g][i] - pools[g][j] for g, i, j in asked]
        return scipy.special.expit(np.array(gaps))

    found = selection.tournament([n] * 5, prefer)
    assert found == [(int(p.argmax()), int(p.argmin())) for p in pools]
    assert sum(calls) <= 5 * (n - 1 + max(n - 2, 0) + 1)
    assert len(calls) <= 1 + int(np.ceil(np.log2(n)))


def test_pools_of_all_sizes_share_the_calls():
    sizes = [0, 1, 2, 3, 7]
    found = selection.tournament(
        sizes, lambda asked: np.array([float(i > j) for _, i, j in asked])
    )
    assert found == [None, None, (1, 0), (2, 0), (6, 0)]
    assert selection.tournament([], lambda asked: 1 / 0) == []


def test_ties_of_a_tournament_go_to_the_lower_index():
    found = selection.tournament([4], lambda asked: np.full(len(asked), 0.5))
    assert found == [(0, 1)]


def test_one_that_is_best_and_worst_makes_no_pair():
    beats = {(0, 1): 1.0, (0, 2): 0.0, (1, 2): 1.0}  # 0 > 1 > 2 > 0
    found = selection.tournament(
        [3], lambda asked: np.array([beats[i, j] for _, i, j in asked])
    )
    assert found == [None]


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.1])
def test_a_preference_that_is_no_probability_is_refused_by_name(bad):
    with pytest.raises(ValueError, match="Responses 0 and 1 of pool 0"):
        selection.tournament([2], lambda asked: np.array([bad]))


def test_confidence_is_the_logistic_function():
    for a, b in itertools.product((-3.0, 0.0, 40.0), repeat=2):
        assert selection.confidence(a, b) == pytest.approx(scipy.special.expit(a - b))


def test_quantiles_keep_what_reaches_them():
    values = RNG.random(1000)
    for q in (0.0, 0.25, 0.9):
        kept = selection.at_least(values, q)
        assert kept.sum() == pytest.approx(1000 * (1 - q), abs=1)
        assert values[kept].min() > values[~kept].max() if q else kept.all()
    assert selection.at_least([0.5] * 4, 0.9).all()  # equal ones stay together
    assert selection.at_least([], 0.5).size == 0
    with pytest.raises(ValueError, match="quantile must lie"):
        selection.at_least(values, 1.0)
    with pytest.raises(ValueError, match="Value 1 is NaN"):
        selection.at_least([0.0, np.nan], 0.5)


def test_sources_keep_their_shares():
    before = ["a"] * 100 + ["b"] * 50
    kept = ["a"] * 40 + ["b"] * 40
    found = [kept[i] for i in selection.rebalanced(before, kept)]
    assert (found.count("a"), found.count("b")) == (40, 20)
    assert selection.rebalanced(before, ["a"] * 7) == list(range(7))
    assert selection.rebalanced(before, []) == []


def test_a_mixture_holds_both_kinds_equally_and_leaves_nothing_out():
    human, synthetic = [f"h{i}" for i in range(7)], [f"s{i}" for i in range(17)]
    found = selection.mixture(human, synthetic, seed=3)
    assert len(found) == 34 and set(found) == {*human, *synthetic}
    counts = [found.count(row) for row in human]
    assert sum(counts) == 17 and set(counts) == {2, 3}
    assert found == selection.mixture(human, synthetic, seed=3)
    assert found != selection.mixture(human, synthetic, seed=4)
    with pytest.raises(ValueError, match="0 synthetic"):
        selection.mixture(human, [], seed=0)
