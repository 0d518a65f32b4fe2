"""From samples to training rows, by way of what a judge said of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign import judges
from jaxalign.data import jsonl

SCHEMAS = ("preference", "trajectory", "supervised")  # what judged samples give


def verdicts(
    groups: Iterable[tuple[str, Sequence[str]]],
    judge: judges.Judge | judges.PairwiseJudge,
) -> list[dict[str, Any]]:
    """``{"prompt", "responses", "scores"}`` of each group of responses to a prompt.

    A score is None where the judge has no verdict; that of a judge which compares is
    the mean preference over the group's others.

    >>> right = judges.from_function(lambda p, r: r == "4")
    >>> verdicts([("2+2?", ["4", "5"])], right)
    [{'prompt': '2+2?', 'responses': ['4', '5'], 'scores': [1.0, 0.0]}]
    """
    groups = list(groups)
    found, given = [], judges.verdicts(groups, judge)
    for (prompt, texts), own in zip(groups, given, strict=True):
        # As the shortest number that is the same in float32.
        scores = [None if np.isnan(s) else float(str(s)) for s in own]
        found.append({"prompt": prompt, "responses": texts, "scores": scores})
    return found


def groups(samples: Path) -> list[tuple[str, list[str]]]:
    """Prompts with their distinct responses, of a file that `generate` wrote.

    Empty responses are left out: none is one to learn to prefer, nor may a data file
    hold one.
    """
    found: list[tuple[str, dict[str, None]]] = []
    for line in jsonl.read_rows(samples):
        if line["sample"] == 0:
            found.append((line["prompt"], {}))
        if line["response"].strip():
            found[-1][1][line["response"]] = None
    return [(prompt, list(texts)) for prompt, texts in found]


def training_rows(
    judged: Iterable[Mapping[str, Any]], schema: str
) -> tuple[list[dict[str, Any]], float, int]:
    """Training rows from verdicts; a response without a score is left out.

    Args:
      judged: ``{"prompt", "responses", "scores"}`` each.
      schema: ``"preference"``: the best against the worst response, with the
        difference of their scores as the margin; ``"trajectory"``: every response with
        its score as the reward; ``"supervised"``: the best response.

    Returns:
      ``(rows, mean score of all responses, prompts whose responses tie)``.

    >>> judged = [{"prompt": "2+2?", "responses": ["4", "5"], "scores": [1.0, 0.0]}]
    >>> training_rows(judged, "preference")[0]
    [{'prompt': '2+2?', 'chosen': '4', 'rejected': '5', 'margin': 1.0}]
    """
    if schema not in SCHEMAS:
        raise ValueError(
            f"Judged samples make no rows of the schema {schema!r}; expected an "
            f"objective of {', '.join(SCHEMAS)}."
        )
    rows: list[dict[str, Any]] = []
    all_scores: list[float] = []
    tied = 0
    for verdict in judged:
        prompt = {"prompt": verdict["prompt"]}
        pairs = zip(verdict["scores"], verdict["responses"], strict=True)
        given = [(s, text) for s, text in pairs if s is not None and s == s]
        if not given:
            tied += 1
            continue
        all_scores += [score for score, _ in given]
        best, worst = max(given, key=itemgetter(0)), min(given, key=itemgetter(0))
        if schema == "trajectory":
            rows += (prompt | {"completion": t, "reward": score} for score, t in given)
        elif best[0] == worst[0]:
            tied += 1
        elif schema == "preference":
            pair = {"chosen": best[1], "rejected": worst[1]}
            rows.append(prompt | pair | {"margin": best[0] - worst[0]})
        else:
            rows.append(prompt | {"completion": best[1]})
    return rows, float(np.mean(all_scores)) if all_scores else float("nan"), tied
