"""Best-of-n curves of reward models over pools of responses, by a gold judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign import judges
from jaxalign.data import jsonl
from jaxalign.data.bad_rows import show
from jaxalign.evaluation import best_of

Pool = tuple[str, list[str]]


def read(path: str) -> list[Pool]:
    """Pools of a file: a row each, or the lines that `generate` wrote.

    Rows have ``prompt`` and ``responses``, or ``prompt``, ``response`` and ``sample``,
    whose 0 begins a pool. Equal responses stay: a pool is drawn, and how often the same
    was drawn counts.

    Raises:
      ValueError: naming the line that is neither.
    """
    found: list[Pool] = []
    for line, row in enumerate(jsonl.read_rows(path), 1):
        row = row if isinstance(row, Mapping) else {}
        prompt, many = row.get("prompt"), row.get("responses")
        one, sample = row.get("response"), row.get("sample")
        if isinstance(prompt, str) and isinstance(many, list):
            texts = many
        elif isinstance(prompt, str) and isinstance(sample, int):
            texts = [one]
        else:
            texts = [None]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{path}: line {line} is no pool: expected prompt and responses, a "
                "list of texts, or prompt, response and sample as `generate` writes "
                f"them; got {show(dict(row))}."
            )
        if many is None and sample and found and found[-1][0] == prompt:
            found[-1][1].append(one)
        else:
            found.append((prompt, list(texts)))
    if not found:
        raise ValueError(f"{path} holds no pools.")
    return found


def curves(
    pools: Sequence[Pool],
    scorers: Mapping[str, judges.Judge],
    gold: judges.Judge | None,
) -> dict[str, Any]:
    """``{"pools", "left_out", "n", "kl", "models": {name: {"own", "gold", "peak"}}}``.

    Numbers are in deviations from the mean of all samples' scores, so that models and
    the gold judge have one scale; the gold judge's own curve is what a perfect model
    would gain. Prompts on whose pool one of them has no verdict are left out, for all
    alike.

    Raises:
      ValueError: when no pool of two samples is left.
    """
    if gold is not None and judges.is_pairwise(gold):
        raise ValueError(
            "The gold judge compares two responses: a best-of-n curve needs a score."
        )
    asked = {**scorers, "gold": gold} if gold is not None else dict(scorers)
    pools = [pool for pool in pools if len(pool[1]) > 1]
    scores = {name: judges.verdicts(pools, judge) for name, judge in asked.items()}
    kept = [
        i
        for i in range(len(pools))
        if all(np.isfinite(s[i]).all() for s in scores.values())
    ]
    if not kept:
        raise ValueError(
            f"None of {len(pools)} pools of at least two responses has a verdict of "
            f"{', '.join(asked)} on each: there is no best-of-n curve."
        )
    standard = {name: _standard([s[i] for i in kept]) for name, s in scores.items()}
    told: dict[str, Any] = {
        "pools": len(kept),
        "left_out": len(pools) - len(kept),
        "models": {},
    }
    for name, own in standard.items():
        found = best_of.curve(own, own)
        told["models"][name] = {"own": found.to_json()}
        if gold is not None and name != "gold":
            true = best_of.curve(own, standard["gold"])
            told["models"][name] |= {"gold": true.to_json(), "peak": true.peak}
    return told


def _standard(scores: Sequence[np.ndarray]) -> list[np.ndarray]:
    every = np.concatenate(scores).astype(np.float64)
    spread = every.std() or 1.0
    return [(s.astype(np.float64) - every.mean()) / spread for s in scores]
