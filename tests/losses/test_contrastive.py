"""Contrastive losses against PyTorch in float64, and Sinkhorn against POT."""

from __future__ import annotations

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from jaxalign import losses

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # POT 0.9.7's own source has a SyntaxWarning
    import ot

RNG = np.random.default_rng(3)
VECTORS, VIEWS = RNG.normal(size=(2, 6, 5))
PROTOTYPES = RNG.normal(size=(4, 5))
MASK = np.array([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
SWAV = {"temperature": 0.3, "epsilon": 0.2, "iterations": 3}
KINDS = {
    "info_nce": (lambda *a, **k: losses.info_nce(*a, temperature=0.3, **k), 2),
    "swav": (lambda *a, **k: losses.swav(*a, **SWAV, **k), 3),
}
ARRAYS = [x.astype(np.float32) for x in (VECTORS, VIEWS, PROTOTYPES)]


def with_gradients(function, *arrays):
    """Values, and the gradients of a weighted sum of them."""
    weights = jnp.arange(1.0, 1.0 + len(arrays[0]))

    def total(*arrays):
        values = function(*arrays)
        return jnp.sum(weights * values), values

    where = tuple(range(len(arrays)))
    (_, values), found = jax.value_and_grad(total, where, has_aux=True)(*arrays)
    return values, found


def in_torch(function, *arrays):
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    values = function(*tensors)
    (values * torch.arange(1, 1 + len(values))).sum().backward()
    return values.detach().numpy(), [x.grad.numpy() for x in tensors]


def pot(scores, epsilon, iterations):
    """Assignments of `scores`, by POT in float64."""
    n, k = scores.shape
    uniform = np.full(n, 1 / n), np.full(k, 1 / k)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few iterations do not converge: as meant
        plan = ot.sinkhorn(
            *uniform, -scores, epsilon, numItermax=iterations, stopThr=0.0
        )
    return plan * n


def assert_like_torch(name, function):
    kind, count = KINDS[name]
    expected = in_torch(function, *(VECTORS, VIEWS, PROTOTYPES)[:count])
    found = with_gradients(kind, *ARRAYS[:count])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for one, other in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_info_nce_is_torchs_cross_entropy_of_cosines():
    def simcse(vectors, views):
        cosines = cosine_similarity(vectors[:, None], views[None], dim=-1)
        own = torch.arange(len(vectors))
        return cross_entropy(cosines / 0.3, own, reduction="none")

    assert_like_torch("info_nce", simcse)


def test_swav_predicts_pots_assignments():
    def swapped(vectors, views, prototypes):
        center = normalize(prototypes, dim=-1)
        scores = [normalize(x, dim=-1) @ center.T for x in (vectors, views)]
        ours, theirs = (
            torch.tensor(pot(s.detach().numpy(), 0.2, iterations=3)) for s in scores
        )
        own, other = scores
        found = cross_entropy(other / 0.3, ours, reduction="none")
        return found + cross_entropy(own / 0.3, theirs, reduction="none")

    assert_like_torch("swav", swapped)


@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_sinkhorn_is_pots(iterations):
    scores = RNG.normal(size=(7, 3))
    found = losses.sinkhorn(
        jnp.asarray(scores, jnp.float32), epsilon=0.3, iterations=iterations
    )
    np.testing.assert_allclose(found, pot(scores, 0.3, iterations), rtol=2e-5)
    np.testing.assert_allclose(found.sum(1), 1.0, rtol=1e-6)


def test_sinkhorns_marginals_end_up_uniform():
    scores = jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32)
    found = losses.sinkhorn(scores, epsilon=0.5, iterations=200)
    np.testing.assert_allclose(found.sum(0), 2.0, rtol=1e-5)


def test_sinkhorn_holds_sharp_scores():
    """``exp(scores / epsilon)`` would overflow float32."""
    found = losses.sinkhorn(100 * jnp.eye(3), epsilon=0.05, iterations=3)
    np.testing.assert_allclose(found, np.eye(3), atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("held", [np.nan, np.inf, -np.inf, 0.0, 3e38])
def test_what_is_left_out_may_be_anything(name, held):
    kind, count = KINDS[name]
    real = MASK > 0
    alone = with_gradients(kind, *(x[real] for x in ARRAYS[:2]), *ARRAYS[2:count])
    filled = [np.where(real[:, None], x, np.float32(held)) for x in ARRAYS[:2]]
    values, gradients = with_gradients(
        lambda *a: kind(*a, where=jnp.asarray(MASK)), *filled, *ARRAYS[2:count]
    )
    np.testing.assert_array_equal(values[~real], 0.0)
    np.testing.assert_allclose(values[real], alone[0], rtol=1e-5)
    for found in gradients[:2]:
        np.testing.assert_array_equal(found[~real], 0.0)
    assert all(np.isfinite(found).all() for found in gradients)
    none = with_gradients(
        lambda *a: kind(*a, where=jnp.zeros(6)), *filled, *ARRAYS[2:count]
    )
    for found in (none[0], *none[1]):
        np.testing.assert_array_equal(found, 0.0)


def test_vectors_that_are_the_same_cannot_be_told_apart():
    same = jnp.ones((8, 3))
    found = losses.info_nce(same, same, temperature=0.05)
    np.testing.assert_allclose(found, math.log(8), rtol=1e-6)
    found = losses.swav(same, same, jnp.ones((5, 3)), **SWAV)
    np.testing.assert_allclose(found, 2 * math.log(5), rtol=1e-6)


def test_a_vector_of_zeros_has_no_direction():
    vectors = jnp.eye(3).at[0].set(0.0)
    values, gradients = with_gradients(KINDS["info_nce"][0], vectors, jnp.eye(3))
    assert float(values[0]) == pytest.approx(math.log(3))
    np.testing.assert_array_equal(gradients[0][0], 0.0)


def test_scores_that_tie_have_no_order():
    slope = jax.grad(losses.score_spread)
    one, other = jnp.float32(2.0), jnp.float32(1.5)
    assert float(losses.score_spread(one, one)) == 0.5
    assert float(slope(one, one)) == 0.0
    assert float(slope(one, other)) == -float(slope(other, one)) > 0.0
