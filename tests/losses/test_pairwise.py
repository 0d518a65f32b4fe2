"""Pair losses against goldens and closed forms (float64, computed elsewhere)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import losses

# Golden fixture: sums of log-probabilities for two pairs; the per-pair losses were
# computed in float64 by TRL 0.24.0's own loss methods.
G1 = {
    "chosen_logps": [-10.0, -20.0],
    "rejected_logps": [-12.0, -19.0],
    "ref_chosen_logps": [-11.0, -21.0],
    "ref_rejected_logps": [-11.5, -20.5],
}
GOLDENS = [
    ("dpo", {"beta": 0.1}, [0.6209570478, 0.7184596480]),
    ("dpo", {"beta": 0.1, "label_smoothing": 0.1}, [0.6359570478, 0.7134596480]),
    ("robust_dpo", {"beta": 0.1}, [0.6022070478, 0.7247096480]),
    ("hinge", {"beta": 0.1}, [0.85, 1.05]),
    ("ipo", {"beta": 0.1, "length_normalize": False}, [12.25, 30.25]),
    ("sppo_hard", {"beta": 0.1}, [36.25, 58.25]),
    ("nca_pair", {"beta": 0.1}, [1.3508248141, 1.4020735140]),
    ("apo_zero", {"beta": 0.1}, [0.9625234160, 1.0124506579]),
    ("apo_down", {"beta": 0.1}, [0.9875493421, 1.0374765840]),
    ("exo_pair", {"beta": 0.1}, [2.5055165555, 2.8478595644]),
]
# Loss and d loss / d margin where policy and reference agree.
AT_START = [
    ("dpo", {"beta": 0.1}, math.log(2.0), -0.05),
    ("dpo", {"beta": 0.1, "label_smoothing": 0.1}, math.log(2.0), -0.05 * 0.8),
    ("robust_dpo", {"beta": 0.1}, math.log(2.0), -0.05 / 0.8),
    ("hinge", {"beta": 0.1}, 1.0, -0.1),
    ("ipo", {"beta": 0.1, "length_normalize": False}, 25.0, -10.0),
    ("apo_zero", {"beta": 0.1}, 1.0, -0.025),
]


def fixture() -> list[jax.Array]:
    return [jnp.array(v) for v in G1.values()]


@pytest.mark.parametrize(("name", "settings", "expected"), GOLDENS)
def test_golden(name, settings, expected):
    found = getattr(losses, name)(*fixture(), **settings)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(("name", "settings", "value", "slope"), AT_START)
def test_value_and_gradient_where_policy_is_reference(name, settings, value, slope):
    equal = [jnp.array([-7.0])] * 4
    loss = getattr(losses, name)
    np.testing.assert_allclose(loss(*equal, **settings), [value], rtol=1e-6)
    grads = jax.grad(lambda *a: loss(*a, **settings).sum(), argnums=(0, 1, 2, 3))(
        *equal
    )
    np.testing.assert_allclose(grads[0], [slope], rtol=1e-5)
    np.testing.assert_allclose(grads[1], [-slope], rtol=1e-5)
    # The reference is a constant, whoever passes it.
    np.testing.assert_array_equal(grads[2:], np.zeros((2, 1)))


@pytest.mark.parametrize(("name", "settings"), [(n, s) for n, s, _ in GOLDENS])
def test_masked_pairs_cost_nothing_even_when_they_are_not_numbers(name, settings):
    arrays = [a.at[1].set(jnp.nan) for a in fixture()]
    where = jnp.array([1.0, 0.0])
    loss = getattr(losses, name)
    total, grads = jax.value_and_grad(
        lambda w: loss(w, *arrays[1:], where=where, **settings).sum()
    )(arrays[0])
    alone = loss(*(a[:1] for a in arrays), **settings)
    np.testing.assert_array_equal(total, alone[0])
    assert grads[1] == 0.0 and np.isfinite(grads[0])


@pytest.mark.parametrize(("name", "settings"), [(n, s) for n, s, _ in GOLDENS])
def test_jit_and_no_jit_agree(name, settings):
    loss = getattr(losses, name)
    np.testing.assert_allclose(
        jax.jit(lambda *a: loss(*a, **settings))(*fixture()),
        loss(*fixture(), **settings),
        rtol=1e-6,
    )


def test_conservative_dpo_has_its_minimum_where_the_closed_form_says():
    margin = jnp.array(math.log(0.9 / 0.1) / 0.1)  # 21.97225
    zero = jnp.zeros(())
    slope = jax.grad(
        lambda m: losses.dpo(m, zero, zero, zero, beta=0.1, label_smoothing=0.1)
    )
    assert abs(slope(margin)) < 1e-7
    assert slope(margin - 1.0) < 0 < slope(margin + 1.0)


@pytest.mark.parametrize(("margin", "slope"), [(9.9, -0.1), (10.1, 0.0)])
def test_hinge_rests_beyond_its_margin(margin, slope):
    zero = jnp.zeros(())
    found = jax.grad(lambda m: losses.hinge(m, zero, zero, zero, beta=0.1))(margin)
    np.testing.assert_allclose(found, slope, rtol=1e-6)


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match="shape"):
        losses.dpo(*(jnp.zeros(n) for n in (2, 2, 2, 3)), beta=0.1)


def test_ipo_normalizes_each_log_ratio_by_its_own_length():
    lengths = {
        "chosen_lengths": jnp.array([4, 5]),
        "rejected_lengths": jnp.array([2, 3]),
    }
    h = np.array([1.0 / 4 - -0.5 / 2, 1.0 / 5 - 1.5 / 3])
    found = losses.ipo(*fixture(), beta=0.1, **lengths)
    np.testing.assert_allclose(found, (h - 5.0) ** 2, rtol=1e-6)
    with pytest.raises(ValueError, match="needs chosen_lengths and rejected_lengths"):
        losses.ipo(*fixture(), beta=0.1)


def test_ipo_has_its_minimum_where_the_closed_form_says():
    # P(w beats l) = p: the population minimum is at h = (2p - 1) / (2 tau).
    p, tau, zero = 0.8, 0.1, jnp.zeros(())

    def population(h):
        kwargs = {"beta": tau, "length_normalize": False}
        return p * losses.ipo(h, zero, zero, zero, **kwargs) + (1 - p) * losses.ipo(
            zero, h, zero, zero, **kwargs
        )

    np.testing.assert_allclose(jax.grad(population)(jnp.array(3.0)), 0.0, atol=1e-5)


def test_robust_dpo_is_dpo_on_clean_labels_in_expectation():
    eps, four = 0.2, fixture()
    flipped = [four[1], four[0], four[3], four[2]]
    robust = [
        losses.robust_dpo(*x, beta=0.1, label_smoothing=eps) for x in (four, flipped)
    ]
    expected = (1 - eps) * robust[0] + eps * robust[1]
    np.testing.assert_allclose(expected, losses.dpo(*four, beta=0.1), rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "eps"), [(losses.robust_dpo, 0.5), (losses.exo_pair, 0.0)]
)
def test_smoothing_that_makes_no_sense_is_refused(loss, eps):
    with pytest.raises(ValueError, match=f"got {eps}"):
        loss(*fixture(), beta=0.1, label_smoothing=eps)


def test_the_offset_is_added_to_the_scaled_margin():
    found = losses.dpo(*fixture(), beta=0.1, offset=jnp.array([0.3, -0.2]))
    z = np.array([0.15 + 0.3, -0.05 - 0.2])
    np.testing.assert_allclose(found, np.log1p(np.exp(-z)), rtol=1e-6)


def test_dpo_nll_adds_the_mean_likelihood_of_the_chosen():
    lengths = jnp.array([4, 8])
    found = losses.dpo_nll(*fixture(), beta=0.1, alpha=0.5, chosen_lengths=lengths)
    expected = losses.dpo(*fixture(), beta=0.1) + 0.5 * np.array([10 / 4, 20 / 8])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
