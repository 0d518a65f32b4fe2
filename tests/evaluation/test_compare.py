"""Win rates and mean rewards counted by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.stats

from jaxalign import evaluation, judges
from jaxalign.evaluation import mean_reward, verdicts


def length(prompt, response):
    return len(response)


def compare_responses(prompts, a, b, function):
    judge = judges.from_function(function)
    return evaluation.compare_responses(prompts, a, b, judge)


def test_scored_by_hand():
    prompts = ["p", "q", "r", "s"]
    found = compare_responses(
        prompts, ["aaa", "bb", "c", "dddd"], ["a", "b", "cc", "dddd"], length
    )
    assert (found.wins, found.ties, found.losses, found.num_prompts) == (2, 1, 1, 4)
    assert found.win_rate.mean == 0.625
    assert found.reward_a.mean == 2.5 and found.reward_b.mean == 2.0
    paired = scipy.stats.ttest_rel([3, 2, 1, 4], [1, 1, 2, 4]).confidence_interval()
    np.testing.assert_allclose(found.reward_difference, [0.5, *paired])
    assert found.position_bias is None


def test_every_sample_meets_every_sample_of_its_prompt():
    found = compare_responses(
        ["p", "q"], [["aa", "aaaa"], ["bb"]], [["a", "aaa", "aaaa"], ["b"]], length
    )
    # p: 2 beats 1 only; 4 beats 1 and 3, ties 4. q: 2 beats 1.
    assert (found.wins, found.ties, found.losses) == (4, 1, 2)
    np.testing.assert_allclose(found.win_rate.mean, ((3.5 / 6) + 1) / 2)
    # The interval's n is the number of prompts, not of comparisons.
    assert found.win_rate.high - found.win_rate.low > 0.6
    assert found.num_prompts == 2


def test_swapping_the_models_mirrors_the_result():
    rng = np.random.default_rng(0)
    prompts = [str(i) for i in range(30)]
    a, b = (["x" * n for n in rng.integers(1, 6, 30)] for _ in range(2))
    one = compare_responses(prompts, a, b, length)
    other = compare_responses(prompts, b, a, length)
    assert (one.wins, one.ties, one.losses) == (other.losses, other.ties, other.wins)
    np.testing.assert_allclose(
        one.win_rate, 1.0 - np.array(other.win_rate)[[0, 2, 1]], atol=1e-12
    )


def test_pairwise_judges_are_asked_in_both_orders():
    calls = []

    def judge(prompt, a, b):
        calls.append((prompt, a, b))
        return 1.0 if len(a) > len(b) else 0.4 if len(a) == len(b) else 0.0

    found = compare_responses(["p", "q"], ["aa", "b"], ["a", "c"], judge)
    assert calls[:2] == [("p", "aa", "a"), ("p", "a", "aa")]
    assert calls[2:] == [("q", "b", "c"), ("q", "c", "b")]
    assert (found.wins, found.ties, found.losses) == (1, 1, 0)
    assert found.win_rate.mean == 0.75
    np.testing.assert_allclose(found.position_bias, (0.0 + -0.2) / 2)
    assert found.reward_a is None


def test_a_judge_that_looks_at_the_place_only_finds_a_tie():
    found = compare_responses(
        ["p", "q"], ["aa", "b"], ["a", "c"], lambda prompt, a, b: 1.0
    )
    assert found.win_rate.mean == 0.5 and found.ties == 2
    assert found.position_bias == 1.0


def test_what_has_no_verdict_is_left_out_counted_and_told(caplog):
    def unsure(prompt, response):
        return math.nan if response == "?" else len(response)

    prompts = ["p", "q", "r"]
    a, b = [["aaa", "?"], ["?"], ["a"]], [["b"], ["bb"], ["bb"]]
    found = compare_responses(prompts, a, b, unsure)
    # p: 3 beats 1; q: nothing to say; r: 1 loses to 2.
    assert (found.wins, found.ties, found.losses) == (1, 0, 1)
    assert (found.num_prompts, found.no_verdict) == (2, 2)
    assert found.reward_a.mean == 2.0 and found.reward_b.mean == pytest.approx(5 / 3)
    assert found.reward_difference.mean == 0.5
    assert "2 of 7 responses have no verdict" in caplog.text

    def one_way(prompt, a, b):  # and not the other: no verdict
        return None if a == "?" else float(len(a) > len(b))

    found = compare_responses(prompts, ["aaa", "?", "a"], ["b", "bb", "bb"], one_way)
    assert (found.wins, found.losses, found.num_prompts) == (1, 1, 2)
    assert found.no_verdict == 1 and found.position_bias == 0.0
    assert "1 of 3 comparisons have no verdict" in caplog.text
    assert mean_reward([[1.0, math.nan], [math.nan], [4.0]]).mean == 2.5


def test_mean_reward_clusters_by_prompt():
    responses = [["a", "a"], ["aaa", "aaa"], ["bb", "bb"]]
    groups = zip(["p", "q", "r"], responses, strict=True)
    found = mean_reward(verdicts(groups, judges.from_function(length)))
    expected = scipy.stats.ttest_1samp([1.0, 3.0, 2.0], 0.0).confidence_interval()
    np.testing.assert_allclose(found, [2.0, *expected])


def test_to_json_is_plain():
    found = compare_responses(["p", "q"], ["aa", "b"], ["a", "b"], length).to_json()
    read = json.loads(json.dumps(found))
    assert read["win_rate"]["mean"] == 0.75 and len(read["win_rate"]["ci"]) == 2
    assert read["num_prompts"] == 2 and read["position_bias"] is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["p"], ["a", "b"], ["a"], length), "responses_a for each of the 1 prompts"),
        ((["p"], ["a"], [[]], length), r"responses_b\[0\] is empty"),
        (([], [], [], length), "at least one prompt"),
        ((["p"], ["a"], ["b"], lambda x: 1.0), "takes .prompt, response."),
        ((["p"], ["a"], ["b"], lambda p, r: math.inf), "returned inf for prompt 'p'"),
        ((["p"], ["a"], ["b"], lambda p, r: None), "no verdict on any of the 1 prompt"),
        ((["p"], ["a"], ["b"], lambda p, a, b: None), "no verdict on any of the 1 pro"),
        ((["p"], ["a"], ["b"], lambda p, a, b: 2.0), "returned 2.0 .* in .0, 1."),
        (
            (["p"], [["a", "b"]], ["b"], lambda p, a, b: 0.5),
            "equal numbers, got 2 and 1 for prompt 0",
        ),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare_responses(*arguments)
