"""One step is one step, however it is cut: for every objective there is."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from objectives_cases import assert_same, make_batch

from jaxalign import objectives
from jaxalign.training import mesh as meshes
from jaxalign.training import step as steps


def test_packed_equals_unpacked(case):
    packed = case.with_reference(make_batch(case.rows, 4))
    loose = case.with_reference(make_batch(case.rows, 2))
    packed_params, packed_metrics = case.step(packed)
    loose_params, loose_metrics = case.step(loose)
    assert_same(packed_params, loose_params)
    assert packed_metrics.keys() == loose_metrics.keys()
    for name, value in packed_metrics.items():
        np.testing.assert_allclose(
            value, loose_metrics[name], rtol=1e-4, atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize("count", [2, 4])
def test_microbatches_equal_the_whole_batch(case, count):
    batch = case.with_reference(make_batch(case.rows, 2))
    params, metrics = case.step(batch)
    cut_params, cut_metrics = case.step(batch, num_microbatches=count)
    assert_same(cut_params, params)
    for name, value in metrics.items():
        np.testing.assert_allclose(
            cut_metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize(
    "sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str
)
def test_eight_devices_equal_one(case, sizes):
    batch = case.with_reference(make_batch(case.rows, 2))
    expected, expected_metrics = case.step(batch)
    mesh = meshes.make_mesh(**sizes)
    placed = jax.device_put(
        case.params,
        meshes.param_shardings(mesh, case.objective.logical_axes(), case.params),
    )
    rows = {k: jax.device_put(v, meshes.batch_sharding(mesh)) for k, v in batch.items()}
    function = jax.jit(steps.make_train_step(case.objective, case.tx))
    state = steps.TrainState.create(placed, case.tx)
    state, metrics = function(state, rows, case.key)
    split = {s.spec for s in jax.tree.leaves(jax.tree.map(_sharding, state.params))}
    assert len(split) > 1 or sizes == {"data": 8}, "nothing was sharded"
    assert_same(state.params, expected)
    found = objectives.metrics.summarize([metrics])
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(
            found[name], value, rtol=1e-4, atol=1e-5, err_msg=name
        )


def _sharding(x):
    return x.sharding


def test_jit_equals_no_jit(case):
    batch = case.with_reference(make_batch(case.rows[:4], 2))
    params, _ = case.step(batch)
    plain, _ = case.step(batch, jit=False)
    assert_same(plain, params)


def test_reference_in_the_step_equals_cached_columns(case):
    if not case.objective.uses_reference:
        assert "response_ref_logps" not in case.objective.columns
        return
    batch = make_batch(case.rows, 2)
    cached, _ = case.step(case.with_reference(batch))
    function = steps.make_train_step(case.objective, case.tx, reference_params=True)
    state = steps.TrainState.create(case.params, case.tx)
    state, _ = jax.jit(function)(state, batch, case.key, case.reference)
    assert_same(state.params, cached, rtol=0, atol=0)


def test_padding_rows_change_nothing(case):
    batch = case.with_reference(make_batch(case.rows, 2))
    empty = {
        k: np.full_like(v, -1 if k in ("response_kl_prompt", "prompt_id") else 0)
        for k, v in batch.items()
    }
    both = {k: np.concatenate([batch[k], empty[k]]) for k in batch}
    params, metrics = case.step(batch)
    padded, padded_metrics = case.step(both)
    assert_same(padded, params)
    np.testing.assert_allclose(padded_metrics["loss"], metrics["loss"], rtol=1e-5)
