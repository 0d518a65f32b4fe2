"""Mesh sizes and shardings."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from jax.sharding import PartitionSpec as P

from jaxalign import models, objectives
from jaxalign.cluster import mesh as meshes
from jaxalign.data import convert
from jaxalign.data.plan import RowShape
from jaxalign.objectives.metrics import summarize
from jaxalign.training import optimizers
from jaxalign.training import step as steps


def test_one_axis_is_inferred():
    mesh = meshes.make_mesh(data=-1, fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": -1, "fsdp": -1}, "at most one of them -1"),
        ({"data": 0}, "must be positive"),
        ({"data": 3}, "needs 3 devices, but there are 8"),
        ({"tensor": 3}, "needs 6 devices, but there are 8"),
    ],
)
def test_impossible_meshes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        meshes.make_mesh(**sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fdsp": 1}, "MESH has no axis 'fdsp'. Did you mean 'fsdp'?"),
        ({"tensors": 2}, "Did you mean 'tensor'?"),
        ({"x": 1}, "MESH has no axis 'x'. Its axes: ('data', 'fsdp', 'tensor')"),
        ({"data": 2.0}, "MESH's 'data' must be a whole number, got 2.0"),
        ({"data": True}, "must be a whole number, got True"),
    ],
)
def test_an_axis_that_there_is_not_is_told_with_the_nearest(sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        meshes.named_mesh(sizes)
    assert dict(meshes.named_mesh({"fsdp": 4}).shape)["data"] == 2
    assert dict(meshes.named_mesh(None).shape)["data"] == 8


def test_parameters_follow_their_logical_axes():
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    axes = {"a": ("embed", "mlp"), "b": ("embed",), "c": ("embed", "embed")}
    shapes = {"a": jnp.zeros((4, 8)), "b": jnp.zeros(4), "c": jnp.zeros((4, 4))}
    specs = jax.tree.map(lambda s: s.spec, meshes.param_shardings(mesh, axes, shapes))
    assert specs == {"a": P("fsdp", "tensor"), "b": P("fsdp"), "c": P("fsdp", None)}


def test_an_axis_that_does_not_divide_names_the_parameter():
    mesh = meshes.make_mesh(data=2, tensor=4)
    with pytest.raises(ValueError, match=r"\['wi'\].*cannot be split 4 ways.*'mlp'"):
        meshes.param_shardings(
            mesh, {"wi": ("embed", "mlp")}, {"wi": jnp.zeros((4, 6))}
        )


def test_copies_of_the_parameters_are_sharded_like_them():
    mesh = meshes.make_mesh(data=4, fsdp=2)
    params = {"policy": {"w": jnp.zeros((4, 8))}}
    placed = meshes.param_shardings(mesh, {"policy": {"w": ("embed", "mlp")}}, params)
    state = {"mu": params, "rows": {"policy": {"w": jnp.zeros(4)}}, "n": jnp.zeros(())}
    found = meshes.shardings_like(params, placed, state, mesh)
    assert found["mu"]["policy"]["w"] == placed["policy"]["w"]
    assert found["rows"]["policy"]["w"].spec == P()
    assert found["n"].spec == P()


def test_factored_moments_are_sharded_along_what_they_keep():
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    params = {"policy": {"wi": jnp.zeros((256, 128))}}
    axes = {"policy": {"wi": ("embed", "mlp")}}
    placed = meshes.param_shardings(mesh, axes, params)
    state = optimizers.adafactor(1e-3).init(params)
    found = meshes.shardings_like(params, placed, state, mesh)[0]
    assert (state[0].v_row["policy"]["wi"].shape, found.v_row["policy"]["wi"].spec) == (
        (1, 128),
        P(None, "tensor"),
    )
    assert (state[0].v_col["policy"]["wi"].shape, found.v_col["policy"]["wi"].spec) == (
        (256, 1),
        P("fsdp", None),
    )


def test_activation_rules_reach_the_networks_layers_and_change_no_number():
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    objective = objectives.OBJECTIVES["SFT"](models.T5(tiny_run.CONFIG))
    params = objective.init_params(jax.random.key(0))
    state = steps.TrainState.create(params, optax.sgd(1.0), objective)
    row = RowShape(8, 1, 8, 1, 1, 1)
    batch = convert.empty_batch(row, 4)
    batch["encoder_input_tokens"][:] = batch["decoder_target_tokens"][:] = 7
    batch["encoder_segment_ids"][:] = batch["decoder_segment_ids"][:] = 1
    batch["decoder_loss_weights"][:] = 1.0
    batch["response_mask"][:] = batch["prompt_mask"][:] = 1.0
    step = steps.make_eval_step(objective)
    plain = jax.jit(step)
    ruled = jax.jit(meshes.with_activation_rules(mesh, step))
    assert "sharding_constraint" not in plain.lower(state, batch).as_text()
    text = ruled.lower(state, meshes.put_batch(mesh, batch)).as_text()
    assert text.count("sharding_constraint") >= 10
    expected = summarize([plain(state, batch)])
    found = summarize([ruled(state, meshes.put_batch(mesh, batch))])
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        ({"tensor": 8}, {}, r"num_heads=2 cannot be split 8 ways .*'tensor' among"),
        ({"tensor": 2}, {"vocab_size": 383}, r"vocab_size=383 .* pad the vocabulary"),
        ({"fsdp": 8}, {"emb_dim": 12}, r"emb_dim=12 .* 8 ways .*'fsdp' among"),
    ],
)
def test_networks_that_do_not_divide_are_refused(sizes, changes, message):
    config = dataclasses.replace(tiny_run.CONFIG, **changes)
    with pytest.raises(ValueError, match=message):
        meshes.check_network(meshes.make_mesh(**sizes), config)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What mesh building reads of a device of a slice."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "none"
    device_kind: str = "fake"


def test_data_goes_over_slices_and_the_rest_stays_inside():
    devices = [FakeDevice(i, slice_index=i // 4) for i in range(8)]
    mesh = meshes.make_mesh(fsdp=2, tensor=2, devices=devices[::-1])
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert slices.shape == (2, 2, 2)
    assert (slices[0] == slices[0, 0, 0]).all() and (slices[1] != slices[0]).all()
    with pytest.raises(ValueError, match="make data a multiple of 2"):
        meshes.make_mesh(data=1, fsdp=8, devices=devices)
