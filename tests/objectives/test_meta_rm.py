"""MetaRM's step against its two steps, written down one after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from objectives_cases import (
    CONFIG,
    BagOfTokens,
    assert_same_gradients,
    get_case,
    make_batch,
    make_rows,
)

from jaxalign import objectives
from jaxalign.objectives.metrics import summarize
from jaxalign.training import step as steps

MODEL = BagOfTokens(CONFIG)
SAMPLES = 3
# Of the step that is worked out by hand: two samples, and what is preferred to nothing.
FEATURES = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])


@pytest.fixture
def by_hand(monkeypatch):
    """One step of ``r = theta . phi`` from theta with rates of 1: the new theta."""

    def outputs(self, params, step):
        features = FEATURES[step.batch["response_label"]]
        return (features @ params["reward"])[..., None, None]

    monkeypatch.setattr(objectives.MetaRM, "outputs", outputs)
    rows = make_rows(8)
    for i, row in enumerate(rows):
        row.columns["pair_samples"] = [2.0 * (i % 2)]
    batch = make_batch(rows, 1)
    kinds = [[0, 2], [0, 1]] * 4  # a preference, and samples
    batch["response_label"] = np.array(kinds, np.int32)

    def step(theta, microbatches=1, **changes):
        objective = objectives.MetaRM(model=MODEL, meta_rate=1.0)
        tx = optax.sgd(1.0)
        state = steps.TrainState.create({"reward": jnp.array(theta)}, tx)
        function = steps.make_train_step(objective, tx, num_microbatches=microbatches)
        new, metrics = function(state, {**batch, **changes}, jax.random.key(0))
        return new.params["reward"], summarize([metrics])

    return step


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_the_step_that_is_worked_out_by_hand(by_hand, microbatches):
    """J = .3112297 at (.5, 0), the step ahead is to (.6175019, -.1175019)."""
    theta, metrics = by_hand([0.5, 0.0], microbatches)
    assert float(theta[0]) == pytest.approx(0.8503498, abs=2e-7)
    assert float(theta[1]) == 0.0  # not where the step ahead was
    assert metrics["meta/spread"] == pytest.approx(4 * 0.3112297 - 1, abs=1e-6)


def test_without_samples_it_is_bradley_terry(by_hand):
    none = {"pair_samples": np.zeros((8, 1), np.float32)}
    label = {"response_label": np.array([[0, 2]] * 8, np.int32)}
    theta, metrics = by_hand([0.5, 0.0], **none, **label)
    assert float(theta[0]) == pytest.approx(0.8775407, abs=2e-7)
    assert np.isnan(metrics.get("meta/spread", np.nan))


def test_samples_that_tie_move_nothing(by_hand):
    theta, metrics = by_hand([0.0, 0.0])
    np.testing.assert_array_equal(theta, [0.5, 0.0])
    assert metrics["meta/spread"] == 0.0


def rows_of_three():
    """A pair of three responses, and three samples with all of their pairs, in turn."""
    rows = make_rows(8)
    for i, row in enumerate(rows):
        row.responses.append(np.array([3 + i, 5, 1], np.int32))
        row.response_prompt.append(0)
        row.response_kind.append(0)
        row.response_reward.append(0.0)
        row.response_label.append(0)
        row.columns["pair_samples"] = [0.0]
        if i % 2:
            row.pairs[:] = [(0, 1, 0.0), (2, 0, 0.0), (1, 2, 0.0)]
            row.columns["pair_samples"] = [float(SAMPLES)] * 3
    return rows


@pytest.mark.parametrize("settings", [{}, {"members": 2}], ids=["one", "ensemble"])
def test_two_steps_one_after_the_other(settings):
    """Of T5, with three samples a prompt, whole and in microbatches."""
    rate, members = 1.0, settings.get("members", 1)
    case = get_case("MetaRM", BagOfTokens, meta_rate=rate, **settings)
    batch = make_batch(rows_of_three(), 1)
    network = case.objective.networks()["reward"]

    def scores(params):
        found = network.apply({"params": params}, batch, method="outputs")
        return found[..., 0]

    def spread(params):
        found, total = scores(params)[1::2], 0.0
        for i in range(SAMPLES):
            for j in range(i + 1, SAMPLES):
                total += jax.nn.sigmoid(jnp.abs(found[:, i] - found[:, j]))
        return jnp.mean(2 / SAMPLES**2 * total)

    def preferences(params):
        found = scores(params)[::2]
        return -jnp.mean(jax.nn.log_sigmoid(found[:, 0] - found[:, 1]))

    @jax.jit
    def explicit(params):
        value, slope = jax.value_and_grad(spread)(params)
        ahead = jax.tree.map(lambda p, g: p + rate * g, params, slope)
        return value, *(jax.grad(preferences)(p) for p in (ahead, params))

    value, expected, plain = explicit(case.params["reward"])
    found, metrics = case.step(batch)
    assert found["reward"]["reward_head"]["kernel"].shape[1] == members
    assert_same_gradients(found["reward"], expected)
    with pytest.raises(AssertionError):  # which is not where the step began
        assert_same_gradients(found["reward"], plain)
    k = SAMPLES
    assert metrics["meta/spread"] == pytest.approx(
        2 * k * float(value) / (k - 1) - 1, rel=1e-4
    )
    cut, _ = case.step(batch, num_microbatches=4)
    assert_same_gradients(cut["reward"], expected)


def test_only_what_is_preferred_standardises_scores():
    case = get_case("MetaRM", BagOfTokens)
    batch = make_batch(rows_of_three(), 2)
    _, mask = case.objective.scored(case.params, batch)
    np.testing.assert_array_equal(mask, [[1, 1, 0, 0, 0, 0]] * 4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"meta_rate": -1.0}, "meta_rate must be at least 0, got -1.0"),
        ({"read": "pair_mean"}, "told apart by a score of each"),
    ],
)
def test_what_cannot_be_is_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        objectives.MetaRM(model=MODEL, **settings)
