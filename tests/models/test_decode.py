"""One-token steps with a cache give the logits of the teacher-forced pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import models


@pytest.fixture(scope="module")
def teacher(model, params):
    """Two prompts, three continuations each, and their teacher-forced logits."""
    rng = np.random.default_rng(3)
    inputs = rng.integers(2, 40, (2, 6)).astype(np.int32)
    mask = np.array([[1] * 6, [1] * 4 + [0] * 2], np.int32)
    tokens = rng.integers(2, 40, (2, 3, 7)).astype(np.int32)
    tokens[..., 0] = 0
    ones = np.ones_like(tokens)

    def forward(module):
        encoded = module.encode(inputs, mask)
        states = module.decode(encoded, mask, tokens, ones, ones)
        return encoded, module.logits(states)

    run = jax.jit(lambda p: model.apply({"params": p}, method=forward))
    encoded, logits = run(params)
    return encoded, mask, tokens, np.asarray(logits)


def _stepper(model, params, encoded, mask):
    cross = jax.jit(
        lambda p: model.apply({"params": p}, encoded, method="cross_key_values")
    )(params)
    step = jax.jit(
        lambda tokens, position, cache: model.apply(
            {"params": params}, tokens, position, cache, cross, mask,
            method="decode_step",
        )
    )  # fmt: skip
    return step


@pytest.mark.parametrize("scan_layers", [False, True])
def test_steps_equal_teacher_forcing(scan_layers, variant, params, teacher):
    encoded, mask, tokens, want = teacher
    if scan_layers:
        params = models.stack_layers(params)
    model = variant(scan_layers=scan_layers)
    step = _stepper(model, params, encoded, mask)
    cache = model.init_self_cache(2, 3, 9)  # longer than what is written
    assert {x.shape[:2] for x in jax.tree.leaves(cache)} == {(2, 3)}
    for position in range(7):
        logits, cache = step(tokens[..., position], position, cache)
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, want[:, :, position], atol=1e-5)


def test_continuations_at_different_positions(model, params, teacher):
    encoded, mask, tokens, want = teacher
    step = _stepper(model, params, encoded, mask)
    # Rubbish from an earlier use of the cache must not be looked at.
    cache = jax.tree.map(lambda x: x + 3.0, model.init_self_cache(2, 3, 7))
    lag = np.array([[0, 2, 1], [3, 0, 0]])
    for i in range(7):
        position = np.maximum(i - lag, 0).astype(np.int32)
        now = np.take_along_axis(tokens, position[..., None], 2)[..., 0]
        logits, cache = step(now, position, cache)
        expected = np.take_along_axis(want, position[..., None, None], 2)[:, :, 0]
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_bfloat16_cache(variant, params, teacher):
    encoded, mask, tokens, want = teacher
    model = variant(dtype="bfloat16")
    step = _stepper(model, params, encoded.astype(jnp.bfloat16), mask)
    cache = model.init_self_cache(2, 3, 7)
    logits, cache = step(tokens[..., 0], 0, cache)
    assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16")}
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - want[:, :, 0]).mean() < 0.05
