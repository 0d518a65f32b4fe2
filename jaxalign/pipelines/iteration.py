"""``jaxalign iterate``: rounds of sampling, judging and training (iterative DPO).

Each round samples responses to its prompts from the policy of the round before, has a
judge score them, and trains on the result with any offline objective: preference
objectives on the best against the worst response, those of single trajectories on all
of them with their scores (arXiv 2312.11456, 2404.19733). Every piece is an ordinary
resumable one, so the same command after a kill goes on where it stopped.

    run_dir/round1/{samples.jsonl, data.jsonl, train/}, round2/..., rounds.jsonl
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign import configs, models, remote
from jaxalign.data import records
from jaxalign.data.jsonl import json_line
from jaxalign.evaluation import judges
from jaxalign.pipelines import generation
from jaxalign.pipelines.inference import write_jsonl
from jaxalign.training import run_directory
from jaxalign.training import train as loop

_log = logging.getLogger(__name__)

REFERENCES = ("fixed", "refreshed")


def iterate(
    *,
    gin_files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str | Path] = (),
    initial: str,
    prompts: str,
    judge: str,
    run_dir: str,
    rounds: int = 3,
    reference: str = "fixed",
    prompts_per_round: int | None = None,
    num_samples: int = 4,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Trains a policy on its own judged responses, round by round.

    Args:
      gin_files: of the training run, as in ``--gin_file``.
      bindings: ``"NAME = VALUE"`` for it. DATA, MODEL_DIR and both checkpoint paths
        are set here.
      search_paths: folders to look for gin files in.
      initial: the checkpoint to start from.
      prompts: a JSON Lines file with ``prompt``.
      judge: ``"module:function"``, a score or a preference (`jaxalign.evaluation`).
      run_dir: where everything is written.
      rounds: how many.
      reference: the policy that objectives with a reference hold on to: ``"fixed"``,
        the initial one in every round, or ``"refreshed"``, the round's own start.
      prompts_per_round: takes so many prompts each round, one after another and round
        again; None takes all of them every round.
      num_samples: responses per prompt, at least 2.
      temperature: of the samples.
      top_p: of the samples.
      max_new_tokens: of a sample.
      batch_size: prompts decoded at a time.
      seed: of samples and training; round ``n`` uses ``seed + n``.

    Returns:
      One row per round: ``round``, ``policy`` (a run directory), ``sampled_from``,
      ``reward`` (mean score of the samples it was trained on), ``rows`` and ``tied``
      (prompts without a preference).

    Raises:
      ValueError: for an unknown `reference`, fewer than two samples, or a round in
        which no prompt has a preference.
    """
    if reference not in REFERENCES:
        raise ValueError(f"--reference must be one of {REFERENCES}, got {reference!r}.")
    if num_samples < 2:
        raise ValueError(f"--num_samples must be at least 2, got {num_samples}.")
    folder = remote.local_only(run_dir, "--run_dir of several runs").absolute()
    judge_fn = judges.resolve_callable(judge)
    examples, _ = records.load(prompts, "prompts")
    texts = [record["prompt"] for e in examples for record in e.records]
    table: list[dict[str, Any]] = []
    first = initial if remote.is_remote(initial) else str(Path(initial).absolute())
    policy = first
    for number in range(1, rounds + 1):
        home = folder / f"round{number}"
        asked = _slice(texts, number, prompts_per_round)
        _write_prompts(home / "prompts.jsonl", asked)
        samples = home / "samples.jsonl"
        if not samples.exists():
            generation.generate(
                checkpoint=policy,
                prompts=str(home / "prompts.jsonl"),
                output=str(samples),
                num_samples=num_samples,
                temperature=temperature,
                top_p=top_p,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                seed=seed + number,
            )
        own = {
            "DATA": str(home / "data.jsonl"),
            "MODEL_DIR": str(home / "train"),
            "INITIAL_CHECKPOINT_PATH": policy,
            "REFERENCE_CHECKPOINT_PATH": (
                policy if reference == "refreshed" else first
            ),
        }
        lines = [f"{name} = {value!r}" for name, value in own.items()]
        lines.append(f"RANDOM_SEED = {seed + number}")
        configs.parse(gin_files, [*bindings, *lines], search_paths)
        config = configs.config_str()
        run = configs.configured(loop.Run)()
        network = models.describe(run.model)
        _log.info("Network: %s, %s", configs.network(), network)
        schema = run.objective(model=run.model).schema
        rows, reward, tied = judged_rows(_groups(samples), judge_fn, schema)
        if not rows:
            raise ValueError(
                f"Round {number}: the judge told no two responses to any of the "
                f"{len(asked)} prompts apart, so there is nothing to learn from. Give "
                "a higher --temperature or more --num_samples, or look at the judge."
            )
        write_jsonl(own["DATA"], rows)
        table.append(
            {
                "round": number,
                "policy": own["MODEL_DIR"],
                "sampled_from": policy,
                "reward": reward,
                "rows": len(rows),
                "tied": tied,
            }
        )
        _log.info("Round %d: samples score %.4g on average", number, reward)
        loop.train(run, config)
        policy = own["MODEL_DIR"]
        text = "".join(map(json_line, table))
        run_directory.write_atomically(folder / "rounds.jsonl", text)
    return table


def _slice(texts: Sequence[str], number: int, size: int | None) -> list[str]:
    """The prompts of a round, which counts from 1."""
    if size is None:
        return list(texts)
    start = (number - 1) * size
    return list(itertools.islice(itertools.cycle(texts), start, start + size))


def _write_prompts(path: Path, texts: Sequence[str]) -> None:
    lines = "".join(json_line({"prompt": text}) for text in texts)
    run_directory.write_atomically(path, lines)


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


def judged_rows(
    groups: Iterable[tuple[str, Sequence[str]]], judge: judges.Judge, schema: str
) -> tuple[list[dict[str, Any]], float, int]:
    """Training rows from judged responses.

    Args:
      groups: ``(prompt, distinct responses)``.
      judge: scores a response, or prefers one of two; then a response's score is its
        mean preference over the others.
      schema: ``"preference"``: the best against the worst response, with the
        difference of their scores as the margin; ``"trajectory"``: every response with
        its score as the reward; ``"supervised"``: the best response.

    Returns:
      ``(rows, mean score of all responses, prompts whose responses tie)``.

    Raises:
      ValueError: for another schema.

    >>> groups = [("2+2?", ["4", "5", "four"])]
    >>> rows, mean, tied = judged_rows(groups, lambda p, r: r == "4", "preference")
    >>> rows
    [{'prompt': '2+2?', 'chosen': '4', 'rejected': '5', 'margin': 1.0}]
    """
    rows: list[dict[str, Any]] = []
    all_scores: list[float] = []
    tied = 0
    for prompt, responses in groups:
        # Neither is a text to learn to prefer, nor one that a data file may hold.
        responses = [text for text in responses if text.strip()]
        if not responses:
            tied += 1
            continue
        scores = _scores(judge, prompt, responses)
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
        elif schema == "supervised":
            rows.append({"prompt": prompt, "completion": responses[best]})
        else:
            raise ValueError(
                f"Judged samples make no rows of the schema {schema!r}; expected an "
                "objective of 'preference', 'trajectory' or 'supervised'."
            )
    return rows, float(np.mean(all_scores)) if all_scores else float("nan"), tied


def _scores(judge: judges.Judge, prompt: str, responses: Sequence[str]) -> list[float]:
    if not judges.is_pairwise(judge):
        return [judges.score(judge, prompt, text) for text in responses]
    wins: Mapping[int, list[float]] = {i: [] for i in range(len(responses))}
    for a, b in itertools.combinations(range(len(responses)), 2):
        preferred, _ = judges.preference(judge, prompt, responses[a], responses[b])
        wins[a].append(preferred)
        wins[b].append(1.0 - preferred)
    return [float(np.mean(found)) if found else 0.5 for found in wins.values()]
