"""From samples to training rows: what a judge said of them, asked once and kept.

A verdict is written down as soon as it is there, so that a judge that is noisy, slow or
paid for is asked once, whatever stops the command that asks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign import judges
from jaxalign.data.cache import file_sha256
from jaxalign.data.jsonl import json_line
from jaxalign.inference import outputs

SCHEMAS = ("preference", "trajectory", "supervised")  # what judged samples give


def _groups(path: Path) -> Iterator[tuple[str, list[str]]]:
    """``(prompt, responses)`` of a file of samples, equal responses once."""
    with open(path, encoding="utf-8") as file:
        group: list[str] = []
        prompt = None
        for line in map(json.loads, file):
            if line["sample"] == 0 and prompt is not None:
                yield prompt, list(dict.fromkeys(group))
                group = []
            prompt = line["prompt"]
            group.append(line["response"])
        if prompt is not None:
            yield prompt, list(dict.fromkeys(group))


def judged(
    samples: Path, path: Path, judge: judges.Judge | judges.PairwiseJudge
) -> list[dict[str, Any]]:
    """The verdicts on a file of samples; see `verdicts`.

    Args:
      samples: as `jaxalign generate` writes them.
      path: where they are kept; the same call after a kill asks for the rest.
      judge: see `verdicts`.

    Raises:
      ValueError: when `path` holds verdicts on other samples or of another judge.
    """
    key = {"samples": file_sha256(samples), "judge": judge.fingerprint}
    if not outputs.finished(path, key):
        groups = list(_groups(samples))
        with outputs.open_partial(path) as file:
            kept = _kept(outputs.partial_path(path).read_bytes(), groups)
            file.truncate(sum(map(len, kept)))
            file.seek(0, 2)
            for verdict in verdicts(groups[len(kept) :], judge):
                file.write(json_line(verdict).encode("utf-8"))
                file.flush()
        outputs.finish(path, key)
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def _kept(content: bytes, groups: list[tuple[str, list[str]]]) -> list[bytes]:
    """The whole lines of unfinished verdicts that are about these groups."""
    lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
    kept = []
    for line, group in zip(lines, groups, strict=False):
        found = json.loads(line)
        if (found["prompt"], found["responses"]) != (group[0], _worth(group[1])):
            break
        kept.append(line)
    return kept


def _worth(responses: Iterable[str]) -> list[str]:
    # Neither is an empty text one to learn to prefer, nor may a data file hold one.
    return [text for text in responses if text.strip()]


def verdicts(
    groups: Iterable[tuple[str, Sequence[str]]],
    judge: judges.Judge | judges.PairwiseJudge,
) -> Iterator[dict[str, Any]]:
    """``{"prompt", "responses", "scores"}`` of each group, empty responses left out.

    Args:
      groups: ``(prompt, distinct responses)``.
      judge: scores a response, or prefers one of two; then a response's score is its
        mean preference over the others. None where it has no verdict.

    >>> right = judges.from_function(lambda p, r: r == "4")
    >>> list(verdicts([("2+2?", ["4", " "])], right))
    [{'prompt': '2+2?', 'responses': ['4'], 'scores': [1.0]}]
    """
    for prompt, responses in groups:
        texts = _worth(responses)
        (found,) = judges.verdicts([(prompt, texts)], judge)
        # As the shortest number that is the same in float32.
        scores = [None if np.isnan(s) else float(str(s)) for s in found]
        yield {"prompt": prompt, "responses": texts, "scores": scores}


def judged_rows(
    groups: Iterable[tuple[str, Sequence[str]]],
    judge: judges.Judge | judges.PairwiseJudge,
    schema: str,
) -> tuple[list[dict[str, Any]], float, int]:
    """Training rows of a schema from responses; see `verdicts` and `training_rows`.

    >>> groups = [("2+2?", ["4", "5", "four"])]
    >>> right = judges.from_function(lambda p, r: r == "4")
    >>> rows, mean, tied = judged_rows(groups, right, "preference")
    >>> rows
    [{'prompt': '2+2?', 'chosen': '4', 'rejected': '5', 'margin': 1.0}]
    """
    return training_rows(verdicts(groups, judge), schema)


def training_rows(
    judged: Iterable[Mapping[str, Any]], schema: str
) -> tuple[list[dict[str, Any]], float, int]:
    """Training rows from verdicts.

    Args:
      judged: ``{"prompt", "responses", "scores"}`` each.
      schema: ``"preference"``: the best against the worst response, with the
        difference of their scores as the margin; ``"trajectory"``: every response with
        its score as the reward; ``"supervised"``: the best response.

    Returns:
      ``(rows, mean score of all responses, prompts whose responses tie)``.

    Raises:
      ValueError: for another schema.
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
        scored = zip(verdict["responses"], verdict["scores"], strict=True)
        kept = [(text, score) for text, score in scored if score is not None]
        prompt = verdict["prompt"]
        responses, scores = [text for text, _ in kept], [score for _, score in kept]
        if not responses:
            tied += 1
            continue
        all_scores += scores
        best, worst = int(np.argmax(scores)), int(np.argmin(scores))
        if schema == "trajectory":
            rows += (
                {"prompt": prompt, "completion": text, "reward": score}
                for text, score in zip(responses, scores, strict=True)
            )
        elif scores[best] == scores[worst]:
            tied += 1
        elif schema == "preference":
            rows.append(
                {
                    "prompt": prompt,
                    "chosen": responses[best],
                    "rejected": responses[worst],
                    "margin": scores[best] - scores[worst],
                }
            )
        else:
            rows.append({"prompt": prompt, "completion": responses[best]})
    return rows, float(np.mean(all_scores)) if all_scores else float("nan"), tied
