"""Metrics add up over batches, and over microbatches stacked by a scan."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxalign.objectives.metrics import Mean, Pairs, Values, sample_pairs, summarize


def test_means_weigh_by_count_not_by_batch():
    one = {"a": Mean.of(jnp.array([1.0, 2.0, 3.0]), jnp.ones(3))}
    two = {"a": Mean.of(jnp.array([10.0, jnp.nan]), jnp.array([1.0, 0.0]))}
    assert summarize([one, two]) == {"a": 4.0}


def test_stacked_microbatches_count_as_one_batch():
    stacked = {"a": Mean(jnp.array([6.0, 10.0]), jnp.array([3.0, 1.0]))}
    assert summarize([stacked]) == {"a": 4.0}


def test_nothing_counted_is_absent_rather_than_nan():
    empty = {
        "mean": Mean.of(jnp.ones(2), jnp.zeros(2)),
        "values": Values.of(jnp.ones(2), jnp.zeros(2)),
        "pairs": Pairs.of(jnp.ones(2), jnp.ones(2), jnp.zeros(2)),
    }
    assert summarize([empty]) == {}
    assert summarize([]) == {}


def test_percentiles_and_correlation_are_those_of_the_whole_sample():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 40))
    mask = rng.integers(0, 2, 40)
    parts = [slice(0, 15), slice(15, 40)]
    metrics = [
        {
            "v": Values.of(jnp.array(x[p]), jnp.array(mask[p])),
            "r": Pairs.of(jnp.array(x[p]), jnp.array(y[p]), jnp.array(mask[p])),
        }
        for p in parts
    ]
    found = summarize(metrics)
    kept_x, kept_y = x[mask > 0], y[mask > 0]
    np.testing.assert_allclose(found["v/p95"], np.percentile(kept_x, 95), rtol=1e-5)
    np.testing.assert_allclose(found["v/std"], kept_x.std(), rtol=1e-5)
    np.testing.assert_allclose(found["r"], np.corrcoef(kept_x, kept_y)[0, 1], rtol=1e-4)
    np.testing.assert_allclose(sample_pairs(metrics, "r")[0], kept_x, rtol=1e-6)
    assert sample_pairs(metrics, "v") is None
