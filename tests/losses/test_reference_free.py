"""Reference-free pair losses against goldens computed by TRL 0.24.0 in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import losses

SUMS = (jnp.array([-10.0, -20.0]), jnp.array([-12.0, -19.0]))
MEANS = (jnp.array([-2.0, -2.0]), jnp.array([-3.0, -1.9]))
CASES = [
    ("cpo", SUMS, {"beta": 0.1}, [0.5981388694, 0.7443966601]),
    ("simpo", MEANS, {"beta": 2.0, "gamma": 0.5}, [0.2014132780, 1.1031860489]),
    ("orpo", MEANS, {"beta": 0.1}, [0.0288750784, 0.0753144655]),
    ("slic_hf", SUMS, {"delta": 3.0}, [1.0, 4.0]),
]


@pytest.mark.parametrize(("name", "inputs", "settings", "expected"), CASES)
def test_golden(name, inputs, settings, expected):
    found = getattr(losses, name)(*inputs, **settings)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(("name", "inputs", "settings", "expected"), CASES)
def test_masked_pairs_cost_nothing_even_when_they_are_not_numbers(
    name, inputs, settings, expected
):
    broken = [x.at[1].set(jnp.nan) for x in inputs]
    total, grad = jax.value_and_grad(
        lambda w: getattr(losses, name)(
            w, broken[1], where=jnp.array([1.0, 0.0]), **settings
        ).sum()
    )(broken[0])
    np.testing.assert_allclose(total, expected[0], rtol=1e-5)
    assert grad[1] == 0.0 and np.isfinite(grad[0])


def test_orpo_is_finite_where_a_response_is_certain():
    certain = jnp.array([0.0, -1e-9])
    loss, grad = jax.value_and_grad(
        lambda w: losses.orpo(w, jnp.full(2, -1.0), beta=0.1).sum()
    )(certain)
    assert np.isfinite(loss) and np.isfinite(grad).all()
    # Certain is not the same as masked: the odds there are the largest there are.
    assert losses.orpo(certain, jnp.full(2, -1.0), beta=0.1)[0] < 1e-5
