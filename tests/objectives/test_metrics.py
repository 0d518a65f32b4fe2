"""Metrics add up over batches, and over microbatches stacked by a scan."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives_cases import BagOfTokens, get_case, make_batch

from jaxalign.objectives.metrics import Mean, Pairs, Values, sample_pairs, summarize
from jaxalign.training import step as steps


def test_means_weigh_by_count_not_by_batch():
    one = {"a": Mean.of(jnp.array([1.0, 2.0, 3.0]), jnp.ones(3))}
    two = {"a": Mean.of(jnp.array([10.0, jnp.nan]), jnp.array([1.0, 0.0]))}
    assert summarize([one, two]) == {"a": 4.0}


def test_stacked_microbatches_count_as_one_batch():
    stacked = {"a": Mean(jnp.array([6.0, 10.0]), jnp.array([3.0, 1.0]))}
    assert summarize([stacked]) == {"a": 4.0}


def test_nothing_counted_is_absent_rather_than_nan():
    empty = {
        "mean": Mean.of(jnp.ones(2), jnp.zeros(2)),
        "values": Values.of(jnp.ones(2), jnp.zeros(2)),
        "pairs": Pairs.of(jnp.ones(2), jnp.ones(2), jnp.zeros(2)),
    }
    assert summarize([empty]) == {}
    assert summarize([]) == {}


def test_percentiles_and_correlation_are_those_of_the_whole_sample():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 40))
    mask = rng.integers(0, 2, 40)
    parts = [slice(0, 15), slice(15, 40)]
    metrics = [
        {
            "v": Values.of(jnp.array(x[p]), jnp.array(mask[p])),
            "r": Pairs.of(jnp.array(x[p]), jnp.array(y[p]), jnp.array(mask[p])),
        }
        for p in parts
    ]
    found = summarize(metrics)
    kept_x, kept_y = x[mask > 0], y[mask > 0]
    np.testing.assert_allclose(found["v/p95"], np.percentile(kept_x, 95), rtol=1e-5)
    np.testing.assert_allclose(found["v/std"], kept_x.std(), rtol=1e-5)
    np.testing.assert_allclose(found["r"], np.corrcoef(kept_x, kept_y)[0, 1], rtol=1e-4)
    np.testing.assert_allclose(sample_pairs(metrics, "r")[0], kept_x, rtol=1e-6)
    assert sample_pairs(metrics, "v") is None


@pytest.mark.parametrize("name", ["DPO", "KTO", "FilteredSFT", "DROV"])
def test_a_batch_of_which_nothing_counts_weighs_nothing_in_an_evaluation(name):
    case = get_case(name, BagOfTokens)
    batch = case.with_reference(make_batch(case.rows, 2))
    nothing = {**batch, "pair_mask": 0 * batch["pair_mask"]}
    nothing["response_mask"] = 0 * batch["response_mask"]
    evaluate = jax.jit(steps.make_eval_step(case.objective))
    found = evaluate(case.state(), batch)
    with_nothing = [found, *[evaluate(case.state(), nothing)] * 3]
    alone = steps.evaluation_loss(summarize([found]))
    assert steps.evaluation_loss(summarize(with_nothing)) == alone
    assert all(jnp.isfinite(x) for x in alone.values())


def test_a_filter_that_keeps_nothing_of_a_batch_counts_no_token_of_it():
    case = get_case("FilteredSFT", BagOfTokens)
    batch = make_batch(case.rows, 2)
    rejected = {**batch, "response_reward": batch["response_reward"] - 100.0}
    evaluate = jax.jit(steps.make_eval_step(case.objective))
    found = [evaluate(case.state(), b) for b in (batch, rejected, rejected)]
    objective = [
        steps.evaluation_loss(summarize(some))["objective"]
        for some in (found[:1], found)
    ]
    assert objective[0] == objective[1]


@pytest.mark.parametrize("name", ["DPO", "KTO", "BCO", "DROV", "DROP"])
def test_no_mean_log_ratio_on_data_is_called_a_kl(name):
    case = get_case(name, BagOfTokens)
    _, found = case.step(case.with_reference(make_batch(case.rows, 2)))
    assert "log_ratios/mean" in found
    assert not [metric for metric in found if metric.startswith("kl")]


def test_the_value_is_compared_with_its_own_target():
    case = get_case("DROV", BagOfTokens)
    batch = case.with_reference(make_batch(case.rows, 2))
    metrics = jax.jit(steps.make_eval_step(case.objective))(case.state(), batch)
    values, targets = sample_pairs([metrics], "value/correlation")
    logps = case.objective.response_logps(case.params, batch)
    soft = batch["response_reward"] - case.objective.tau * (
        logps - batch["response_ref_logps"]
    )
    np.testing.assert_allclose(targets, np.asarray(soft).reshape(-1), rtol=1e-4)
    assert np.abs(targets - batch["response_reward"].reshape(-1)).max() > 0.1
    assert values.shape == targets.shape
