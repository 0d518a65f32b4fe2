"""One step is one step, however it is cut: for every objective there is."""

from __future__ import annotations

import copy
import dataclasses

import jax
import numpy as np
import pytest
from objectives_cases import (
    CONFIG,
    BagOfTokens,
    assert_same_gradients,
    assert_same_metrics,
    get_case,
    make_batch,
)

from jaxalign import objectives
from jaxalign.cluster import mesh as meshes
from jaxalign.models import attention_paths
from jaxalign.training import step as steps


def test_however_it_is_cut_at_once(light_case):
    """Packed on one device; and unpacked, padded, over eight devices, the reference in
    the step, in four microbatches where the loss is a sum over them."""
    case = light_case
    whole = case.step(case.with_reference(make_batch(case.rows, 4)))
    batch = with_empty_rows(make_batch(case.rows, 2))
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    axes = case.objective.logical_axes()
    shardings = meshes.param_shardings(mesh, axes, case.params)
    online = case.objective.uses_reference
    cut = case.step(
        meshes.put_batch(mesh, batch),
        params=jax.device_put(case.params, shardings),
        reference=case.reference if online else None,
        num_microbatches=4 if case.objective.additive else 1,
    )
    assert_same_gradients(cut[0], whole[0])
    assert_same_metrics(cut[1], whole[1])


def with_empty_rows(batch):
    """Each row followed by one that holds nothing."""
    empty = {
        k: np.full_like(v, -1 if k in ("response_kl_prompt", "prompt_id") else 0)
        for k, v in batch.items()
    }
    return {
        k: np.stack([v, empty[k]], 1).reshape(-1, *v.shape[1:])
        for k, v in batch.items()
    }


def test_packed_equals_unpacked(case):
    packed = case.step(case.with_reference(make_batch(case.rows, 4)))
    loose = case.step(case.with_reference(make_batch(case.rows, 2)))
    assert_same_gradients(packed[0], loose[0])
    assert_same_metrics(packed[1], loose[1])


def test_microbatches_equal_the_whole_batch(case):
    if not case.objective.additive:
        assert_cuts_are_refused(case)
        return
    batch = case.with_reference(make_batch(case.rows, 2))
    whole = case.step(batch)
    cut = case.step(batch, num_microbatches=4)
    assert_same_gradients(cut[0], whole[0])
    assert_same_metrics(cut[1], whole[1])


def assert_cuts_are_refused(case):
    """Before anything is compiled."""
    name = type(case.objective).__name__
    with pytest.raises(ValueError, match=f"{name} compares all rows of a batch.*is no"):
        steps.make_train_step(case.objective, case.tx, num_microbatches=4)


@pytest.mark.parametrize(
    "name", [n for n, kind in objectives.OBJECTIVES.items() if not kind.additive]
)
def test_a_loss_over_the_batch_refuses_microbatches(name):
    assert_cuts_are_refused(get_case(name, BagOfTokens))


def assert_eight_devices_equal_one(case, sizes):
    batch = case.with_reference(make_batch(case.rows, 2))
    one = case.step(batch)
    mesh = meshes.make_mesh(**sizes)
    shardings = meshes.param_shardings(mesh, case.objective.logical_axes(), case.params)
    placed = jax.device_put(case.params, shardings)
    if "tensor" in sizes:
        assert any(not s.is_fully_replicated for s in jax.tree.leaves(shardings))
    rows = meshes.put_batch(mesh, batch)
    assert len(rows["encoder_input_tokens"].addressable_shards) == 8
    eight = case.step(rows, params=placed)
    assert_same_gradients(eight[0], one[0])
    assert_same_metrics(eight[1], one[1])


def test_eight_devices_equal_one(case):
    assert_eight_devices_equal_one(case, {"data": 2, "fsdp": 2, "tensor": 2})


def test_eight_devices_along_the_data_equal_one(case):
    assert_eight_devices_equal_one(case, {"data": 8})


@pytest.mark.slow  # T5 without a compiler is slow
def test_jit_equals_no_jit(case):
    assert_jit_equals_no_jit(case)


def test_jit_equals_no_jit_around_the_network():
    assert_jit_equals_no_jit(get_case("DPO", BagOfTokens))


def assert_jit_equals_no_jit(case):
    batch = case.with_reference(make_batch(case.rows, 2))
    compiled = case.step(batch)
    step = steps.make_train_step(case.objective, case.tx)
    state = case.state()
    new, _ = step(state, batch, case.key)
    eager = jax.tree.map(lambda a, b: a - b, state.params, new.params)
    assert_same_gradients(eager, compiled[0])


def test_reference_in_the_step_equals_cached_columns(case):
    if not case.objective.uses_reference:
        assert "response_ref_logps" not in case.objective.columns
        return
    batch = make_batch(case.rows, 2)
    cached = case.step(case.with_reference(batch))
    online = case.step(batch, reference=case.reference)
    jax.tree.map(np.testing.assert_array_equal, online[0], cached[0])


def test_saving_memory_changes_nothing(case, monkeypatch):
    """Vocabulary and attention in chunks, everything between layers computed again."""
    batch = case.with_reference(make_batch(case.rows, 2))
    plain = case.step(batch)
    monkeypatch.setattr(attention_paths, "CHUNK", 4)
    config = dataclasses.replace(
        CONFIG, logits_chunk=4, attention="chunked", remat_policy="full"
    )
    frugal = copy.copy(case)
    model = case.objective.model.clone(config=config)
    frugal.objective = dataclasses.replace(case.objective, model=model)
    saving = frugal.step(batch)
    assert_same_gradients(saving[0], plain[0])
    assert_same_metrics(saving[1], plain[1])


def test_padding_rows_change_nothing(case):
    # As many rows as the other tests have: one compiled step.
    batch = case.with_reference(make_batch(case.rows[:8], 2))
    alone = case.step(batch)
    padded = case.step(with_empty_rows(batch))
    assert_same_gradients(padded[0], alone[0])
    assert_same_metrics(padded[1], alone[1])


def test_a_non_finite_gradient_changes_nothing_from_then_on(case):
    batch = case.with_reference(make_batch(case.rows, 2))
    poisoned = {**case.params}
    main = case.objective.main
    poisoned[main] = jax.tree.map(lambda x: x * np.nan, case.params[main])
    state = case.state(poisoned)
    state, _ = case.step_function()(state, batch, case.key)
    assert not bool(state.finite) and int(state.step) == 0
    healed = state.replace(params=case.params)
    after, _ = case.step_function()(healed, batch, case.key)
    assert int(after.step) == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, case.params)
