"""From samples to training rows, by way of what a judge said of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.evaluation import judges
from jaxalign.inference import outputs

SCHEMAS = ("preference", "trajectory", "supervised")  # what judged samples give


class Judge:
    """The judge that a text names, asked about groups of responses.

    Attributes:
      fingerprint: tells one judge from another.
    """

    def __init__(self, name: str):
        self._judge = judges.resolve_callable(name)
        self.fingerprint = outputs.function_key(name, self._judge)

    def __call__(self, prompt: str, responses: Sequence[str]) -> list[float]:
        """A score each; of a pairwise judge, the mean preference over the others."""
        if not judges.is_pairwise(self._judge):
            return [judges.score(self._judge, prompt, text) for text in responses]
        wins: Mapping[int, list[float]] = {i: [] for i in range(len(responses))}
        for a, b in itertools.combinations(range(len(responses)), 2):
            pair = responses[a], responses[b]
            preferred, _ = judges.preference(self._judge, prompt, *pair)
            wins[a].append(preferred)
            wins[b].append(1.0 - preferred)
        return [float(np.mean(found)) if found else 0.5 for found in wins.values()]


def verdicts(
    groups: Iterable[tuple[str, Sequence[str]]], judge: Judge
) -> list[dict[str, Any]]:
    """``{"prompt", "responses", "scores"}`` of each group of responses to a prompt."""
    return [
        {"prompt": prompt, "responses": texts, "scores": judge(prompt, texts)}
        for prompt, texts in groups
    ]


def groups(samples: Path) -> list[tuple[str, list[str]]]:
    """Prompts with their distinct responses, of a file that `generate` wrote.

    Empty responses are left out: none is one to learn to prefer, nor may a data file
    hold one.
    """
    found: list[tuple[str, dict[str, None]]] = []
    with open(samples, encoding="utf-8") as file:
        for line in map(json.loads, file):
            if line["sample"] == 0:
                found.append((line["prompt"], {}))
            if line["response"].strip():
                found[-1][1][line["response"]] = None
    return [(prompt, list(texts)) for prompt, texts in found]


def training_rows(
    judged: Iterable[Mapping[str, Any]], schema: str
) -> tuple[list[dict[str, Any]], float, int]:
    """Training rows from verdicts.

    Args:
      judged: ``{"prompt", "responses", "scores"}`` each; a score that is null or NaN
        is no verdict, and its response is left out.
      schema: ``"preference"``: the best against the worst response, with the
        difference of their scores as the margin; ``"trajectory"``: every response with
        its score as the reward; ``"supervised"``: the best response.

    Returns:
      ``(rows, mean score of all responses, prompts whose responses tie)``.

    Raises:
      ValueError: for another schema.

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
        given = [
            (score, text)
            for score, text in zip(verdict["scores"], verdict["responses"], strict=True)
            if score is not None and score == score
        ]
        if not given:
            tied += 1
            continue
        all_scores += [score for score, _ in given]
        best, worst = max(given, key=_score), min(given, key=_score)
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


def _score(given: tuple[float, str]) -> float:
    return given[0]
