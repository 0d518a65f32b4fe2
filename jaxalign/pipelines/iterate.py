"""Rounds of sampling, judging and training (iterative DPO).

Each round samples responses to its prompts from the policy of the round before, has a
judge score them, and trains on the result with any offline objective: preference
objectives on the best against the worst response, those of single trajectories on all
of them with their scores (arXiv 2312.11456, 2404.19733). A study: the same command
after a kill goes on where it stopped, and what was judged keeps its verdict.

    run_dir/round1/{prompts,samples,verdicts,data}.jsonl, round1/train/, rounds.jsonl
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from jaxalign import configs, judges, remote
from jaxalign.cluster import mesh as meshes
from jaxalign.data import jsonl, records
from jaxalign.inference import generation
from jaxalign.pipelines import verdicts
from jaxalign.pipelines.study import Study
from jaxalign.training import checkpoints
from jaxalign.training import run as runs

REFERENCES = ("fixed", "refreshed")
# Which macros a round sets; a run file reads them.
_OWN = ("DATA", "MODEL_DIR", "INITIAL_CHECKPOINT_PATH", "REFERENCE_CHECKPOINT_PATH")
_JUDGED_AT_ONCE = 16  # prompts; a kill asks for so many again at most


def run(
    *,
    initial: str,
    prompts: str,
    judge: str,
    run_dir: str,
    gin_files: Sequence[str] = ("runs/dpo.gin",),
    bindings: Sequence[str] = (),
    search_paths: Sequence[str | Path] = (),
    rounds: int = 3,
    reference: Literal["fixed", "refreshed"] = "fixed",
    prompts_per_round: int | None = None,
    num_samples: int = 4,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    redo: Sequence[str] = (),
) -> str:
    """Trains on judged samples of the policy itself, round by round.

    Args:
      initial: checkpoint to start from.
      prompts: JSON Lines file with ``prompt``.
      judge: of responses, or of two of them: see `jaxalign.judges`.
      run_dir: where all is written.
      gin_files: of the training run, as in ``--gin_file``.
      bindings: ``"NAME = VALUE"`` for it. DATA, MODEL_DIR and both checkpoint paths
        are set here.
      search_paths: folders to look for gin files in.
      rounds: how many.
      reference: what objectives with a reference hold on to: the initial policy in
        every round, or each round's own start.
      prompts_per_round: takes so many each round, one after another and round again;
        by default all, every round.
      num_samples: responses per prompt, at least 2.
      temperature: of the samples.
      top_p: keep so much probability.
      max_new_tokens: tokens of a sample.
      batch_size: prompts at a time, over the training run's mesh.
      seed: of samples and training; round ``n`` uses ``seed + n``.
      redo: stages to make again, such as ``round1/verdicts.jsonl``.

    Returns:
      A line a round, as in ``rounds.jsonl``: the mean score of its samples, how many
      rows it was trained on, and where its policy is.

    Raises:
      ValueError: before anything is sampled, for an unknown `reference`, fewer than
        two samples, or an objective that judged samples cannot serve; for a stage made
        with other inputs; for a round in which no prompt has a preference.
    """
    if reference not in REFERENCES:
        raise ValueError(f"--reference must be one of {REFERENCES}, got {reference!r}.")
    if num_samples < 2:
        raise ValueError(f"--num_samples must be at least 2, got {num_samples}.")
    given = gin_files, bindings, search_paths
    schema, mesh, batch_size = described(*given, initial, batch_size)
    judging = judges.resolve(judge)
    template = checkpoints.chat_template(initial)
    examples, _ = records.load(prompts, "prompts", chat_template=template)
    texts = [record["prompt"] for e in examples for record in e.records]
    first = initial if remote.is_remote(initial) else Path(initial).absolute()
    table: list[dict[str, Any]] = []
    with Study(run_dir, redo=redo) as study:
        policy = first
        for number in range(1, rounds + 1):
            home = f"round{number}"
            size = len(texts) if prompts_per_round is None else prompts_per_round
            endless = itertools.cycle(texts)
            own = itertools.islice(endless, (number - 1) * size, number * size)
            asked = study.lines(f"{home}/prompts.jsonl", _prompt_rows, list(own))
            samples = study.file(
                f"{home}/samples.jsonl",
                generation.generate,
                all_processes=True,
                execution={"batch_size": batch_size, "mesh": mesh},
                checkpoint=policy,
                prompts=asked,
                num_samples=num_samples,
                temperature=temperature,
                top_p=top_p,
                max_new_tokens=max_new_tokens,
                seed=seed + number,
            )
            judged = study.lines(
                f"{home}/verdicts.jsonl",
                verdicts.verdicts,
                verdicts.groups(samples),
                batch=_JUDGED_AT_ONCE,
                judge=judging,
            )
            data = study.file(
                f"{home}/data.jsonl", _write_rows, judged=judged, schema=schema
            )
            trained = study.train(
                f"{home}/train",
                gin_files,
                bindings=bindings,
                search_paths=search_paths,
                DATA=data,
                INITIAL_CHECKPOINT_PATH=policy,
                REFERENCE_CHECKPOINT_PATH=policy if reference == "refreshed" else first,
                RANDOM_SEED=seed + number,
            )
            rows, reward, tied = verdicts.training_rows(jsonl.read_rows(judged), schema)
            row = {"round": number, "policy": str(trained), "sampled_from": str(policy)}
            table.append({**row, "reward": reward, "rows": len(rows), "tied": tied})
            policy = trained
            if jax.process_index() == 0:
                jsonl.write_rows(study.folder / "rounds.jsonl", table)
        study.page("Rounds of judged samples")
    return "\n".join(
        f"round {row['round']}: samples score {row['reward']:.4g}, trained on "
        f"{row['rows']} rows: {row['policy']}"
        for row in table
    )


def described(
    gin_files: Sequence[str],
    bindings: Sequence[str],
    search_paths: Sequence[str | Path],
    initial: str,
    batch_size: int,
) -> tuple[str, Mapping[str, int] | None, int]:
    """The schema of the run's objective, the mesh to sample on, and its batch."""
    if not {*_OWN} <= configs.macros(gin_files, search_paths):
        raise configs.ConfigError(
            f"No run to repeat in {', '.join(map(str, gin_files))}: add a file that "
            "describes one, such as --gin_file=runs/dpo.gin; `jaxalign tasks` lists "
            "all."
        )
    # The network may be the checkpoint's; the rest is set later.
    later = [f"{name} = {initial!r}" for name in _OWN]
    configs.parse(gin_files, [*bindings, *later], search_paths)
    described = runs.from_gin()
    objective = described.objective(model=described.model)
    name, schema = type(objective).__name__, objective.schema
    if schema not in verdicts.SCHEMAS:
        raise ValueError(
            f"{name} trains on data of the schema {schema!r}, which judged samples "
            f"cannot give: take an objective of {', '.join(verdicts.SCHEMAS)}, such as "
            "runs/dpo.gin or runs/dro_v.gin."
        )
    if "label" in objective.requires and described.dataset.desirable_above is None:
        raise ValueError(
            f"{name} needs a thumbs-up or -down for every response, and a judge gives "
            "a score: say above which score a response is good, "
            "--gin.DESIRABLE_ABOVE=0.5."
        )
    if jax.device_count() == 1:
        return schema, None, batch_size
    mesh = dict(described.mesh or {})
    shape = meshes.make_mesh(**mesh).shape
    ways = shape["data"] * shape["fsdp"]
    return schema, mesh, -(-batch_size // ways) * ways


def _prompt_rows(texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"prompt": text} for text in texts]


def _write_rows(output: Path, judged: Path, schema: str) -> None:
    found = jsonl.read_rows(judged)
    rows, _, _ = verdicts.training_rows(found, schema)
    if not rows:
        raise ValueError(
            f"{output.parent.name}: the judge told no two responses to any of the "
            f"{len(found)} prompts apart, so there is nothing to learn from. Give a "
            "higher --temperature or more --num_samples, or look at the judge."
        )
    jsonl.write_rows(output, rows)
