"""What a mask leaves out may be anything: no value and no gradient sees it."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import losses

# Numbers that a loss has no default for, and those that open its other branches.
_SETTINGS = {
    "beta": 0.3,
    "tau": 0.5,
    "gamma": 0.2,
    "temperature": 0.7,
    "label_smoothing": 0.1,
    "z_loss": 1e-2,
    "vocab_size": 7,
}
_INTEGERS = ("labels", "levels", "lists", "chosen_lengths", "rejected_lengths")
_SCALARS = ("reference_point", "reward_shift", "mean")
# Arrays although they have a default.
_ARRAYS = ("mean_logits", "offset", "margin")
_NO_LOSSES = ("masked", "log_ratios", "RATIONALE_TERMS", "AGGREGATES", "aggregate")
# Of vectors, which see each other; their own test has its masks (test_contrastive.py).
_NO_LOSSES += ("info_nce", "sinkhorn", "swav")
LOSSES = [name for name in losses.__all__ if name not in _NO_LOSSES]


_HOSTILE = (np.nan, np.inf, -np.inf, 0.0, 3e38)


def _arguments(name: str) -> tuple[dict, dict]:
    """The arrays of a loss that it may differentiate, and all it needs beside."""
    rng = np.random.default_rng(0)
    arrays, fixed = {}, {}
    for field, parameter in inspect.signature(getattr(losses, name)).parameters.items():
        if field in ("where", "kl_where"):
            fixed[field] = jnp.array([1.0, 1.0, 0.0, 0.0])
        elif field in _SETTINGS:
            fixed[field] = _SETTINGS[field]
        elif field == "thresholds":  # of all entries together
            fixed[field] = jnp.array([0.5])
        elif field in _SCALARS:
            fixed[field] = jnp.float32(0.4)
        elif field in _INTEGERS:
            fixed[field] = jnp.array([1, 0, 1, 0]) + 3 * ("lengths" in field)
        elif parameter.default is parameter.empty or field in _ARRAYS:
            values = -np.abs(rng.normal(size=4)) - 0.5
            arrays[field] = jnp.asarray(values, jnp.float32)
    return arrays, fixed


@pytest.mark.parametrize("name", LOSSES)
def test_masked_entries_reach_neither_values_nor_gradients(name):
    arrays, fixed = _arguments(name)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def function(arrays):
        out = getattr(losses, name)(**arrays, **fixed)
        out = jnp.stack(out) if isinstance(out, tuple) else out
        return jnp.sum(out), out

    (_, expected), slopes = function(arrays)
    assert np.all(np.asarray(expected)[..., 2:] == 0.0)
    for hostile in _HOSTILE:
        (_, found), hostile_slopes = function(
            {field: x.at[2:].set(hostile) for field, x in arrays.items()}
        )
        np.testing.assert_array_equal(found, expected)
        for field, slope in hostile_slopes.items():
            note = f"{field} {hostile}"
            np.testing.assert_array_equal(slope[2:], [0.0, 0.0], err_msg=note)
            np.testing.assert_array_equal(slope[:2], slopes[field][:2], err_msg=note)
