"""GSM8K: grade-school mathematics with worked solutions (arXiv 2110.14168)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxalign.data.bad_rows import OptionError
from jaxalign.prepare.tasks import add_task

_ANNOTATION = re.compile(r"<<(.*?)>>")
_CALCULATOR = {"strip": "", "keep": r"<<\1>>", "brackets": r"[\1]"}


def solution(text: str, calculator: str = "strip") -> str:
    """A worked solution with its ``<<48/2=24>>`` annotations treated.

    Args:
      text: the solution.
      calculator: ``strip`` removes annotations, ``keep`` leaves them, ``brackets``
        writes ``[48/2=24]``, which T5's vocabulary holds.

    >>> solution("half is 48/2=<<48/2=24>>24", "brackets")
    'half is 48/2=[48/2=24]24'
    """
    if calculator not in _CALCULATOR:
        known = list(_CALCULATOR)
        raise OptionError(f"calculator must be one of {known}, got {calculator!r}.")
    return _ANNOTATION.sub(_CALCULATOR[calculator], text)


def demonstrations(
    raw: Mapping[str, Any], *, calculator: str = "strip"
) -> list[dict[str, Any]]:
    """A question and its solution, which ends in ``#### <answer>``."""
    completion = solution(raw["answer"], calculator)
    return [{"prompt": raw["question"], "completion": completion}]


def trajectories(
    raw: Mapping[str, Any], *, calculator: str = "strip"
) -> list[dict[str, Any]]:
    """The published model solutions: right ones are desirable and have reward 1."""
    return [
        {
            "prompt": raw["question"],
            "completion": solution(sample["solution"], calculator),
            "label": sample["is_correct"],
            "reward": float(sample["is_correct"]),
            "metadata": {"ground_truth": raw["ground_truth"]},
        }
        for sample in _samples(raw)
    ]


def _samples(raw: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The models' solutions of a row, ``{"is_correct", "solution"}`` each."""
    samples = [sample for sample in raw.values() if isinstance(sample, Mapping)]
    if not samples:
        raise KeyError("6b_finetuning")
    return samples


def rationales(
    raw: Mapping[str, Any], *, calculator: str = "strip"
) -> list[dict[str, Any]]:
    """Every right model solution over every wrong one; the reference says why."""
    texts: dict[bool, list[str]] = {True: [], False: []}
    for sample in _samples(raw):
        text = solution(sample["solution"], calculator)
        if text not in texts[sample["is_correct"]]:
            texts[sample["is_correct"]].append(text)
    return [
        {
            "prompt": raw["question"],
            "chosen": chosen,
            "rejected": rejected,
            "rationale": solution(raw["ground_truth"], calculator),
        }
        for chosen in texts[True]
        for rejected in texts[False]
    ]


add_task(
    "gsm8k",
    doc="GSM8K: worked solutions; trajectories, pairs and rationales from the file of "
    "model solutions.",
    records={
        "supervised": demonstrations,
        "trajectory": trajectories,
        "rationale": rationales,
    },
    source="gsm8k",
)
