"""Which of two models answers better: win rate and mean reward under a judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.evaluation import judges
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
    reward_a: Interval | None = None
    reward_b: Interval | None = None
    reward_difference: Interval | None = None
    position_bias: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; an interval is ``{"mean": .., "ci": [low, high]}``."""

        def plain(value):
            if isinstance(value, Interval):
                return {"mean": value.mean, "ci": [value.low, value.high]}
            return value

        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: plain(value) for name, value in fields.items()}


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


def mean_reward(
    prompts: Sequence[str],
    responses: Responses,
    judge: judges.Judge,
    *,
    confidence: float = 0.95,
) -> Interval:
    """Mean score of responses; samples of one prompt form one cluster.

    Args:
      prompts: texts.
      responses: per prompt a text, or several samples.
      judge: ``(prompt, response) -> float``.
      confidence: two-sided level.

    Returns:
      An ``Interval``.

    >>> mean_reward(["p", "q"], ["a", "bbb"], lambda prompt, text: len(text)).mean
    2.0
    """
    listed = _samples("responses", prompts, responses)
    scores = [
        judges.score(judge, prompt, text)
        for prompt, samples in zip(prompts, listed, strict=True)
        for text in samples
    ]
    clusters = np.repeat(np.arange(len(prompts)), [len(s) for s in listed])
    return mean_with_ci(scores, clusters, confidence=confidence)


def compare_responses(
    prompts: Sequence[str],
    responses_a: Responses,
    responses_b: Responses,
    judge: judges.Judge,
    *,
    confidence: float = 0.95,
) -> Comparison:
    """Compares two models' responses to the same prompts.

    A scoring judge is called once per response, and every sample of A is compared with
    every sample of B on the same prompt. A pairwise judge is called in both orders for
    sample ``i`` of A against sample ``i`` of B.

    Args:
      prompts: texts; each is one independent unit.
      responses_a: per prompt a text, or several samples.
      responses_b: the same for model B.
      judge: scoring or pairwise, see ``jaxalign.evaluation.judges``.
      confidence: two-sided level of all intervals.

    Returns:
      A ``Comparison``.

    >>> longer = lambda prompt, response: len(response)
    >>> compare_responses(["p", "q"], ["aa", "b"], ["a", "b"], longer).wins
    1
    """
    a = _samples("responses_a", prompts, responses_a)
    b = _samples("responses_b", prompts, responses_b)
    if not prompts:
        raise ValueError("A comparison needs at least one prompt, got none.")
    compare_all = _pairwise if judges.is_pairwise(judge) else _scored
    # Per prompt: an array of A's results against B, 1 win, 0 loss, 0.5 tie.
    results, extra = compare_all(prompts, a, b, judge, confidence)
    flat = np.concatenate(results)
    wins = sum(float(np.mean(r)) for r in results)
    return Comparison(
        win_rate=wilson_interval(
            min(wins, len(prompts)), len(prompts), confidence=confidence
        ),
        wins=int(np.sum(flat > 0.5)),
        ties=int(np.sum(flat == 0.5)),
        losses=int(np.sum(flat < 0.5)),
        num_prompts=len(prompts),
        **extra,
    )


def _scored(prompts, a, b, judge, confidence):
    scores_a, scores_b = (
        [
            np.array([judges.score(judge, prompt, text) for text in samples])
            for prompt, samples in zip(prompts, side, strict=True)
        ]
        for side in (a, b)
    )
    results = [
        ((np.sign(x[:, None] - y[None, :]) + 1.0) / 2.0).ravel()
        for x, y in zip(scores_a, scores_b, strict=True)
    ]

    def mean(scores):
        clusters = np.repeat(np.arange(len(scores)), [len(s) for s in scores])
        return mean_with_ci(np.concatenate(scores), clusters, confidence=confidence)

    differences = [x.mean() - y.mean() for x, y in zip(scores_a, scores_b, strict=True)]
    return results, {
        "reward_a": mean(scores_a),
        "reward_b": mean(scores_b),
        "reward_difference": mean_with_ci(differences, confidence=confidence),
    }


def _pairwise(prompts, a, b, judge, confidence):
    del confidence
    results, biases = [], []
    for i, (prompt, x, y) in enumerate(zip(prompts, a, b, strict=True)):
        if len(x) != len(y):
            raise ValueError(
                "A pairwise judge compares sample i of A with sample i of B: expected "
                f"equal numbers, got {len(x)} and {len(y)} for prompt {i}."
            )
        asked = [
            judges.preference(judge, prompt, text_a, text_b)
            for text_a, text_b in zip(x, y, strict=True)
        ]
        results.append(np.array([preference for preference, _ in asked]))
        biases += [bias for _, bias in asked]
    return results, {"position_bias": float(np.mean(biases))}
