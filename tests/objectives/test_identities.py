"""What an objective equals, computed apart from it, in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from objectives_cases import CONFIG, BagOfTokens, make_batch, make_rows

from jaxalign import batch as batches
from jaxalign import models, objectives
from jaxalign.objectives.base import Step
from jaxalign.objectives.metrics import summarize
from jaxalign.training import step as steps

KEY = jax.random.key(0)
MODEL = BagOfTokens(CONFIG)
PARAMS = {"policy": models.init_params(MODEL, jax.random.key(1))}
BATCH = make_batch(make_rows(), 2)
LOGPS = np.asarray(models.response_logps(MODEL, PARAMS["policy"], BATCH), np.float64)
LENGTHS = np.asarray(batches.response_lengths(BATCH), np.float64)
REWARDS = np.asarray(BATCH["response_reward"], np.float64)
REFERENCE = {
    "response_ref_logps": (LOGPS - 0.3 * np.sin(np.arange(LOGPS.size))
                           .reshape(LOGPS.shape)).astype(np.float32),
    "response_ref_kl_logps": (LOGPS - 7.0).astype(np.float32),
}  # fmt: skip


def value(name: str, **settings) -> tuple[float, dict[str, float]]:
    """The trainer's loss of the batch, and the metrics."""
    objective = objectives.OBJECTIVES[name](model=MODEL, **settings)
    batch = {**BATCH, **REFERENCE}
    statistics = objective.statistics(PARAMS, batch)
    out = objective.loss(PARAMS, Step(batch, statistics))
    divisors = {**batches.denominators(batch), **objective.denominators(batch)}
    total = sum(out.sums[name] / divisors[name] for name in out.sums)
    return float(total), summarize([out.metrics])


def imitation(weights: np.ndarray) -> float:
    """The weighted negative log-likelihood per weighted token."""
    return -np.sum(weights * LOGPS) / np.sum(weights * LENGTHS)


def chosen() -> np.ndarray:
    """1 for chosen responses ``[B, R]``; every response of these rows is in a pair."""
    mask = np.zeros(LOGPS.shape)
    for b, q in np.argwhere(BATCH["pair_mask"] > 0):
        mask[b, BATCH["pair_chosen"][b, q]] = 1.0
    return mask


def test_preferred_fine_tuning_is_the_likelihood_of_the_chosen_responses():
    found, metrics = value("PreferredFT")
    assert found == pytest.approx(imitation(chosen()), rel=1e-5)
    assert metrics["nll/chosen"] == pytest.approx(found, rel=1e-5)


def test_a_sum_of_pair_objectives_is_the_sum_of_their_losses():
    terms = ((objectives.IPO, 0.7), (objectives.PreferredFT, 0.2))
    found, metrics = value("PairSum", terms=terms)
    ipo, _ = value("IPO")
    likelihood, _ = value("PreferredFT")
    assert found == pytest.approx(0.7 * ipo + 0.2 * likelihood, rel=1e-5)
    assert metrics["loss/0_IPO"] == pytest.approx(ipo, rel=1e-5)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 1.0])
def test_filtered_fine_tuning_imitates_what_is_kept(threshold):
    kept = (REWARDS > threshold).astype(float)
    found, metrics = value("FilteredSFT", threshold=threshold, dropout=False)
    assert found == pytest.approx(imitation(kept), rel=1e-5)
    assert metrics["kept"] == pytest.approx(kept.mean(), rel=1e-6)
    assert metrics["rewards/kept"] == pytest.approx(
        np.sum(kept * REWARDS) / kept.sum(), rel=1e-5
    )


def test_the_best_of_each_prompt():
    kept = np.zeros_like(REWARDS)
    for row in range(len(REWARDS)):
        for prompt in np.unique(BATCH["response_prompt"][row]):
            of_prompt = np.flatnonzero(BATCH["response_prompt"][row] == prompt)
            kept[row, of_prompt[np.argmax(REWARDS[row, of_prompt])]] = 1.0
    found, _ = value("FilteredSFT", threshold=None, best_of_prompt=True)
    assert kept.mean() == 0.5
    assert found == pytest.approx(imitation(kept), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 1e9])
def test_reward_weighted_regression(temperature):
    weights = np.minimum(np.exp(REWARDS / temperature), 5.0)
    found, _ = value("RewardWeightedSFT", temperature=temperature, max_weight=5.0)
    assert found == pytest.approx(imitation(weights), rel=1e-5)


def test_kto_from_rewards_is_kto_with_labels_above_the_mean():
    labels = (REWARDS > REWARDS.mean()).astype(np.int32)
    found, _ = value("RewardKTO", beta=0.3)
    ratios = LOGPS - REFERENCE["response_ref_logps"]
    objective = objectives.KTO(model=MODEL)
    total, count = objective.statistics(PARAMS, {**BATCH, **REFERENCE})["kl"]
    z = max(0.0, float(total / count))
    sign = np.where(labels, 1.0, -1.0)
    expected = 1.0 - 1.0 / (1.0 + np.exp(-0.3 * sign * (ratios - z)))
    assert 0.0 < labels.mean() < 1.0
    assert found == pytest.approx(expected.mean(), rel=1e-5)


def test_dro_p_centres_by_the_mean_of_the_batch():
    u = REWARDS - 0.4 * (LOGPS - REFERENCE["response_ref_logps"])
    found, metrics = value("DROP", tau=0.4)
    assert metrics["loss"] == pytest.approx(np.var(u) / 2, rel=1e-5)
    assert found == pytest.approx(np.var(u) / 2, rel=1e-5)


def test_kto_costs_what_apo_zero_costs_and_one_decoder_pass():
    # Before any compiler looks for what is computed twice. The encoder is what costs.
    model = models.T5(dataclasses.replace(CONFIG, num_encoder_layers=3))

    def flops(function, *arguments):
        return jax.jit(function).lower(*arguments).cost_analysis()["flops"]

    def step(name):
        objective, tx = objectives.OBJECTIVES[name](model=model), optax.sgd(1.0)
        state = jax.eval_shape(
            lambda key: steps.TrainState.create(
                objective.init_params(key), tx, objective
            ),
            jax.random.key(0),
        )
        batch = {**BATCH, **REFERENCE}
        return flops(steps.make_train_step(objective, tx), state, batch, KEY)

    params = jax.eval_shape(lambda key: models.init_params(model, key), KEY)
    encoded = jax.eval_shape(lambda p: models.encode(model, p, BATCH), params)
    one_pass = flops(
        lambda p, e: models.response_logps(model, p, BATCH, encoded=e), params, encoded
    )
    one_encoder = flops(lambda p: models.encode(model, p, BATCH), params)
    apo, kto = step("APOZeroUnpaired"), step("KTO")
    assert one_encoder > 0.3 * one_pass
    assert apo < kto < apo + 1.1 * one_pass


def test_the_mismatched_pass_carries_no_gradient():
    objective = objectives.KTO(model=MODEL)
    batch = {**BATCH, **REFERENCE}

    def point(params):
        outputs = objective.forward(params, batch)
        return jnp.sum(outputs["kl_logps"])

    slopes = jax.grad(point)(PARAMS)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(slopes))
