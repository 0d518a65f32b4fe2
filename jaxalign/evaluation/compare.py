"""Which of two models answers better: win rate and mean reward under a judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.evaluation import judging
from jaxalign.evaluation.intervals import Interval, mean_with_ci, wilson_interval

Responses = Sequence[str | Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Model A against model B on the same prompts.

    Attributes:
      win_rate: of A, ties counted half, with Wilson's interval over prompts.
      wins: comparisons that A won; several per prompt when there are several samples.
      ties: comparisons without a winner.
      losses: comparisons that B won.
      num_prompts: independent units behind the intervals.
      no_verdict: responses, of pairwise judges comparisons, left out for want of one.
      reward_a: mean score of A's responses; None under a pairwise judge.
      reward_b: mean score of B's responses; None under a pairwise judge.
      reward_difference: mean of A's minus B's score on the same prompt; its interval is
        narrower than those of the two means, for prompts differ in difficulty.
      position_bias: how much a pairwise judge favours what stands first, in [-1, 1];
        None under a scoring judge.
    """

    win_rate: Interval
    wins: int
    ties: int
    losses: int
    num_prompts: int
    no_verdict: int = 0
    reward_a: Interval | None = None
    reward_b: Interval | None = None
    reward_difference: Interval | None = None
    position_bias: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; an interval is ``{"mean": .., "ci": [low, high]}``."""
        return {
            name: {"mean": value.mean, "ci": [value.low, value.high]}
            if isinstance(value, Interval)
            else value
            for name, value in vars(self).items()
        }


def _samples(
    name: str, prompts: Sequence[str], responses: Responses
) -> list[list[str]]:
    """The responses as a non-empty list of samples per prompt."""
    if len(responses) != len(prompts):
        raise ValueError(
            f"Expected {name} for each of the {len(prompts)} prompts, got "
            f"{len(responses)}."
        )
    listed = [[r] if isinstance(r, str) else list(r) for r in responses]
    for i, samples in enumerate(listed):
        if not samples:
            raise ValueError(f"{name}[{i}] is empty; every prompt needs a response.")
    return listed


def mean_reward(scores: Sequence[Sequence[float] | np.ndarray]) -> Interval:
    """Mean score of responses; samples of one prompt form one cluster.

    Args:
      scores: of each prompt's samples, as `verdicts` gives them; NaN is left out.

    Raises:
      ValueError: when there is no verdict at all.

    >>> mean_reward([[1.0], [3.0, float("nan")]]).mean
    2.0
    """
    flat = np.concatenate([np.zeros(0), *(np.asarray(s, np.float64) for s in scores)])
    clusters = np.repeat(np.arange(len(scores)), [len(s) for s in scores])
    there = ~np.isnan(flat)
    if not there.any():
        raise _no_verdict(len(flat), "responses")
    return mean_with_ci(flat[there], clusters[there])


def _no_verdict(count: int, what: str) -> ValueError:
    return ValueError(
        f"The judge gave no verdict on any of the {count} {what}: look at what it "
        "answers."
    )


def compare_responses(
    prompts: Sequence[str],
    responses_a: Responses,
    responses_b: Responses,
    judge: judging.Judge | judging.PairwiseJudge,
) -> Comparison:
    """Compares two models' responses to the same prompts, at 95% confidence.

    A scoring judge is asked once about a response, and every sample of A is compared
    with every sample of B on the same prompt. A pairwise judge is asked in both orders
    about sample ``i`` of A against sample ``i`` of B. What has no verdict is left out.

    Args:
      prompts: texts; each is one independent unit.
      responses_a: per prompt a text, or several samples.
      responses_b: the same for model B.
      judge: scoring or pairwise, see `jaxalign.judges`.
    """
    a = _samples("responses_a", prompts, responses_a)
    b = _samples("responses_b", prompts, responses_b)
    if not prompts:
        raise ValueError("A comparison needs at least one prompt, got none.")
    compare_all = _pairwise if judging.is_pairwise(judge) else _scored
    # Per prompt: an array of A's results against B, 1 win, 0 loss, 0.5 tie.
    results, extra = compare_all(prompts, a, b, judge)
    results = [kept for r in results if (kept := r[~np.isnan(r)]).size]
    if not results:
        raise _no_verdict(len(prompts), "prompts' responses")
    flat = np.concatenate(results)
    wins = sum(float(np.mean(r)) for r in results)
    return Comparison(
        win_rate=wilson_interval(min(wins, len(results)), len(results)),
        wins=int(np.sum(flat > 0.5)),
        ties=int(np.sum(flat == 0.5)),
        losses=int(np.sum(flat < 0.5)),
        num_prompts=len(results),
        **extra,
    )


def _scored(prompts, a, b, judge):
    groups = [*zip(prompts, a, strict=True), *zip(prompts, b, strict=True)]
    scores = [s.astype(np.float64) for s in judging.verdicts(groups, judge)]
    scores_a, scores_b = scores[: len(prompts)], scores[len(prompts) :]
    results = [
        ((np.sign(x[:, None] - y[None, :]) + 1.0) / 2.0).ravel()
        for x, y in zip(scores_a, scores_b, strict=True)
    ]
    kept = ([s[~np.isnan(s)] for s in each] for each in (scores_a, scores_b))
    pairs = zip(*kept, strict=True)
    differences = [x.mean() - y.mean() for x, y in pairs if x.size and y.size]
    if not differences:
        raise _no_verdict(len(prompts), "prompts' responses to both models")
    return results, {
        "no_verdict": sum(int(np.isnan(s).sum()) for s in scores),
        "reward_a": mean_reward(scores_a),
        "reward_b": mean_reward(scores_b),
        "reward_difference": mean_with_ci(differences),
    }


def _pairwise(prompts, a, b, judge):
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if len(x) != len(y):
            raise ValueError(
                "A pairwise judge compares sample i of A with sample i of B: expected "
                f"equal numbers, got {len(x)} and {len(y)} for prompt {i}."
            )
    preferred, bias = judging.preferences(
        judge,
        [prompt for prompt, x in zip(prompts, a, strict=True) for _ in x],
        [text for x in a for text in x],
        [text for y in b for text in y],
    )
    ends = np.cumsum([len(x) for x in a])[:-1]
    there = ~np.isnan(bias)
    return np.split(preferred, ends), {
        "no_verdict": int((~there).sum()),
        "position_bias": float(bias[there].mean()) if there.any() else None,
    }
