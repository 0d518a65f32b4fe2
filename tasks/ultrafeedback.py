"""UltraFeedback: four models' answers to a prompt, rated by a model (2310.01377)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxalign.data.bad_rows import FieldError, OptionError, nearest
from jaxalign.prepare.tasks import add_task, as_rows

_RATED = ("helpfulness", "honesty", "instruction_following", "truthfulness")
ASPECTS = ("overall", *_RATED, "mean")


def rating(completion: Mapping[str, Any], aspect: str) -> float | None:
    """A completion's score for an aspect; None where the annotator gave none.

    Args:
      completion: with ``overall_score`` (1 to 10) and ``annotations`` (1 to 5 each).
      aspect: one of ``ASPECTS``; ``mean`` averages the four rated ones.
    """
    if aspect not in ASPECTS:
        close = nearest(aspect, ASPECTS)
        raise OptionError(f"aspect must be one of {ASPECTS}, got {aspect!r}{close}.")
    if aspect == "overall":
        return _number(completion["overall_score"], "overall_score")
    annotations = completion["annotations"]
    found = [
        _number(annotations[name]["Rating"], f"annotations.{name}.Rating")
        for name in (_RATED if aspect == "mean" else (aspect,))
    ]
    return None if None in found else sum(found) / len(found)


def _number(value: Any, field: str) -> float | None:
    if value in (None, "", "N/A"):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise FieldError(field, "type", "a number or 'N/A'", repr(value)) from None
    return None if math.isnan(number) else number


def _rated(raw: Mapping[str, Any], aspect: str) -> list[tuple[float | None, str]]:
    return [(rating(c, aspect), c["response"]) for c in as_rows(raw["completions"])]


def trajectories(
    raw: Mapping[str, Any], *, aspect: str = "overall"
) -> list[dict[str, Any] | None]:
    """Every completion with its rating as the reward; unrated ones are left out."""
    return [
        None
        if score is None
        else {"prompt": raw["instruction"], "completion": text, "reward": score}
        for score, text in _rated(raw, aspect)
    ]


def preferences(
    raw: Mapping[str, Any], *, aspect: str = "overall", pairs: str = "best_worst"
) -> list[dict[str, Any]]:
    """The best against the worst completion, or all pairs that differ in rating.

    The margin is the difference of the ratings. Rows of one rating give no pair.
    """
    if pairs not in ("best_worst", "all"):
        raise OptionError(f"pairs must be 'best_worst' or 'all', got {pairs!r}.")
    rated = [(s, text) for s, text in _rated(raw, aspect) if s is not None]
    rated.sort(key=lambda item: -item[0])  # stable: ties keep the file's order
    if pairs == "best_worst":
        chosen = [(rated[0], rated[-1])] if rated else []
    else:
        chosen = [(a, b) for i, a in enumerate(rated) for b in rated[i + 1 :]]
    return [
        {
            "prompt": raw["instruction"],
            "chosen": a[1],
            "rejected": b[1],
            "margin": a[0] - b[0],
        }
        for a, b in chosen
        if a[0] > b[0]
    ]


def demonstrations(
    raw: Mapping[str, Any], *, aspect: str = "overall"
) -> list[dict[str, Any]]:
    """The completion with the highest rating."""
    rated = [(s, text) for s, text in _rated(raw, aspect) if s is not None]
    if not rated:
        return []
    best = max(rated, key=lambda item: item[0])
    return [{"prompt": raw["instruction"], "completion": best[1]}]


add_task(
    "ultrafeedback",
    doc="UltraFeedback: prompts with four rated completions (aspects to choose from).",
    records={
        "supervised": demonstrations,
        "trajectory": trajectories,
        "preference": preferences,
    },
    source="huggingface:openbmb__ultrafeedback",
)
