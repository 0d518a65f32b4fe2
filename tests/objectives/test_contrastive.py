"""Reward models with a contrastive loss: what is compared with what, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives_cases import (
    CONFIG,
    BagOfTokens,
    assert_same_gradients,
    get_case,
    make_batch,
    make_rows,
)

from jaxalign import losses, objectives
from jaxalign.objectives.base import Step
from jaxalign.objectives.metrics import summarize

MODEL = BagOfTokens(CONFIG)
BATCH = make_batch(make_rows(6), 2)
RNG = np.random.default_rng(7)
NAMES = ("SimCSEReward", "SwAVReward")


def given_views(name, monkeypatch, **settings):
    """An objective whose two views are known, and its parameters."""
    objective = objectives.OBJECTIVES[name](model=MODEL, contrast=0.3, **settings)
    params = objective.init_params(jax.random.key(0))
    views = RNG.normal(size=(2, *BATCH["response_mask"].shape, CONFIG.emb_dim))
    left = list(map(jnp.asarray, views.astype(np.float32)))
    monkeypatch.setattr(type(objective), "features", lambda *_: left.pop(0))
    return objective, params, views


def value(objective, params):
    out = objective.loss(params, Step(BATCH, key=jax.random.key(1)))
    counts = objective.denominators(BATCH)
    total = sum(out.sums[n] / counts[n] for n in out.sums)
    return float(total), summarize([out.metrics])


def preferences(views, params):
    """The mean of both views' Bradley-Terry losses."""
    head = params["reward"]["reward_head"]
    found = []
    for view in views:
        scores = (view @ np.asarray(head["kernel"], np.float64))[..., 0]
        for b, q in np.argwhere(BATCH["pair_mask"] > 0):
            won, lost = (BATCH[f"pair_{n}"][b, q] for n in ("chosen", "rejected"))
            found.append(np.logaddexp(0.0, scores[b, lost] - scores[b, won]))
    return np.mean(found)


def vectors_of(view, compared):
    """The batch's vectors in a list: nothing of places that are empty."""
    if compared == "responses":
        return np.stack([view[b, r] for b, r in np.argwhere(BATCH["response_mask"])])
    gaps = []
    for b, q in np.argwhere(BATCH["pair_mask"] > 0):
        won, lost = (BATCH[f"pair_{n}"][b, q] for n in ("chosen", "rejected"))
        gaps += [view[b, won] - view[b, lost], view[b, lost] - view[b, won]]
    return np.stack(gaps)


@pytest.mark.parametrize("compared", ["responses", "differences"])
def test_simcse_tells_each_view_from_all_of_the_batch(monkeypatch, compared):
    objective, params, views = given_views(
        "SimCSEReward", monkeypatch, compared=compared, temperature=0.2
    )
    one, other = (vectors_of(view, compared) for view in views)
    assert len(one) == 12
    lengths = np.linalg.norm(one, axis=1)[:, None] * np.linalg.norm(other, axis=1)
    cosines = one @ other.T / lengths
    terms = np.log(np.exp(cosines / 0.2).sum(1)) - cosines.diagonal() / 0.2
    found, metrics = value(objective, params)
    expected = preferences(views, params) + 0.3 * terms.mean()
    assert found == pytest.approx(expected, rel=1e-5)
    assert metrics["contrast/loss"] == pytest.approx(terms.mean(), rel=1e-5)
    similarity = cosines.diagonal().mean()
    assert metrics["contrast/view_similarity"] == pytest.approx(similarity, abs=1e-6)


@pytest.mark.parametrize("compared", ["responses", "differences"])
def test_swav_assigns_the_batch_to_the_networks_prototypes(monkeypatch, compared):
    objective, params, views = given_views(
        "SwAVReward", monkeypatch, compared=compared, prototypes=4
    )
    prototypes = params["reward"]["prototypes"]
    assert prototypes.shape == (4, CONFIG.emb_dim)
    both = [jnp.asarray(vectors_of(view, compared), jnp.float32) for view in views]
    terms = losses.swav(*both, prototypes, temperature=0.1, epsilon=0.05, iterations=3)
    found, metrics = value(objective, params)
    expected = preferences(views, params) + 0.3 * float(jnp.mean(terms))
    assert found == pytest.approx(expected, rel=1e-5)
    assert metrics["contrast/loss"] == pytest.approx(float(jnp.mean(terms)), rel=1e-5)


def test_without_a_contrast_it_is_bradley_terry():
    """And without units to drop, where both views are the same."""
    batch = make_batch(make_rows(8), 2)
    plain, _ = get_case("BradleyTerry", BagOfTokens).step(batch)
    found, metrics = get_case("SimCSEReward", BagOfTokens, contrast=0.0).step(batch)
    assert_same_gradients(found, plain)
    assert metrics["contrast/view_similarity"] == pytest.approx(1.0, abs=1e-5)


def test_dropout_makes_the_views_differ():
    objective = objectives.SimCSEReward(model=MODEL, view_dropout=0.2)
    params = objective.init_params(jax.random.key(0))

    @jax.jit
    def similarity(key):
        metrics = objective.loss(params, Step(BATCH, key=key)).metrics
        return metrics["contrast/view_similarity"]

    dropped = summarize([{"x": similarity(jax.random.key(1))}])["x"]
    assert 0.1 < dropped < 0.99
    out = objective.loss(params, Step(BATCH))  # of an evaluation
    found = summarize([out.metrics])["contrast/view_similarity"]
    assert found == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dropout": False}, "the two views of a response differ by their dropout"),
        ({"compared": "pairs"}, r"must be one of \('responses', 'differences'\)"),
        ({"read": "pair_mean"}, "no response has features of its own"),
        ({"view_dropout": 0.0}, r"view_dropout must lie in \(0, 1\)"),
        ({"temperature": 0.0}, "a temperature above 0"),
        ({"contrast": -1.0}, "a contrast of at least 0"),
    ],
)
def test_what_cannot_be_is_refused(name, settings, says):
    with pytest.raises(ValueError, match=says):
        objectives.OBJECTIVES[name](model=MODEL, **settings)


@pytest.mark.parametrize("settings", [{"prototypes": 1}, {"iterations": 0}])
def test_assignments_that_cannot_be_are_refused(settings):
    with pytest.raises(ValueError, match="at least 2 prototypes, 1 iteration"):
        objectives.SwAVReward(model=MODEL, **settings)
