"""A reference that follows the policy, and statistics that run on over steps."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from objectives_cases import BagOfTokens, get_case, make_batch

from jaxalign.training import step as steps


def test_the_reference_moves_every_period_and_is_what_the_batch_is_scored_with():
    case = get_case("DPO", BagOfTokens)
    tx = optax.sgd(0.1)
    moving = steps.MovingReference(mixing=0.25, period=2)
    start = {**case.params, "reference": case.params["policy"]}
    state = steps.TrainState.create(start, tx, case.objective)
    follow = jax.jit(steps.make_train_step(case.objective, tx, moving_reference=moving))
    given = jax.jit(steps.make_train_step(case.objective, tx))
    twin = state
    reference = case.params["policy"]
    batch = make_batch(case.rows, 2)
    for number in range(1, 5):
        state, _ = follow(state, batch, case.key)
        twin = twin.replace(frozen={"reference": reference})
        twin, _ = given(twin, batch, case.key)
        jax.tree.map(np.testing.assert_array_equal, state.params, twin.params)
        if number % 2 == 0:
            reference = jax.tree.map(
                lambda old, new: 0.75 * old + 0.25 * new,
                reference,
                twin.params["policy"],
            )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
            state.frozen["reference"],
            reference,
        )
        reference = state.frozen["reference"]


@pytest.mark.parametrize(("mixing", "period"), [(0.0, 1), (1.5, 1), (0.5, 0)])
def test_a_reference_that_cannot_move_is_refused(mixing, period):
    with pytest.raises(ValueError, match="mixing in"):
        steps.MovingReference(mixing, period)


def test_running_statistics_add_up_over_steps_and_rest_in_evaluation():
    case = get_case("BCO", BagOfTokens)
    batches = [
        case.with_reference(make_batch(rows, 2))
        for rows in (case.rows, case.rows[::-1])
    ]
    step, state = case.step_function(), case.state()
    expected = np.zeros(2)
    for batch in batches:
        found = case.objective.statistics(state.params, batch)["rewards"]
        expected += np.array([float(x) for x in found])
        state, _ = step(state, batch, case.key)
        running = [float(x) for x in state.running["rewards"]]
        np.testing.assert_allclose(running, expected, rtol=1e-5)
    evaluate = steps.make_eval_step(case.objective)
    metrics = evaluate(state, batches[0])
    shift = metrics["rewards/shift"]
    np.testing.assert_allclose(
        shift.total / shift.count, expected[0] / expected[1], rtol=1e-5
    )
