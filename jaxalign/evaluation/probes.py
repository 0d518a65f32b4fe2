"""Changes to a response that say nothing new: what a good reward model hardly notices.

Each takes a text and gives another; `FORMATS` lists them by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxalign.evaluation.intervals import wilson_interval


def _sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]


def as_list(text: str) -> str:
    """Sentences as the points of a list.

    >>> as_list("One. Two.")
    '- One. - Two.'
    """
    return " ".join(f"- {sentence}" for sentence in _sentences(text))


def bold(text: str) -> str:
    """The first sentence in Markdown's bold type.

    >>> bold("One. Two.")
    '**One.** Two.'
    """
    first, *rest = _sentences(text) or [""]
    return " ".join([f"**{first}**", *rest])


def capitals(text: str) -> str:
    """In capital letters."""
    return text.upper()


def polite(text: str) -> str:
    """With a friendly ending.

    >>> polite("One.")
    'One. I hope this helps!'
    """
    return f"{text.rstrip()} I hope this helps!"


def twice(text: str) -> str:
    """Said twice."""
    return f"{text.rstrip()} {text.lstrip()}"


FORMATS: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {
        "list": as_list,
        "bold": bold,
        "capitals": capitals,
        "polite ending": polite,
        "said twice": twice,
    }
)


def effect(
    chosen: np.ndarray, rejected: np.ndarray, changed: np.ndarray
) -> dict[str, Any]:
    """What a change to the rejected response does to verdicts.

    Args:
      chosen, rejected: scores of pairs.
      changed: of the rejected responses, changed.

    Returns:
      ``{"pairs", "shift", "flipped", "ci95"}``: the mean change of the score in
      deviations of all scores, and the share of right verdicts that become wrong.
    """
    there = np.isfinite(chosen) & np.isfinite(rejected) & np.isfinite(changed)
    chosen, rejected, changed = (
        np.asarray(s, np.float64)[there] for s in (chosen, rejected, changed)
    )
    spread = float(np.std([*chosen, *rejected])) if chosen.size else 0.0
    shift = float((changed - rejected).mean()) / spread if spread else None
    was = chosen > rejected
    told: dict[str, Any] = {"pairs": int(was.sum()), "shift": shift}
    if not was.any():
        return {**told, "flipped": None, "ci95": None}
    found = wilson_interval(int((changed[was] > chosen[was]).sum()), int(was.sum()))
    return {**told, "flipped": found.mean, "ci95": [found.low, found.high]}
