"""Minimum Bayes risk with other people's metrics."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from jaxalign.decoding import mbr

POOL = [
    "the cat sat on the mat",
    "the cat sat on a mat",
    "a dog ran away",
    "the cat sat on the mat",
    "the cat is on the mat",
]


def _chrf(hypothesis, reference):
    return sacrebleu.sentence_chrf(hypothesis, [reference]).score


def _rouge(hypothesis, reference):
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    return scorer.score(reference, hypothesis)["rougeL"].fmeasure


@pytest.mark.parametrize("metric", [_chrf, _rouge])
def test_the_middle_of_the_pool_is_chosen(metric):
    table = np.array([[metric(a, b) for b in POOL] for a in POOL])
    found = mbr.expected_utilities(POOL, metric)
    np.testing.assert_allclose(found, table.mean(axis=1), rtol=1e-12)
    assert mbr.minimum_bayes_risk(POOL, metric) == 0


def test_equal_pairs_are_scored_once():
    calls = []

    def metric(a, b):
        calls.append((a, b))
        return float(a == b)

    found = mbr.expected_utilities(POOL, metric)
    np.testing.assert_allclose(found, [0.4, 0.2, 0.2, 0.4, 0.2])
    assert len(calls) == len(set(calls)) == 16


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="at least one candidate"):
        mbr.minimum_bayes_risk([], _chrf)
