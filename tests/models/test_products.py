"""Products in bfloat16: what they ask the compiler for, and how exact they are."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import batch as batch_lib
from jaxalign import models
from jaxalign.data.convert import empty_batch
from jaxalign.data.plan import RowShape
from jaxalign.models import products

TINY = models.T5Config(64, 16, 2, 8, 32, 1, 1, dtype="bfloat16")
# Subscripts and shapes of the network's products: dense, scores, what they weigh, and
# the same over a cache.
PRODUCTS = {
    "...e,ef->...f": ((2, 5, 96), (96, 7)),
    "bqhd,bkhd->bhqk": ((2, 5, 3, 64), (2, 9, 3, 64)),
    "bhqk,bkhd->bqhd": ((2, 3, 5, 96), (2, 96, 3, 8)),
    "bnhd,bnhkd->bnhk": ((2, 4, 3, 64), (2, 4, 3, 9, 64)),
    "bnhk,bhkd->bnhd": ((2, 4, 3, 96), (2, 3, 96, 8)),
}


def operands(subscripts, dtype):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=s), dtype) for s in PRODUCTS[subscripts]]


def with_gradients(function, x, y):
    """A product and what its operands get from one cotangent."""
    z, pull = jax.vjp(function, x, y)
    cotangent = np.random.default_rng(1).normal(size=z.shape)
    return z, *pull(jnp.asarray(cotangent, jnp.bfloat16).astype(z.dtype))


def dots(function, *arguments, platform="cpu"):
    """The dtypes of operands and result of each product, as the compiler is asked."""
    traced = jax.jit(function).trace(*arguments)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    types = (x.rsplit(" : ", 1)[1] for x in text.splitlines() if "dot_general" in x)
    return [tuple(re.findall(r"(bf16|f32)>", x)) for x in types]


@pytest.mark.parametrize("subscripts", PRODUCTS)
@pytest.mark.parametrize("name", ["einsum", "float32_einsum"])
def test_bfloat16_is_the_float64_product_rounded_once(name, subscripts):
    x, y = operands(subscripts, jnp.bfloat16)
    product = getattr(products, name)
    got = with_gradients(lambda x, y: product(subscripts, x, y), x, y)
    of_result = jnp.bfloat16 if name == "einsum" else jnp.float32
    assert [a.dtype for a in got] == [of_result, jnp.bfloat16, jnp.bfloat16]
    with jax.enable_x64():
        exact = [jnp.asarray(np.asarray(a, np.float64)) for a in (x, y)]
        want = with_gradients(lambda x, y: jnp.einsum(subscripts, x, y), *exact)
        want = [np.asarray(a) for a in want]
    for ours, theirs in zip(got, want, strict=True):
        # Half a unit in the last place, and float32's error of sums that cancel.
        error = np.abs(np.asarray(ours, np.float64) - theirs)
        unit = 2.0**-8 if ours.dtype == jnp.bfloat16 else 0.0
        assert np.all(error <= unit * np.abs(theirs) + 1e-5)


@pytest.mark.parametrize("subscripts", PRODUCTS)
def test_float32_keeps_its_bits(subscripts):
    x, y = operands(subscripts, jnp.float32)
    want = with_gradients(lambda x, y: jnp.einsum(subscripts, x, y), x, y)
    for product in (products.einsum, products.float32_einsum):
        got = with_gradients(lambda x, y, p=product: p(subscripts, x, y), x, y)
        for ours, theirs in zip(got, want, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_cpu_sums_in_float32_and_an_accelerator_rounds_by_itself():
    x, y = operands("...e,ef->...f", jnp.bfloat16)

    def loss(x, y):
        return jnp.sum(products.matmul(x, y).astype(jnp.float32))

    step = jax.grad(loss, argnums=(0, 1))
    assert set(dots(step, x, y)) == {("bf16", "bf16", "f32")}
    for platform in ("tpu", "cuda"):
        assert set(dots(step, x, y, platform=platform)) == {("bf16", "bf16", "bf16")}


def a_batch():
    shape = RowShape(8, 2, 4, prompts=1, responses=2, pairs=1)
    batch = {k: jnp.asarray(v) for k, v in empty_batch(shape, 2, ()).items()}
    for name in ("encoder_input_tokens", "encoder_segment_ids"):
        batch[name] = batch[name] + 1
    return batch | {"decoder_segment_ids": batch["decoder_segment_ids"] + 1}


@pytest.mark.parametrize("attention", ["whole", "chunked"])
@pytest.mark.parametrize("scan", [False, True])
def test_every_product_of_a_bfloat16_step_uses_the_unit(attention, scan):
    config = dataclasses.replace(TINY, attention=attention, scan_layers=scan)
    model = models.T5(config)
    params = models.init_params(model, jax.random.key(0))
    batch = a_batch()
    assert set(batch) <= set(batch_lib.COLUMNS)

    def loss(params):
        return jnp.sum(models.token_logps(model, params, batch))

    found = dots(jax.grad(loss), params)
    assert len(found) > 20
    assert set(found) == {("bf16", "bf16", "f32")}


def test_every_product_of_a_bfloat16_decode_step_uses_the_unit():
    model = models.T5(TINY)
    params = models.init_params(model, jax.random.key(0))

    def decode(params, tokens):
        def call(method, *arguments):
            return model.apply({"params": params}, *arguments, method=method)

        cross = call("cross_key_values", call("encode", tokens, tokens))
        cache = model.init_self_cache(2, 3, 4)
        first = jnp.zeros((2, 3), jnp.int32)
        return call("decode_step", first, 0, cache, cross, tokens)

    found = dots(decode, params, jnp.ones((2, 8), jnp.int32))
    assert set(found) == {("bf16", "bf16", "f32")}


def test_what_is_kept_of_a_product_is_rounded():
    """`remat_policy = 'minimal'`: two bytes a number, not the four of the sum."""
    keep = jax.checkpoint_policies.save_only_these_names(products.WITH_KERNEL)
    x, y = operands("...e,ef->...f", jnp.bfloat16)

    @jax.jit
    def step(x, y):
        def loss(x, y):
            return jnp.sum(jnp.sin(products.matmul(x, y)).astype(jnp.float32))

        return jax.vjp(jax.checkpoint(loss, policy=keep), x, y)[1]

    kept = {(a.shape, str(a.dtype)) for a in jax.tree.leaves(step(x, y))}
    assert ((2, 5, 7), "bfloat16") in kept
    assert not [shape for shape, dtype in kept if dtype == "float32" and shape]
