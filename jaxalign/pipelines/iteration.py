"""``jaxalign iterate``: rounds of sampling, judging and training (iterative DPO).

Each round samples responses to its prompts from the policy of the round before, has a
judge score them, and trains on the result with any offline objective: preference
objectives on the best against the worst response, those of single trajectories on all
of them with their scores (arXiv 2312.11456, 2404.19733). The same command after a kill
goes on where it stopped: what was sampled is not sampled again, what was judged keeps
its verdict, however noisy the judge is. Under other settings the folder is refused.

    run_dir/round1/{samples.jsonl, verdicts.jsonl, data.jsonl, train/}, rounds.jsonl
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from jaxalign import configs, judges, remote
from jaxalign.cluster import exclusive
from jaxalign.cluster import mesh as meshes
from jaxalign.data import records
from jaxalign.data.cache import file_sha256
from jaxalign.data.jsonl import json_line
from jaxalign.inference import generation, outputs
from jaxalign.inference.evaluation import write_jsonl
from jaxalign.pipelines.verdicts import SCHEMAS, judged, judged_rows, training_rows
from jaxalign.training import checkpoints, run_directory
from jaxalign.training import run as runs
from jaxalign.training import train as loop

__all__ = ["iterate", "judged_rows"]

_log = logging.getLogger(__name__)

REFERENCES = ("fixed", "refreshed")
# Which macros a round sets; a run file reads them.
_OWN = ("DATA", "MODEL_DIR", "INITIAL_CHECKPOINT_PATH", "REFERENCE_CHECKPOINT_PATH")


def iterate(
    *,
    gin_files: Sequence[str] = ("runs/dpo.gin",),
    bindings: Sequence[str] = (),
    search_paths: Sequence[str | Path] = (),
    initial: str,
    prompts: str,
    judge: str,
    run_dir: str,
    rounds: int = 3,
    reference: Literal["fixed", "refreshed"] = "fixed",
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
      judge: of responses, or of two of them: see `jaxalign.judges`.
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
      batch_size: prompts decoded at a time, over the training run's mesh; rounded up
        to what its devices share evenly.
      seed: of samples and training; round ``n`` uses ``seed + n``.

    Returns:
      One row per round: ``round``, ``policy`` (a run directory), ``sampled_from``,
      ``reward`` (mean score of the samples it was trained on), ``rows`` and ``tied``
      (prompts without a preference).

    Raises:
      ValueError: before anything is sampled, for an unknown `reference`, fewer than
        two samples, an objective that judged samples cannot serve, or a `run_dir` of
        other settings; later, for a round in which no prompt has a preference.
    """
    if reference not in REFERENCES:
        raise ValueError(f"--reference must be one of {REFERENCES}, got {reference!r}.")
    if num_samples < 2:
        raise ValueError(f"--num_samples must be at least 2, got {num_samples}.")
    if not {*_OWN} <= configs.macros(gin_files, search_paths):
        raise configs.ConfigError(
            f"No run to repeat in {', '.join(map(str, gin_files))}: add a file that "
            "describes one, such as --gin_file=runs/dpo.gin; `jaxalign tasks` lists "
            "all."
        )
    folder = remote.local_only(run_dir, "--run_dir of several runs").absolute()
    judged_by = judges.resolve(judge)
    examples, _ = records.load(prompts, "prompts")
    texts = [record["prompt"] for e in examples for record in e.records]
    first = initial if remote.is_remote(initial) else str(Path(initial).absolute())
    sampling = {
        "num_samples": num_samples,
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": max_new_tokens,
    }
    key = {
        "initial": _fingerprint(first),
        "prompts": outputs.text_sha256(json.dumps(texts)),
        "judge": judged_by.fingerprint,
        "reference": reference,
        "prompts_per_round": prompts_per_round,
        **sampling,
        "seed": seed,
    }
    table: list[dict[str, Any]] = []
    with exclusive.holding(folder, "folder of rounds"):
        outputs.check_folder(folder, key)
        policy = first
        for number in range(1, rounds + 1):
            home = folder / f"round{number}"
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
            run = runs.from_gin()
            schema = _schema(run)
            mesh, shared = _mesh(run, batch_size)
            outputs.note_folder(folder, key)
            asked = _slice(texts, number, prompts_per_round)
            _write_prompts(home / "prompts.jsonl", asked)
            samples = home / "samples.jsonl"
            generation.generate(
                checkpoint=policy,
                prompts=str(home / "prompts.jsonl"),
                output=str(samples),
                batch_size=shared,
                seed=seed + number,
                mesh=mesh,
                **sampling,
            )
            verdicts = home / "verdicts.jsonl"
            found = judged(samples, verdicts, judged_by)
            rows, reward, tied = training_rows(found, schema)
            if not rows:
                raise ValueError(
                    f"Round {number}: the judge told no two responses to any of the "
                    f"{len(asked)} prompts apart, so there is nothing to learn from. "
                    "Give a higher --temperature or more --num_samples, or look at "
                    "the judge."
                )
            data = home / "data.jsonl"
            made_of = {"verdicts": file_sha256(verdicts), "schema": schema}
            if not outputs.finished(data, made_of):
                write_jsonl(data, rows, made_of)
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


def as_text(table: Sequence[Mapping[str, Any]]) -> str:
    """The table for a terminal."""
    return "\n".join(
        f"round {row['round']}: samples score {row['reward']:.4g}, trained on "
        f"{row['rows']} rows: {row['policy']}"
        for row in table
    )


def _fingerprint(checkpoint: str) -> str:
    return checkpoints.read_meta(checkpoint)["policy_fingerprint"]


def _schema(run: loop.Run) -> str:
    """The schema of the run's objective, if judged samples can have it."""
    objective = run.objective(model=run.model)
    name = type(objective).__name__
    if objective.schema not in SCHEMAS:
        raise ValueError(
            f"{name} trains on data of the schema {objective.schema!r}, which judged "
            f"samples cannot give: take an objective of {', '.join(SCHEMAS)}, such as "
            "runs/dpo.gin or runs/dro_v.gin."
        )
    if "label" in objective.requires and run.dataset.desirable_above is None:
        raise ValueError(
            f"{name} needs a thumbs-up or -down for every response, and a judge gives "
            "a score: say above which score a response is good, "
            "--gin.DESIRABLE_ABOVE=0.5."
        )
    return objective.schema


def _mesh(run: loop.Run, batch_size: int) -> tuple[Mapping[str, int] | None, int]:
    """The mesh to sample on, and the batch rounded up to what it shares evenly."""
    if jax.device_count() == 1:
        return None, batch_size
    mesh = dict(run.mesh or {})
    shape = meshes.make_mesh(**mesh).shape
    ways = shape["data"] * shape["fsdp"]
    return mesh, -(-batch_size // ways) * ways


def _slice(texts: Sequence[str], number: int, size: int | None) -> list[str]:
    """The prompts of a round, which counts from 1."""
    if size is None:
        return list(texts)
    start = (number - 1) * size
    return list(itertools.islice(itertools.cycle(texts), start, start + size))


def _write_prompts(path: Path, texts: Sequence[str]) -> None:
    lines = "".join(json_line({"prompt": text}) for text in texts)
    run_directory.write_atomically(path, lines)
