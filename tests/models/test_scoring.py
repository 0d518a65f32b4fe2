"""The vocabulary head against float64 and JAX's own gradient, whole and in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from jaxalign import models


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(2, 3, 7, 5)).astype(np.float32)
    kernel = rng.normal(size=(5, 11)).astype(np.float32)
    targets = rng.integers(0, 11, (2, 3, 7)).astype(np.int32)
    return states, kernel, targets


def test_against_float64(arrays):
    states, kernel, targets = arrays
    logps = special.log_softmax(states.astype(np.float64) @ kernel, axis=-1)
    want = np.take_along_axis(logps, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(models.head_outputs(*arrays).logps, want, atol=2e-6)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_nothing(arrays, chunk):
    states, kernel, targets = arrays

    def run(chunk):
        def loss(states, kernel):
            logps = models.head_outputs(states, kernel, targets, chunk=chunk).logps
            return (logps * jnp.cos(jnp.arange(7))).sum(), logps

        grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (_, logps), grads = jax.jit(grad)(states, kernel)
        return logps, *grads

    for got, want in zip(run(chunk), run(0), strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6)


def test_large_logits_stay_finite():
    arrays = jnp.array([[1e4]]), jnp.array([[1.0, -1.0]]), jnp.array([1])
    np.testing.assert_array_equal(models.head_outputs(*arrays).logps, [-2e4])


@pytest.mark.parametrize("chunk", [0, 3])
def test_gradients_are_those_of_the_logits(arrays, chunk):
    states, kernel, targets = arrays
    weights = np.random.default_rng(1).normal(size=(2, *targets.shape))

    def written(states, kernel):
        out = models.head_outputs(states, kernel, targets, chunk=chunk)
        return jnp.sum(weights[0] * out.target_logits + weights[1] * out.log_z)

    def plain(states, kernel):
        logits = states @ kernel
        chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        log_z = jax.nn.logsumexp(logits, axis=-1)
        return jnp.sum(weights[0] * chosen + weights[1] * log_z)

    got = jax.grad(written, argnums=(0, 1))(states, kernel)
    want = jax.grad(plain, argnums=(0, 1))(states, kernel)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


def test_bfloat16_gradients_keep_their_types(arrays):
    states, kernel, targets = arrays

    def loss(states, kernel):
        return models.head_outputs(states, kernel, targets).logps.sum()

    half = jnp.asarray(states, jnp.bfloat16)
    of_states, of_kernel = jax.grad(loss, argnums=(0, 1))(half, kernel)
    assert (of_states.dtype, of_kernel.dtype) == (jnp.bfloat16, jnp.float32)
    want = jax.grad(loss, argnums=1)(states, kernel)
    np.testing.assert_allclose(of_kernel, want, rtol=0.05, atol=0.05)


def test_largest_and_mean_logits(arrays):
    states, kernel, targets = arrays
    logits = states.astype(np.float64) @ kernel
    out = models.head_outputs(states, kernel, targets, chunk=3)
    np.testing.assert_allclose(out.max_logits, logits.max(-1), rtol=1e-5)
    mean = models.mean_logits(jnp.asarray(states), jnp.asarray(kernel))
    np.testing.assert_allclose(mean, logits.mean(-1), atol=1e-5)
