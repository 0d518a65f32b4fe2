"""Warnings when a run shows a failure that the literature knows, and what helps.

The loop hands over what it logs; each symptom is told once. What was told is in the
run's manifest and on its report page.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_log = logging.getLogger(__name__)

Numbers = Mapping[str, float]


class Symptom(NamedTuple):
    """A known failure."""

    name: str  # in the manifest
    shows: Callable[[Numbers, Numbers], bool]  # given the first and the current numbers
    advice: str  # what is happening and what to change
    lasting: int = 1  # for how many checks in a row it has to show


def _grown(first: Numbers, now: Numbers, name: str, factor: float) -> bool:
    if name not in first or name not in now:
        return False
    return now[name] > factor * first[name] > 0


def _finite(numbers: Numbers) -> dict[str, float]:
    return {n: float(v) for n, v in numbers.items() if math.isfinite(v)}


SYMPTOMS = (
    Symptom(
        "chosen_less_likely_samples_longer",
        lambda first, now: (
            _grown(first, now, "nll/chosen", 1.1)
            and _grown(first, now, "samples/length", 1.2)
        ),
        "The chosen responses lose probability while samples grow longer: the policy "
        "moves to text that no pair speaks of. Raise BETA or lower LEARNING_RATE, add "
        "likelihood (runs/dpo_nll.gin), anchor the chosen side (runs/apo_zero.gin), or "
        "set LENGTH_PENALTY.",
    ),
    Symptom(
        "reference_point_clamped",
        lambda _, now: (
            now.get("reference_point") == 0.0
            and now.get("reference_point/unclamped", 0.0) < -1.0
        ),
        "KTO's reference point sits at 0 while its unclamped value is below -1 nat: "
        "the policy finds mismatched responses ever less likely and the clamp hides "
        "it. Lower LEARNING_RATE or raise BETA; look at 'reference_point/unclamped'.",
        lasting=5,
    ),
    Symptom(
        "log_ratios_rule_the_residual",
        lambda _, now: now.get("log_ratios/pull/p50", 0.0) > 10.0,
        "For half of the responses, tau times the log-ratio is more than ten times the "
        "reward's residual r - V: the regression follows the log-ratios, not the "
        "rewards. Lower TAU or LEARNING_RATE; look at 'log_ratios/pull'.",
        lasting=3,
    ),
)


class Watch:
    """Tells each symptom of a run once.

    >>> watch = Watch()
    >>> watch.check({"log_ratios/pull/p50": 12.0})
    []
    >>> for _ in range(2):
    ...     found = watch.check({"log_ratios/pull/p50": 12.0})
    >>> found
    ['log_ratios_rule_the_residual']
    """

    def __init__(self, symptoms: tuple[Symptom, ...] = SYMPTOMS):
        self._symptoms = symptoms
        self._first: dict[str, float] = {}
        self._latest: dict[str, float] = {}
        self._counts = dict.fromkeys((s.name for s in symptoms), 0)
        self.told: list[str] = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON: a resumed run tells nothing twice."""
        return {
            "first": _finite(self._first),
            "latest": _finite(self._latest),
            "counts": dict(self._counts),
            "told": list(self.told),
        }

    def resume(self, saved: Mapping[str, Any]) -> None:
        """Goes on from a `state`."""
        self._first = dict(saved["first"])
        self._latest = dict(saved["latest"])
        self._counts |= {n: c for n, c in saved["counts"].items() if n in self._counts}
        self.told = list(saved["told"])

    def check(self, numbers: Numbers) -> list[str]:
        """Takes numbers just measured; names the symptoms that show for the first time.

        Numbers that are measured rarely, such as a sample's length, count until they
        are measured again.
        """
        for name, value in numbers.items():
            self._first.setdefault(name, value)
            self._latest[name] = value
        new = []
        for symptom in self._symptoms:
            if symptom.name in self.told:
                continue
            showing = symptom.shows(self._first, self._latest)
            self._counts[symptom.name] = showing * (self._counts[symptom.name] + 1)
            if self._counts[symptom.name] >= symptom.lasting:
                _log.warning("%s", symptom.advice)
                self.told.append(symptom.name)
                new.append(symptom.name)
        return new
