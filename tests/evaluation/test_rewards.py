"""Metrics of reward models against other people's formulas, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import scipy.stats

from jaxalign.evaluation import probes, rewards

RNG = np.random.default_rng(0)
GAPS = np.round(RNG.normal(0.4, 1.5, 400), 1)  # with ties
PROMPTS = [f"p{i // 2}" for i in range(400)]


def test_accuracy_and_log_loss_are_those_of_scipy():
    found = rewards.pair_metrics(GAPS, PROMPTS)
    correct = (GAPS > 0).sum() + 0.5 * (GAPS == 0).sum()
    assert found.accuracy.mean == pytest.approx(correct / 400, rel=1e-12)
    assert found.ties == (GAPS == 0).sum() > 0 and found.prompts == 200
    loss = -scipy.special.log_expit(GAPS)
    assert found.log_loss.mean == pytest.approx(loss.mean(), rel=1e-12)
    # Two pairs a prompt: the interval is that of the prompts' means.
    means = loss.reshape(200, 2).mean(1)
    low, high = scipy.stats.t.interval(0.95, 199, means.mean(), scipy.stats.sem(means))
    assert (found.log_loss.low, found.log_loss.high) == pytest.approx((low, high))


def test_wilsons_interval_is_scipys():
    gaps = np.where(np.arange(50) < 37, 1.0, -1.0)
    found = rewards.pair_metrics(gaps, [f"p{i}" for i in range(50)]).accuracy
    other = scipy.stats.binomtest(37, 50).proportion_ci(0.95, "wilson")
    assert (found.low, found.high) == pytest.approx((other.low, other.high), rel=1e-9)


def test_a_pair_without_a_verdict_is_left_out_and_counted():
    gaps = np.append(GAPS, np.nan)
    found = rewards.pair_metrics(gaps, [*PROMPTS, "q"])
    assert found.no_verdict == 1
    assert found._replace(no_verdict=0) == rewards.pair_metrics(GAPS, PROMPTS)


@pytest.mark.parametrize(
    ("gaps", "said"),
    [([np.nan], "no verdict on any of 1 pairs"), ([np.inf], "pair 0 is inf")],
)
def test_what_is_no_number_is_named(gaps, said):
    with pytest.raises(ValueError, match=said):
        rewards.pair_metrics(np.array(gaps), ["p"])


def test_calibration_error_is_the_definitions():
    found = rewards.reliability(GAPS, bins=10)
    sure = scipy.special.expit(np.abs(GAPS))
    correct = np.where(GAPS == 0, 0.5, GAPS > 0)
    edges = np.linspace(0.5, 1.0, 11)
    total = 0.0
    for low, high in zip(edges, edges[1:], strict=False):
        inside = (sure >= low - 1e-12) & (sure < high - 1e-12)
        if high == 1.0:
            inside |= sure >= 1.0 - 1e-12
        if inside.any():
            gap = sure[inside].mean() - correct[inside].mean()
            total += inside.sum() / 400 * abs(gap)
    assert found.ece == pytest.approx(total, rel=1e-9)
    assert found.count.sum() == 400


def test_a_model_whose_labels_follow_it_is_calibrated_and_a_sharper_one_is_not():
    logit = RNG.normal(0.0, 2.0, 40_000)
    gaps = np.where(RNG.random(40_000) < scipy.special.expit(logit), logit, -logit)
    assert rewards.reliability(gaps).ece < 0.01
    assert rewards.reliability(3.0 * gaps).ece > 0.05
    assert rewards.best_scale(gaps) == pytest.approx(1.0, abs=0.03)
    assert rewards.best_scale(3.0 * gaps) == pytest.approx(1 / 3, abs=0.01)
    assert np.isnan(rewards.best_scale(np.abs(gaps)))


def test_agreement_is_the_definitions():
    one = RNG.normal(size=300)
    other = one + RNG.normal(size=300)
    other[0] = np.nan
    found = rewards.agreement(one, other)
    a, b = one[1:] > 0, other[1:] > 0
    table = np.array(
        [[np.sum(a & b), np.sum(a & ~b)], [np.sum(~a & b), np.sum(~a & ~b)]]
    )
    po = np.trace(table) / 299
    pe = (table.sum(0) * table.sum(1)).sum() / 299**2
    assert found["pairs"] == 299 and found["same"] == pytest.approx(po)
    assert found["kappa"] == pytest.approx((po - pe) / (1 - pe))
    assert found["spearman"] == pytest.approx(
        np.corrcoef(*map(scipy.stats.rankdata, (one[1:], other[1:])))[0, 1]
    )


def test_a_model_that_likes_length_is_found_out():
    longer = RNG.integers(-20, 20, 500)
    names = [f"p{i}" for i in range(500)]
    found = rewards.length_probe(0.1 * longer, longer, names)
    assert found["prefers_longer"]["mean"] == 1.0
    assert found["spearman"] == pytest.approx(1.0)
    assert found["longer"]["accuracy"]["mean"] == 1.0
    assert found["shorter"]["accuracy"]["mean"] == 0.0
    assert found["baseline"]["mean"] == pytest.approx(
        (longer > 0).mean() + 0.5 * (longer == 0).mean()
    )
    fair = rewards.length_probe(RNG.normal(size=500), longer, names)
    low, high = fair["prefers_longer"]["ci95"]
    assert low < 0.5 < high


def test_preferences_are_the_logistic_function_of_differences():
    gaps = np.linspace(-8, 8, 33)
    found = rewards.logits(scipy.special.expit(gaps).astype(np.float32))
    np.testing.assert_allclose(found, gaps, atol=1e-3)
    assert np.isfinite(rewards.logits(np.array([0.0, 1.0]))).all()


def test_a_format_that_turns_verdicts_is_counted():
    chosen, rejected = np.array([2.0, 2.0, 0.0]), np.array([0.0, 1.0, 1.0])
    found = probes.effect(chosen, rejected, rejected + 1.5)
    assert found["pairs"] == 2 and found["flipped"] == 0.5
    assert found["shift"] == pytest.approx(1.5 / np.std([2, 2, 0, 0, 1, 1]))
    nothing = probes.effect(chosen, rejected, rejected)
    assert nothing["shift"] == 0.0 and nothing["flipped"] == 0.0
    for change in probes.FORMATS.values():
        assert change("It is a mole. Yes!") != "It is a mole. Yes!"
