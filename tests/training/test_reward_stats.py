"""What a run learns of its data before the first step."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from jaxalign import objectives
from jaxalign.training import inputs


def _cache(rewards=(), labels=(), rows=None):
    """What the functions below look at of a cache."""
    return SimpleNamespace(
        index=SimpleNamespace(
            response_reward=np.asarray(rewards, np.float64),
            response_label=np.asarray(labels, np.int32),
            num_rows=rows or len(rewards),
        )
    )


@pytest.mark.parametrize("value", [0.1, 1 / 3, 4.6, -1e-9, 2.0**60, 0.0])
@pytest.mark.parametrize("count", [1, 3, 7, 60, 4000])
def test_equal_rewards_are_refused_whatever_their_rounding(value, count):
    with pytest.raises(ValueError, match=rf"All {count} rewards equal"):
        inputs._reward_stats([_cache(np.full(count, value))])
    # As two programs, one of them in float32, compute the same number.
    rounded = np.where(np.arange(count) % 2, value, np.float64(np.float32(value)))
    with pytest.raises(ValueError, match=rf"All {2 * count} rewards equal"):
        inputs._reward_stats([_cache(rounded), _cache(rounded)], [1.0, 2.0])


def test_rewards_that_differ_a_little_are_not_equal():
    mean, deviation = inputs._reward_stats([_cache(1e6 + np.array([0.0, 1.0]))])
    assert (mean, deviation) == (1e6 + 0.5, 0.5)


def test_rewards_without_a_deviation_are_refused():
    with pytest.raises(ValueError, match="reach 1e.300, too far"):
        inputs._reward_stats([_cache([1e300, -1e300])])


def test_reward_statistics_of_a_mixture_follow_its_rates():
    # A row of the second source has two responses; one source has no reward for one.
    small, large = [0.0, 2.0, np.nan], list(np.linspace(-3.0, 9.0, 80))
    caches = [_cache(small), _cache(large, rows=40)]
    # Three rows at rate 3, forty at rate 1: each of the three comes forty times.
    met = np.concatenate([np.repeat(small, 40), large])
    mean, deviation = inputs._reward_stats(caches, [3.0, 1.0])
    np.testing.assert_allclose(mean, np.nanmean(met), rtol=1e-12)
    np.testing.assert_allclose(deviation, np.nanstd(met), rtol=1e-12)


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ([[1, 1], [1, -1]], "3 labels.*thumbs up"),
        ([[0]], "thumbs down"),
        ([[0, 1]], ""),
    ],
)
def test_labels_that_all_point_one_way_are_told(labels, told, caplog):
    caches = [_cache(labels=of_cache, rows=1) for of_cache in labels]
    with caplog.at_level(logging.WARNING):
        inputs._tell_one_sided_labels(caches, objectives.KTO(model=None))
    assert len(caplog.records) == bool(told)
    if told:
        assert caplog.records[0].getMessage().startswith("All ")
        assert told.split(".*")[-1] in caplog.text and "KTO has nothing" in caplog.text
