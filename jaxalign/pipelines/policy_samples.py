"""The stages of `meta_rm`, functions that write a file each, and what they measure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxalign.data import jsonl, records
from jaxalign.evaluation import intervals
from jaxalign.pipelines import verdicts


def prompt_rows(texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"prompt": text} for text in texts]


def write_pairs(output: Path, data: Path, columns: Sequence[str]) -> None:
    """``{"prompt", "pairs"}`` of preferences, one each."""
    rows = []
    for example in records.load(data, "preference")[0]:
        known = {n: example.raw.get(n) for n in columns}
        own = {n: float(value) for n, value in known.items() if value is not None}
        for record in example.records:
            pair = {k: record[k] for k in ("chosen", "rejected", "margin")}
            pair |= {**own, "pair_samples": 0}
            rows.append({"prompt": record["prompt"], "pairs": [pair]})
    jsonl.write_rows(output, rows)


def write_data(output: Path, pairs: Path, samples: Path) -> None:
    """The preferences, and as often all pairs of a prompt's different samples.

    About half of a batch is of either; where there are fewer prompts with samples than
    preferences, they come again.
    """
    groups = [(p, texts) for p, texts in verdicts.groups(samples) if len(texts) > 1]
    if not groups:
        raise ValueError(
            f"{output.parent.name}: no prompt has two different samples, so there is "
            "nothing to tell apart. Give a higher --temperature or more --num_samples."
        )
    drawn = [
        {
            "prompt": prompt,
            "pairs": [
                {"chosen": a, "rejected": b, "margin": 0, "pair_samples": len(texts)}
                for a, b in itertools.combinations(texts, 2)
            ],
        }
        for prompt, texts in groups
    ]
    rows = jsonl.read_rows(pairs)
    again = itertools.islice(itertools.cycle(drawn), max(len(rows), len(drawn)))
    jsonl.write_rows(output, [*rows, *again])


def write_judged(output: Path, judged: Path, schema: str) -> None:
    """What the policy learns from: `verdicts.training_rows`."""
    rows, _, _ = verdicts.training_rows(jsonl.read_rows(judged), schema)
    if not rows:
        raise ValueError(
            f"{output.parent.name}: the reward model told no two samples apart, so "
            "there is nothing for the policy to learn from."
        )
    jsonl.write_rows(output, rows)


def apart(judged: Path) -> float:
    """The mean distance of two samples' scores, over prompts with two that have one.

    Scores are in units of their deviation over the reward model's own preferences.
    """
    found = []
    for row in jsonl.read_rows(judged):
        scores = np.array([s for s in row["scores"] if s is not None], np.float64)
        if len(scores) > 1:
            one, other = np.triu_indices(len(scores), 1)
            found.append(np.abs(scores[one] - scores[other]).mean())
    return float(np.mean(found)) if found else float("nan")


def accuracy(judged: Path) -> intervals.Interval:
    """How often the chosen response of a held-out pair has the higher score."""
    scores = [row["scores"] for row in jsonl.read_rows(judged)]
    known = [(a, b) for a, b in scores if a is not None and b is not None]
    return intervals.wilson_interval(sum(a > b for a, b in known), len(known))
