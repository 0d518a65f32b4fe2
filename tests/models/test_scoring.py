"""The vocabulary head: log-probabilities against float64, whole and in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from jaxalign.models import target_logps


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
    np.testing.assert_allclose(target_logps(*arrays), want, atol=2e-6)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_nothing(arrays, chunk):
    states, kernel, targets = arrays

    def run(chunk):
        def loss(states, kernel):
            logps = target_logps(states, kernel, targets, chunk=chunk)
            return (logps * jnp.cos(jnp.arange(7))).sum(), logps

        grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (_, logps), grads = jax.jit(grad)(states, kernel)
        return logps, *grads

    for got, want in zip(run(chunk), run(0), strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6)


def test_large_logits_stay_finite():
    logps = target_logps(jnp.array([[1e4]]), jnp.array([[1.0, -1.0]]), jnp.array([1]))
    np.testing.assert_array_equal(logps, [-2e4])
