"""Bytes read from compiled programs, against arithmetic."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.cluster import mesh as meshes
from jaxalign.planning import hlo

LAYERS, ROWS, WIDTH = 5, 16, 32


@pytest.fixture(scope="module")
def mesh():
    return meshes.make_mesh(data=2, fsdp=2, tensor=2)


def arguments(mesh, spec):
    """Stacked kernels ``[layers, width, width]`` and activations ``[rows, width]``."""

    def shape(sizes, s):
        sharding = NamedSharding(mesh, s)
        return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=sharding)

    kernels = shape((LAYERS, WIDTH, WIDTH), P(None, *spec))
    return kernels, shape((ROWS, WIDTH), P(("data", "fsdp")))


def layers(kernels, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, kernels)[0]


def compiled_text(function, mesh, spec):
    kernels, x = arguments(mesh, spec)
    out = NamedSharding(mesh, P(("data", "fsdp")))
    return jax.jit(function, out_shardings=out).lower(kernels, x).compile().as_text()


def test_collectives_in_a_loop_count_once_per_trip(mesh):
    # Split rows of a kernel: every layer sums partial products over two devices.
    def pinned(kernels, x):
        def layer(x, w):
            x = jax.lax.with_sharding_constraint(
                x, NamedSharding(mesh, P(("data", "fsdp"), "tensor"))
            )
            y = jax.lax.with_sharding_constraint(
                x @ w, NamedSharding(mesh, P(("data", "fsdp"), None))
            )
            return jnp.tanh(y), None

        return jax.lax.scan(layer, x, kernels)[0]

    found = hlo.traffic(compiled_text(pinned, mesh, ("tensor", None)))
    rows = ROWS // 4  # over data x fsdp
    # A ring all-reduce of n = 2 sends 2 (n - 1) / n = 1 times the array.
    assert found.collectives["all-reduce"] == LAYERS * rows * WIDTH * 4
    assert found.across_slices == {}


def test_collectives_over_slices_are_told_apart(mesh):
    def mean(kernels, x):
        return jnp.broadcast_to(jnp.sum(x, 0), x.shape) + kernels[0, 0]

    text = compiled_text(mean, mesh, (None, None))
    slice_of = {device: device // 4 for device in range(8)}
    found = hlo.traffic(text, slice_of)
    assert found.collectives == {}
    # All four data x fsdp groups: 2 * 3 / 4 of one row.
    assert found.across_slices == {"all-reduce": 2 * 3 * WIDTH * 4 // 4}


def test_memory_counts_slices_of_scanned_parameters_not_all_of_them():
    one = meshes.make_mesh(devices=jax.devices()[:1])
    kernels, x = arguments(one, (None, None))
    text = jax.jit(layers).lower(kernels, x).compile().as_text()
    found = hlo.traffic(text).memory
    # A layer cuts its kernel out (read, write), reads it, and reads and writes the
    # activations in its product and in its tanh. All layers' kernels would be 5 times
    # as much as one.
    kernel, activations = WIDTH * WIDTH * 4, ROWS * WIDTH * 4
    expected = LAYERS * (3 * kernel + 4 * activations) + 2 * activations
    counters = LAYERS * 64
    assert expected <= found <= expected + counters


def test_memory_of_an_elementwise_function_is_exact():
    x = jax.ShapeDtypeStruct((1024,), jnp.float32)
    text = jax.jit(lambda x: jnp.tanh(x) + 1.0).lower(x).compile().as_text()
    assert hlo.traffic(text).memory == 2 * 4096


def test_trip_counts_without_the_compilers_help():
    text = (
        jax.jit(layers)
        .lower(*arguments(meshes.make_mesh(devices=jax.devices()[:1]), (None, None)))
        .compile()
        .as_text()
    )
    assert "known_trip_count" in text
    bare = text.replace("known_trip_count", "unknown")
    for source in (text, bare):
        entry, computations = hlo.parse(source)
        loops = [i for c in computations.values() for i in c if i.opcode == "while"]
        assert [hlo.trip_count(i, computations) for i in loops] == [LAYERS]
