"""Resampling: closed forms, `llamppl`'s recorded numbers, and dead particles."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.decoding import resampling

RECORDED = json.loads(
    (pathlib.Path(__file__).parent / "llamppl" / "resampling.json").read_text()
)
DRAWS = 4000


def exact_threshold(weights, n):
    """The root of ``sum min(1, c w) = n`` by bisection in float64."""
    low, high = 0.0, 1.0 / weights[weights > 0.0].min()
    for _ in range(200):
        middle = (low + high) / 2.0
        enough = np.minimum(middle * weights, 1.0).sum() >= n
        low, high = (low, middle) if enough else (middle, high)
    return high


def draw(scheme, weights, n, draws=DRAWS):
    keys = jax.random.split(jax.random.key(0), draws)
    log_weights = jnp.log(jnp.asarray(weights, jnp.float32))
    run = jax.jit(jax.vmap(lambda k: resampling.SCHEMES[scheme](k, log_weights, n)))
    return jax.device_get(run(keys))


def mean_weights(found, size):
    """Mean over draws of the new weight at every index, and its standard error."""
    total = np.zeros((len(found.indices), size))
    for i, weights in zip(found.indices.T, np.exp(found.log_weights).T, strict=True):
        np.add.at(total, (np.arange(len(i)), i), weights)
    return total.mean(axis=0), total.std(axis=0) / np.sqrt(len(total))


@pytest.mark.parametrize("scheme", resampling.SCHEMES)
def test_every_particle_keeps_its_weight_in_expectation(scheme):
    weights = np.random.default_rng(1).dirichlet(np.full(12, 0.4)) * 3.0
    weights[[2, 7]] = 0.0
    mean, error = mean_weights(draw(scheme, weights, 5), 12)
    # Weights too small to be drawn show no error of their own.
    error = np.maximum(error, np.sqrt(weights * weights.sum() / 5 / DRAWS))
    assert (np.abs(mean - weights) <= 4.0 * error + 1e-5).all()
    assert mean[2] == mean[7] == 0.0


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda c: str(c["n"]))
def test_the_same_choices_as_llamppl(case):
    weights, n = np.array(case["weights"]), case["n"]
    c = exact_threshold(weights, n)
    always = set(np.flatnonzero(c * weights >= 1.0 - 1e-6).tolist())
    # A weight right at the threshold is kept or drawn surely, which is the same.
    edge = set(np.flatnonzero(np.abs(c * weights - 1.0) < 1e-6).tolist())
    assert always - edge <= set(case["kept"]) <= always
    found = draw("fearnhead_clifford", weights, n)
    for indices, log_weights in zip(found.indices, found.log_weights, strict=True):
        assert always <= set(indices.tolist()) and len(set(indices.tolist())) == n
        wanted = np.maximum(weights[indices], 1.0 / c)
        np.testing.assert_allclose(np.exp(log_weights), wanted, rtol=1e-5)
    frequencies = np.bincount(found.indices.ravel(), minlength=len(weights)) / DRAWS
    # Two samples of one Bernoulli each, theirs and ours.
    p = np.minimum(c * weights, 1.0)
    error = np.sqrt(p * (1 - p) * (1 / DRAWS + 1 / RECORDED["draws"]))
    assert (np.abs(frequencies - case["frequencies"]) <= 4.0 * error + 1e-6).all()


def test_llamppl_weighs_drawn_particles_a_little_wrong():
    """Its threshold need not solve ``sum min(1, c w) = n``."""
    for case in RECORDED["cases"]:
        weights = np.array(case["weights"])
        c, _ = resampling.threshold(jnp.asarray(weights, jnp.float32), case["n"])
        for value, solves in ((float(c), True), (case["c"], case["n"] < 5)):
            total = np.minimum(value * weights, 1.0).sum()
            assert (abs(total - case["n"]) < 1e-4) == solves


def test_threshold_solves_its_equation():
    rng = np.random.default_rng(2)
    solve = jax.jit(resampling.threshold, static_argnums=1)
    for _ in range(300):
        weights = rng.dirichlet(np.full(20, rng.choice([0.05, 0.3, 2.0])))
        weights = np.maximum(weights, 1e-9) / np.maximum(weights, 1e-9).sum()
        c, m = solve(jnp.asarray(weights, jnp.float32), 7)
        saturated = float(c) * weights
        np.testing.assert_allclose(np.minimum(saturated, 1.0).sum(), 7.0, rtol=1e-4)
        assert (
            abs((saturated >= 1.0 + 1e-4).sum() - int(m))
            <= (np.abs(saturated - 1.0) < 1e-3).sum()
        )


def test_dead_particles_are_not_revived():
    case = RECORDED["dead"]
    # llamppl 0.2.3 keeps three, draws all three that weigh nothing, and returns six.
    assert case["drawn"] == [0, 1, 2] and len(case["kept"]) == 3
    found = draw("fearnhead_clifford", case["weights"], case["n"], draws=20)
    weights = np.array(case["weights"])
    for indices, log_weights in zip(found.indices, found.log_weights, strict=True):
        alive = log_weights > -np.inf
        assert indices.shape == (4,) and sorted(indices[alive]) == [3, 4, 5]
        np.testing.assert_allclose(np.exp(log_weights[alive]), weights[indices[alive]])


def test_the_stride_divides_by_the_slots_left():
    """Dividing by the number kept, as a listing in circulation does, loses some."""
    weights = [0.9, 0.05, 0.03, 0.01, 0.01]  # one is kept, three slots are left
    found = draw("fearnhead_clifford", weights, 4, draws=50)
    assert all(len(set(row.tolist())) == 4 for row in found.indices)
    np.testing.assert_allclose(np.exp(found.log_weights).sum(axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("scheme", resampling.SCHEMES)
def test_an_empty_population_stays_empty(scheme):
    found = draw(scheme, np.zeros(6), 3, draws=2)
    assert (found.log_weights == -np.inf).all()


def test_tiny_and_huge_weights():
    log_weights = jnp.array([-1e4, -1e4 - 1.0, -1e4 - 90.0, -jnp.inf, -1e4 - 2.0])
    resample = jax.jit(resampling.fearnhead_clifford, static_argnums=2)
    found = resample(jax.random.key(0), log_weights, 2)
    assert np.isfinite(found.log_weights).all()
    same = resampling.effective_sample_size(log_weights + 1e4)
    np.testing.assert_allclose(
        resampling.effective_sample_size(log_weights), same, rtol=1e-2
    )
