"""Operations of a T5, against a closed form and against XLA's own count."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from jaxalign import models
from jaxalign.cluster import mesh as meshes
from jaxalign.data import convert
from jaxalign.data.plan import RowShape
from jaxalign.models.attention_paths import PATHS, Segments
from jaxalign.models.config import T5Config
from jaxalign.planning import flops

CONFIG = T5Config(
    vocab_size=96,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=3,
    num_decoder_layers=2,
)
B, LE, K, LD = 2, 12, 2, 8
BATCH = convert.empty_batch(RowShape(LE, K, LD, 1, K, 1), B)


def forward(config):
    model = models.T5(config)
    params = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in BATCH.items()}
    return lambda p, b: model.apply({"params": p}, b), params, batch


def closed_form() -> int:
    c = CONFIG
    joined = c.num_heads * c.head_dim
    encoder, decoder = B * LE, B * K * LD
    project = 2 * c.emb_dim * joined  # per token and projection
    mlp = 2 * 3 * c.emb_dim * c.mlp_dim
    mix = 2 * 2 * joined  # scores and weighted values, per pair of positions
    per_encoder = encoder * (4 * project + mlp) + encoder * LE * mix
    per_decoder = decoder * (6 * project + mlp) + encoder * 2 * project
    per_decoder += decoder * LD * mix + decoder * LE * mix
    total = c.num_encoder_layers * per_encoder + c.num_decoder_layers * per_decoder
    return total + decoder * 2 * c.emb_dim * c.vocab_size


def test_forward_is_the_closed_form_in_both_layouts():
    for scan in (False, True):
        apply, *shapes = forward(dataclasses.replace(CONFIG, scan_layers=scan))
        # The position bias is a product with a one-hot table; not in the closed form.
        bias = 2 * 32 * CONFIG.num_heads * (LE * LE + LD * LD)
        found = flops.matmul_flops(apply, *shapes)
        assert found in (closed_form(), closed_form() + bias)


def test_kernels_count_on_every_mesh():
    """The TPU's kernel does the products of attention, on all devices together."""
    length = 256

    def count(path, **mesh):
        x = jax.ShapeDtypeStruct((2, length, 2, 8), np.float32)
        ids = np.ones((2, length), np.int32)

        def attend(q, k, v):
            return PATHS[path](q, k, v, Segments(ids, ids), None)

        if mesh:
            made = meshes.make_mesh(**mesh, devices=jax.devices()[:4])
            attend = meshes.with_activation_rules(made, attend)
        return flops.matmul_flops(attend, x, x, x)

    assert count("whole") == 2 * 2 * 2 * 2 * 8 * length**2
    for path, mesh in (
        ("chunked", {}),
        ("pallas", {}),
        ("pallas", {"data": 1, "fsdp": 2, "tensor": 2}),
    ):
        assert count(path, **mesh) == count("whole")


def test_xla_counts_the_same_products_and_some_more():
    apply, *shapes = forward(CONFIG)
    xla = jax.jit(apply).lower(*shapes).compile().cost_analysis()["flops"]
    ours = flops.matmul_flops(apply, *shapes)
    assert ours <= xla < 1.5 * ours  # element-wise work is large in so small a network


def test_loops_multiply_and_rematerialisation_counts_twice():
    x = jax.ShapeDtypeStruct((4, 4), np.float32)
    product = 2 * 4**3

    def loop(x):
        return jax.lax.fori_loop(0, jax.numpy.int32(7), lambda _, x: x @ x, x)

    def scanned(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, length=5)[0]

    assert flops.matmul_flops(loop, x, loop_trips=7) == 7 * product
    assert flops.matmul_flops(scanned, x) == 5 * product
    layer = lambda x: (jax.numpy.sin(x @ x) @ x).sum()  # noqa: E731
    plain = flops.matmul_flops(jax.value_and_grad(layer), x)
    again = flops.matmul_flops(jax.value_and_grad(jax.checkpoint(layer)), x)
    assert again >= plain + product
