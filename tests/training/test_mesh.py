"""Mesh sizes and shardings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxalign.training import mesh as meshes


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
