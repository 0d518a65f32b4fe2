"""Objectives converge to their closed-form optimum, on a T5 that can be enumerated.

Four ids and up to two positions make ten responses, so a policy is ten numbers per
prompt that add up to one, and so is its optimum. Losses are taken in the population:
every response, or ordered pair of responses, weighted by its probability.

A response that begins with id 0 ends there: 0 is also the start token, and attention
over two equal tokens sees what it sees over one, so T5 cannot tell the positions apart.
"""

from __future__ import annotations

import functools
import itertools

import jax
import numpy as np
import optax
import pytest

from jaxalign import batch as batches
from jaxalign import data, models, objectives
from jaxalign.data.plan import Placement, RowShape
from jaxalign.training import step as steps

RESPONSES = [[0], [1], *([a, b] for a in (2, 3) for b in range(4))]
PAIRS = list(itertools.permutations(range(len(RESPONSES)), 2))
PROMPTS = ([2, 1], [3, 1], [2, 3, 1])
REWARDS = np.random.default_rng(0).normal(size=(len(PROMPTS), len(RESPONSES)))
CONFIG = models.T5Config(
    vocab_size=4,
    emb_dim=32,
    num_heads=2,
    head_dim=16,
    mlp_dim=64,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
MODEL = models.T5(CONFIG)


@functools.cache
def everything() -> dict[str, np.ndarray]:
    """A batch of all prompts with all responses and all ordered pairs."""
    count = len(RESPONSES)
    shape = RowShape(4, count, 2, prompts=1, responses=count, pairs=len(PAIRS))
    rows = [
        data.to_arrays(
            [
                data.Row(
                    key=str(i),
                    prompts=[np.array(prompt, np.int32)],
                    responses=[np.array(r, np.int32) for r in RESPONSES],
                    response_prompt=[0] * count,
                    response_kind=[batches.ANSWER] * count,
                    response_reward=list(REWARDS[i]),
                    response_label=[batches.NO_LABEL] * count,
                    pairs=[(won, lost, 0.0) for won, lost in PAIRS],
                )
            ],
            Placement(np.array([i]), np.arange(count), inputs=4, targets=2),
            shape,
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    batch = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
    reference = models.init_params(MODEL, jax.random.key(1))
    return {**batch, "response_ref_logps": log_policy(reference)(batch)}


def log_policy(params):
    return jax.jit(lambda batch: models.response_logps(MODEL, params, batch))


def reference() -> np.ndarray:
    """``[prompts, responses]`` probabilities; they add up to one."""
    found = np.exp(np.asarray(everything()["response_ref_logps"], np.float64))
    np.testing.assert_allclose(found.sum(1), 1.0, atol=1e-6)
    return found


def tilted(scores: np.ndarray) -> np.ndarray:
    """``pi_ref exp(scores)``, normalised."""
    weights = reference() * np.exp(scores)
    return weights / weights.sum(1, keepdims=True)


def preference(rewards: np.ndarray) -> np.ndarray:
    """Bradley-Terry: ``P(w beats l)`` for every ordered pair, ``[prompts, pairs]``."""
    won, lost = np.array(PAIRS).T
    return 1.0 / (1.0 + np.exp(rewards[:, lost] - rewards[:, won]))


def converge(objective, batch, count=1500):
    """``(KL(optimum || policy) per prompt, parameters)`` after full-batch training."""
    tx = optax.adam(optax.cosine_decay_schedule(1e-2, count))
    params = objective.init_params(jax.random.key(2))
    state = steps.TrainState.create(params, tx, objective)
    step = steps.make_train_step(objective, tx)

    @jax.jit
    def train(state, batch):
        return jax.lax.scan(
            lambda s, _: (step(s, batch, jax.random.key(0))[0], None),
            state,
            None,
            length=count,
        )[0]

    state = train(state, batch)
    assert int(state.step) == count
    return state.params


def kl(optimum: np.ndarray, params) -> np.ndarray:
    found = np.asarray(log_policy(params["policy"])(everything()), np.float64)
    return np.sum(optimum * (np.log(optimum) - found), axis=1)


def with_pairs(weights: np.ndarray) -> dict[str, np.ndarray]:
    return {**everything(), "pair_mask": weights.astype(np.float32)}


def flipped(p: np.ndarray, rate: float) -> np.ndarray:
    return (1 - rate) * p + rate * (1 - p)


BETA = 0.5
CASES = {
    "DPO": (
        objectives.DPO(MODEL, beta=BETA),
        lambda: preference(REWARDS),
        lambda: tilted(REWARDS / BETA),
    ),
    # A fifth of the labels is flipped, and the optimum is that of clean ones.
    "RobustDPO": (
        objectives.RobustDPO(MODEL, beta=BETA, label_smoothing=0.2),
        lambda: flipped(preference(REWARDS), 0.2),
        lambda: tilted(REWARDS / BETA),
    ),
    # Minimising over margins that are differences of scores projects the paper's
    # h* = (2p - 1) / (2 tau) on them: the score is the mean win probability over tau.
    "IPO": (
        objectives.IPO(MODEL, beta=0.1, length_normalize=False),
        lambda: preference(REWARDS),
        lambda: tilted(win_probability() / 0.1),
    ),
}


def win_probability() -> np.ndarray:
    """Against a response drawn uniformly, itself included (a tie counts half)."""
    p = np.full((len(PROMPTS), len(RESPONSES), len(RESPONSES)), 0.5)
    for q, (won, lost) in enumerate(PAIRS):
        p[:, won, lost] = preference(REWARDS)[:, q]
    return p.mean(axis=2)


@pytest.mark.parametrize(
    "name",
    ["DPO", *(pytest.param(n, marks=pytest.mark.slow) for n in ("RobustDPO", "IPO"))],
)
def test_pair_objective_reaches_its_optimum(name):
    objective, weights, optimum = CASES[name]
    params = converge(objective, with_pairs(weights()))
    distance = kl(optimum(), params)
    print(f"{name}: KL to the optimum {distance.max():.2e}")
    assert distance.max() < 1e-4
    # It is not where everything ends up: the reference is far away.
    start = np.sum(optimum() * np.log(optimum() / reference()), axis=1)
    assert start.min() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", ["skewed", "uniform"])
def test_dro_v_reaches_its_optimum_whoever_wrote_the_responses(behaviour):
    tau = 0.5
    # Not the reference itself: it writes some responses once in ten thousand times, and
    # what is never seen is not learned in a test's time.
    logits = np.random.default_rng(1).normal(size=REWARDS.shape)
    mu = np.exp(logits) if behaviour == "skewed" else np.ones(REWARDS.shape)
    mu /= mu.sum(axis=1, keepdims=True)
    batch = {**everything(), "response_mask": mu.astype(np.float32)}
    objective = objectives.DROV(MODEL, tau=tau)
    params = converge(objective, batch)
    distance = kl(tilted(REWARDS / tau), params)
    print(f"DROV, {behaviour}: KL to the optimum {distance.max():.2e}")
    assert distance.max() < 1e-4
    value = models.ScalarModel(CONFIG, "prompt_mean").apply(
        {"params": params["value"]}, batch
    )[:, 0]
    expected = tau * np.log(np.sum(reference() * np.exp(REWARDS / tau), axis=1))
    np.testing.assert_allclose(value, expected, atol=0.01)


@pytest.mark.slow
def test_dro_v_with_a_constant_value_does_not():
    objective = objectives.DROV(MODEL, tau=0.5, value_kind="batch_constant")
    params = converge(objective, everything())
    assert kl(tilted(REWARDS / 0.5), params).max() > 1e-2
