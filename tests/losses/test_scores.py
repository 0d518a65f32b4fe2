"""Losses on scores against closed forms in float64, SciPy, PyTorch and TRL 1.16.0."""

from __future__ import annotations

import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch

from jaxalign import losses

TRL = json.loads(
    (pathlib.Path(__file__).parent / "goldens/trl_reward_1_16_0.json").read_text()
)


@pytest.mark.parametrize("case", TRL["cases"])
def test_trls_reward_trainer(case):
    chosen, rejected, margin = (
        jnp.asarray(TRL[name], jnp.float32) for name in ("chosen", "rejected", "margin")
    )
    settings = {"margin": margin} if case["margin"] else {}

    def loss(chosen, rejected):
        found = jnp.mean(losses.bradley_terry(chosen, rejected, **settings))
        if case["coefficient"]:
            found += case["coefficient"] * jnp.mean(losses.centring(chosen, rejected))
        return found

    found, slopes = jax.value_and_grad(loss, (0, 1))(chosen, rejected)
    np.testing.assert_allclose(found, case["loss"], rtol=1e-5)
    for slope, expected in zip(slopes, case["gradients"], strict=True):
        np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-7)


def test_the_two_pairs_of_the_specification():
    chosen, rejected = jnp.array([1.2, 0.1]), jnp.array([0.3, 0.4])
    found = losses.bradley_terry(chosen, rejected)
    np.testing.assert_allclose(found, [0.3411538744, 0.8543552445], rtol=1e-6)
    assert float(0.01 * losses.centring(chosen, rejected).mean()) == pytest.approx(
        0.0125, rel=1e-6
    )


def test_its_optimum_is_the_log_odds_of_the_preferences():
    """One pair preferred with probability p, and smoothing, which is the same."""

    def loss(z, share, alpha):
        z = jnp.float32(z)
        won = losses.bradley_terry(z, jnp.zeros(()), label_smoothing=alpha)
        lost = losses.bradley_terry(jnp.zeros(()), z, label_smoothing=alpha)
        return float(share * won + (1 - share) * lost)

    for share, alpha in ((0.8, 0.0), (1.0, 0.2)):
        found = scipy.optimize.minimize_scalar(loss, args=(share, alpha), tol=1e-6)
        assert found.x == pytest.approx(math.log(4.0), abs=2e-3)
        assert found.fun == pytest.approx(0.500402, abs=1e-6)


def test_margins_smoothing_and_flips_as_the_paper_means_them():
    rng = np.random.default_rng(0)
    s_w, s_l, mu = rng.normal(scale=2.0, size=(3, 50))
    alpha = rng.uniform(0, 1, 50)
    z = s_w - s_l - mu
    expected = (1 - alpha) * np.logaddexp(0, -z) + alpha * np.logaddexp(0, z)
    asked = {"margin": jnp.asarray(mu), "label_smoothing": jnp.asarray(alpha)}
    found = losses.bradley_terry(jnp.asarray(s_w), jnp.asarray(s_l), **asked)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # A flipped pair under alpha is the pair as it was under 1 - alpha.
    other = {"margin": jnp.asarray(mu), "label_smoothing": jnp.asarray(1 - alpha)}
    flipped = losses.bradley_terry(
        jnp.asarray(s_w), jnp.asarray(s_l), **other, flipped=jnp.ones(50)
    )
    np.testing.assert_allclose(flipped, found, rtol=1e-5)
    # And the same as exchanging the responses, with the margin's sign.
    swapped = losses.bradley_terry(
        jnp.asarray(s_l),
        jnp.asarray(s_w),
        margin=-jnp.asarray(mu),
        label_smoothing=jnp.asarray(1 - alpha),
    )
    np.testing.assert_allclose(swapped, found, rtol=1e-5)


def test_a_margin_moves_the_gradient_and_has_none():
    slope = jax.grad(
        lambda s, m: losses.bradley_terry(s, jnp.zeros(()), margin=m), (0, 1)
    )(jnp.float32(0.5), jnp.float32(2.0))
    assert float(slope[0]) == pytest.approx(-scipy.special.expit(1.5), rel=1e-5)
    assert float(slope[1]) == 0.0


def test_regression_is_pytorchs():
    rng = np.random.default_rng(1)
    scores, targets = rng.normal(size=(2, 30))
    found = losses.score_regression(jnp.asarray(scores), jnp.asarray(targets))
    mse = torch.nn.functional.mse_loss(torch.tensor(scores), torch.tensor(targets))
    assert float(found.mean()) == pytest.approx(mse.item() / 2, rel=1e-6)


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_ordinal_likelihoods_in_float64(levels):
    rng = np.random.default_rng(levels)
    thresholds = np.sort(rng.normal(scale=2.0, size=levels - 1))
    scores = np.append(rng.normal(scale=3.0, size=40), [-40.0, 40.0])
    for level in range(levels):
        upper = np.append(thresholds, np.inf)[level] - scores
        lower = np.insert(thresholds, 0, -np.inf)[level] - scores

        def log_p(s, level=level):
            up = torch.tensor(np.append(thresholds, np.inf)[level]) - s
            low = torch.tensor(np.insert(thresholds, 0, -np.inf)[level]) - s
            gap = torch.log(-torch.expm1(low - up))
            return -(gap + torch.nn.functional.logsigmoid(up) - torch.nn.functional
                     .softplus(low))  # fmt: skip

        # logistic(a) - logistic(b), where that is no difference of nearly equal numbers
        plain = scipy.special.expit(upper) - scipy.special.expit(lower)
        well = np.abs(scores) < 8
        asked = jnp.asarray(scores), jnp.full(scores.shape, level), thresholds
        found, slopes = jax.value_and_grad(
            lambda s, k, t: (losses.score_ordinal(s, k, jnp.asarray(t))).sum()
        )(*asked)
        each = losses.score_ordinal(*asked[:2], jnp.asarray(thresholds))
        np.testing.assert_allclose(each[well], -np.log(plain[well]), rtol=3e-5)
        leaf = torch.tensor(scores, requires_grad=True)
        expected = log_p(leaf)
        np.testing.assert_allclose(each, expected.detach(), rtol=3e-5, atol=1e-6)
        expected.sum().backward()
        np.testing.assert_allclose(slopes, leaf.grad, rtol=1e-3, atol=1e-5)
        assert np.isfinite(found)


def test_a_ranking_of_two_is_bradley_terry():
    scores = jnp.array([0.3, 1.7])
    found = losses.plackett_luce(scores, jnp.array([5.0, 2.0]))
    np.testing.assert_allclose(
        found, [losses.bradley_terry(scores[0], scores[1]), 0.0], rtol=1e-6
    )


def test_rankings_have_the_probabilities_of_all_orders():
    """Over all orders the likelihoods add up to 1, and each is the product of draws."""
    scores = np.random.default_rng(2).normal(scale=2.0, size=4)
    total = 0.0
    for order in itertools.permutations(range(4)):
        grades = np.zeros(4)
        grades[list(order)] = [4, 3, 2, 1]
        p, rest = 1.0, list(order)
        while rest:
            p *= scipy.special.softmax(scores[rest])[0]
            rest.pop(0)
        found = losses.plackett_luce(jnp.asarray(scores), jnp.asarray(grades))
        assert float(found.sum()) == pytest.approx(-math.log(p), rel=1e-5)
        total += math.exp(-float(found.sum()))
    assert total == pytest.approx(1.0, rel=1e-5)


def test_equal_grades_and_other_lists_are_not_compared():
    scores = jnp.array([3.0, -1.0, 0.5, 2.0, 9.0])
    grades = jnp.array([1.0, 1.0, 0.0, 1.0, 0.0])
    lists = jnp.array([0, 0, 0, 1, 1])
    slope = jax.grad(
        lambda s: losses.plackett_luce(s, grades, lists, where=jnp.ones(5)).sum()
    )(scores)
    # In a list of its own each of the first two is compared with the third alone.
    sigma = scipy.special.expit(np.array([-2.5, 1.5, 7.0]))
    expected = [-sigma[0], -sigma[1], sigma[0] + sigma[1], -sigma[2], sigma[2]]
    np.testing.assert_allclose(slope, expected, rtol=1e-5)
    tied = jax.value_and_grad(lambda s: losses.plackett_luce(s, jnp.ones(5)).sum())
    value, slope = tied(scores)
    assert float(value) == 0.0 and not np.any(slope)


def test_sums_of_an_ensemble_are_numpys():
    scores = np.random.default_rng(3).normal(size=(6, 5))
    for how, expected in (
        ("mean", scores.mean(1)),
        ("worst", scores.min(1)),
        ("penalised", scores.mean(1) - 0.7 * scores.std(1, ddof=0)),
    ):
        found = losses.aggregate(jnp.asarray(scores), how, penalty=0.7)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"one of \('mean', 'worst', 'penalised'\)"):
        losses.aggregate(scores, "best")
