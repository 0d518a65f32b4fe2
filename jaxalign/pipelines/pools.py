"""The stages of a round of `west_of_n`: functions of files and rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign import judges
from jaxalign.data import jsonl
from jaxalign.pipelines import selection
from jaxalign.pipelines.held_out import SIDES, SOURCE

ONE, TIE = "one distinct response", "tie"  # why a pool gives no pair
UNSURE, UNLIKELY, UNEVEN = "confidence", "likelihood", "shares of sources"


def pools(samples: Path) -> list[dict[str, Any]]:
    """``{"prompt", "responses", "n"}`` of what `generate` wrote, and its source.

    Responses are distinct, in the order that they were drawn; ``n`` were.
    """
    found: list[tuple[dict[str, Any], list[str | None]]] = []
    for line in jsonl.read_rows(samples):
        if line["sample"] == 0:
            kept = {k: line[k] for k in ("prompt", SOURCE) if k in line}
            found.append((kept, []))
        found[-1][1].append(line["response"])
    return [
        {**own, "responses": selection.distinct(texts), "n": len(texts)}
        for own, texts in found
    ]


def selected(
    items: Sequence[Mapping[str, Any]], judge: judges.Judge | judges.PairwiseJudge
) -> list[dict[str, Any]]:
    """Each pool with ``best``, ``worst`` and ``p_conf``, or why it is ``dropped``.

    Of a judge that scores, ``scores`` has all; one that compares holds a tournament,
    each match in both orders.

    Raises:
      ValueError: for a response without a verdict, by its prompt.
    """
    found = [dict(item) for item in items]
    open_ = [i for i, item in enumerate(found) if len(item["responses"]) > 1]
    for item in found:
        if len(item["responses"]) < 2:
            item["dropped"] = ONE
    groups = [(found[i]["prompt"], found[i]["responses"]) for i in open_]
    if judges.is_pairwise(judge):
        _matched([found[i] for i in open_], groups, judge)
        return found
    for i, given in zip(open_, judges.verdicts(groups, judge), strict=True):
        item = found[i]
        item["scores"] = [None if s != s else float(str(s)) for s in given]
        try:
            ends = selection.extremes(given)
        except ValueError as error:
            raise ValueError(
                f"The reward model has no verdict on a pool: {error} Its prompt is "
                f"{item['prompt'][:80]!r}. Look at the judge: what it cannot score is "
                "not to be learnt from."
            ) from None
        if ends is None:
            item["dropped"] = TIE
            continue
        best, worst = ends
        item |= {"best": best, "worst": worst}
        item["p_conf"] = selection.confidence(given[best], given[worst])
    return found


def _matched(
    found: Sequence[dict[str, Any]],
    groups: Sequence[tuple[str, Sequence[str]]],
    judge: judges.PairwiseJudge,
) -> None:
    def prefer(asked: selection.Asked) -> np.ndarray:
        texts = [(groups[g][0], groups[g][1][i], groups[g][1][j]) for g, i, j in asked]
        preferred, _ = judges.preferences(judge, *map(list, zip(*texts, strict=True)))
        for (prompt, _, _), value in zip(texts, preferred, strict=True):
            if value != value:
                raise ValueError(
                    "The reward model has no verdict on two responses to the prompt "
                    f"{prompt[:80]!r}: what it cannot compare is not to be learnt from."
                )
        return preferred

    ends = selection.tournament([len(texts) for _, texts in groups], prefer)
    finals = [(g, *pair) for g, pair in enumerate(ends) if pair is not None]
    sure = dict(zip(finals, prefer(finals) if finals else [], strict=True))
    for item in found:
        item["dropped"] = TIE
    for (g, best, worst), value in sure.items():
        if value > 0.5:
            del found[g]["dropped"]
            found[g] |= {"best": best, "worst": worst, "p_conf": float(value)}


def candidates(chosen: Path) -> list[dict[str, Any]]:
    """The pairs of the pools that were not dropped."""
    return [
        {
            "prompt": row["prompt"],
            "chosen": row["responses"][row["best"]],
            "rejected": row["responses"][row["worst"]],
            "p_conf": row["p_conf"],
            "n": row["n"],
            **{k: row[k] for k in (SOURCE,) if k in row},
        }
        for row in jsonl.read_rows(chosen)
        if "dropped" not in row
    ]


def likely(
    items: Sequence[Mapping[str, Any]], judge: judges.Judge
) -> list[dict[str, Any]]:
    """Each pair with the log-probabilities of both responses under the policy.

    Sums over tokens at temperature 1, whatever the temperature of the samples.
    """
    prompts = [item["prompt"] for item in items]
    texts = [item[side] for side in ("chosen", "rejected") for item in items]
    both = np.split(judges.scores(judge, prompts * 2, texts), 2)
    return [
        {**item, "logp_chosen": float(str(a)), "logp_rejected": float(str(b))}
        for item, a, b in zip(items, *both, strict=True)
    ]


def write_kept(output: Path, found: Path, confidence: float, likelihood: float) -> None:
    """The pairs that pass the filters; the rest, with why, in ``*.left.jsonl``."""
    rows, left = filtered(jsonl.read_rows(found), confidence, likelihood)
    jsonl.write_rows(output.with_suffix(".left.jsonl"), left)
    jsonl.write_rows(output, rows)


def filtered(
    rows: Sequence[Mapping[str, Any]], confidence: float, likelihood: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Pairs to learn from, and those left out with ``dropped``.

    Args:
      rows: of `likely`.
      confidence: quantile of ``p_conf`` that a pair must reach.
      likelihood: quantile that the less likely of its responses must reach.
    """
    sure = selection.at_least([r["p_conf"] for r in rows], confidence)
    least = [min(r["logp_chosen"], r["logp_rejected"]) for r in rows]
    usual = selection.at_least(least, likelihood)
    why = [
        None if a and b else UNSURE if not a else UNLIKELY
        for a, b in zip(sure, usual, strict=True)
    ]
    if rows and SOURCE in rows[0]:
        passed = [i for i, reason in enumerate(why) if reason is None]
        passed.sort(key=lambda i: (-rows[i]["p_conf"], i))
        before = [row[SOURCE] for row in rows]
        kept = selection.rebalanced(before, [before[i] for i in passed])
        for place in {*range(len(passed))} - {*kept}:
            why[passed[place]] = UNEVEN
    kept_rows = [
        {**row, "source": "west_of_n"}
        for row, reason in zip(rows, why, strict=True)
        if reason is None
    ]
    left = [
        {**row, "dropped": reason}
        for row, reason in zip(rows, why, strict=True)
        if reason is not None
    ]
    return kept_rows, left


def write_mixture(
    output: Path, human: Path, chosen: Path, kept: Path, seed: int
) -> None:
    """Human and synthetic pairs in equal numbers, shuffled, each with its source."""
    synthetic = [
        {k: row[k] for k in (*SIDES, "source")} for row in jsonl.read_rows(kept)
    ]
    if not synthetic:
        told = ", ".join(f"{k}: {v}" for k, v in counts(chosen, kept).items())
        raise ValueError(
            f"{output.parent.name}: no pool gave a pair to learn from ({told}). Give a "
            "higher --temperature, more --num_samples or lower quantiles, or look at "
            "the reward model."
        )
    people = [
        {**{k: row[k] for k in SIDES}, "source": "human"}
        for row in jsonl.read_rows(human)
    ]
    jsonl.write_rows(output, selection.mixture(people, synthetic, seed))


def counts(chosen: Path, kept: Path) -> dict[str, int]:
    """How many pools there were, what became of them, and how many are left."""
    rows = jsonl.read_rows(chosen)
    left = jsonl.read_rows(kept.with_suffix(".left.jsonl"))
    why = Counter(row["dropped"] for row in (*rows, *left) if "dropped" in row)
    return {"pools": len(rows), **why, "pairs": len(jsonl.read_rows(kept))}
