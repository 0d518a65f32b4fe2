"""A reward model and the policy that it judges, trained in turn (MetaRM).

Dou et al. 2024 (arXiv 2405.00438): a policy drifts away from what its reward model has
seen. Each round samples from the policy, trains the reward model once more on the same
preferences so that it tells those samples apart (`jaxalign.objectives.MetaRM`), has it
judge them, and trains the policy on the verdicts. A study: the same command after a
kill goes on where it stopped.

    run_dir/pairs.jsonl, rounds.jsonl
            round1/{prompts,samples,data}.jsonl, round1/reward/
            round1/{before,verdicts,held_out,policy}.jsonl, round1/train/
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxalign import batch, configs, judges, remote
from jaxalign.data import jsonl, records
from jaxalign.inference import generation
from jaxalign.objectives import MetaRM
from jaxalign.pipelines import held_out as places
from jaxalign.pipelines import iterate, verdicts
from jaxalign.pipelines import policy_samples as stages
from jaxalign.pipelines.study import Study
from jaxalign.training import checkpoints, inputs
from jaxalign.training import run as runs

_OWN = ("DATA", "MODEL_DIR", "TRAIN_STEPS", "META_RATE")
_JUDGED_AT_ONCE = 256  # prompts


def run(
    *,
    initial: str,
    reward: str,
    data: str,
    prompts: str,
    run_dir: str,
    held_out: str | None = None,
    gin_files: Sequence[str] = ("runs/reward_meta.gin",),
    policy_gin_files: Sequence[str] = ("runs/dpo.gin",),
    bindings: Sequence[str] = (),
    search_paths: Sequence[str | Path] = (),
    rounds: int = 3,
    steps: int | None = None,
    policy_steps: int | None = None,
    prompts_per_round: int | None = None,
    num_samples: int = 4,
    temperature: float = 0.8,
    top_p: float = 0.9,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    redo: Sequence[str] = (),
) -> str:
    """Trains a reward model and its policy in turn, on samples of the latter.

    Args:
      initial: the policy to start from.
      reward: the reward model to start from, a run of runs/reward_model.gin.
      data: JSON Lines, CSV or TSV of ``prompt``, ``chosen`` and ``rejected``: the
        preferences, the same in every round.
      prompts: JSON Lines file with ``prompt``, to sample from the policy.
      run_dir: where all is written.
      held_out: preferences to measure each round's reward model on.
      gin_files: of the reward model's run, as in ``--gin_file``.
      policy_gin_files: of the policy's, whose objective learns from judged samples;
        with commas between them.
      bindings: ``"NAME = VALUE"`` for the reward model's run.
      search_paths: folders to look for gin files in.
      rounds: how many.
      steps: of the reward model in each round; by default one epoch.
      policy_steps: of the policy in each round; by default as its gin files say.
      prompts_per_round: takes so many each round, one after another and round again;
        by default all, every round.
      num_samples: responses per prompt, at least 2.
      temperature: of the samples.
      top_p: keep so much probability.
      max_new_tokens: tokens of a sample.
      batch_size: prompts at a time, over the policy run's mesh.
      seed: of samples and training; round ``n`` uses ``seed + n``.
      redo: stages to make again, such as ``round1/data.jsonl``.

    Returns:
      A line a round, as in ``rounds.jsonl``: how far apart the reward model's scores of
      two samples are before and after, its accuracy on `held_out`, and where both are.

    Raises:
      ValueError: before anything is sampled, for fewer than two samples, or objectives
        that cannot take part; for a round in which no prompt has two samples.
    """
    if num_samples < 2 or rounds < 1:
        raise ValueError(
            "--num_samples must be at least 2 and --rounds at least 1, got "
            f"{num_samples} and {rounds}."
        )
    given = gin_files, bindings, search_paths
    of_policy = policy_gin_files, (), search_paths
    schema, mesh, batch_size = iterate.described(*of_policy, initial, batch_size)
    columns, fields = _columns(given, reward)
    template = checkpoints.chat_template(initial)
    texts = [
        record["prompt"]
        for example in records.load(prompts, "prompts", chat_template=template)[0]
        for record in example.records
    ]
    asked_of = _groups(held_out) if held_out else []
    policy, model = places.place(initial), places.place(reward)
    first, table = policy, []
    with Study(run_dir, redo=redo) as study:
        pairs = study.file(
            "pairs.jsonl",
            stages.write_pairs,
            data=Path(remote.copy(data)),
            columns=columns,
        )
        for number in range(1, rounds + 1):
            home, before = f"round{number}", judges.resolve(f"reward:{model}")
            size = len(texts) if prompts_per_round is None else prompts_per_round
            endless = itertools.cycle(texts)
            own = itertools.islice(endless, (number - 1) * size, number * size)
            asked = study.lines(f"{home}/prompts.jsonl", stages.prompt_rows, list(own))
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
            both = study.file(
                f"{home}/data.jsonl",
                stages.write_data,
                pairs=pairs,
                samples=samples,
            )
            macros: dict[str, Any] = {
                "DATA": both,
                "FIELD_MAP": fields,
                "EVAL_FRACTION": 0.0,
                "INITIAL_CHECKPOINT_PATH": model,
                "RANDOM_SEED": seed + number,
            }
            cache = {"CACHE_DIR": str(study.folder / "cache")}
            epoch = steps or _epoch(given, {**macros, **cache})
            ends = {"CHECKPOINT_PERIOD": epoch, "EVAL_PERIOD": epoch}
            model = study.train(
                f"{home}/reward",
                gin_files,
                bindings=bindings,
                search_paths=search_paths,
                execution={**cache, **ends},
                TRAIN_STEPS=epoch,
                **macros,
            )
            judge, groups = judges.resolve(f"reward:{model}"), verdicts.groups(samples)

            def judged(name: str, groups: Any, judge: Any, home: str = home) -> Path:
                return study.lines(
                    f"{home}/{name}.jsonl",
                    verdicts.verdicts,
                    groups,
                    batch=_JUDGED_AT_ONCE,
                    judge=judge,
                )

            row = {"round": number, "sampled_from": str(policy)}
            row["apart_before"] = stages.apart(judged("before", groups, before))
            found = judged("verdicts", groups, judge)
            row["apart"] = stages.apart(found)
            if asked_of:
                row["accuracy"] = stages.accuracy(
                    judged("held_out", asked_of, judge)
                ).mean
            chosen = study.file(
                f"{home}/policy.jsonl",
                stages.write_judged,
                judged=found,
                schema=schema,
            )
            own_steps = {} if policy_steps is None else {"TRAIN_STEPS": policy_steps}
            policy = study.train(
                f"{home}/train",
                policy_gin_files,
                search_paths=search_paths,
                execution=cache,
                DATA=chosen,
                INITIAL_CHECKPOINT_PATH=policy,
                REFERENCE_CHECKPOINT_PATH=first,
                RANDOM_SEED=seed + number,
                **own_steps,
            )
            table.append({**row, "reward": str(model), "policy": str(policy)})
            if jax.process_index() == 0:
                jsonl.write_rows(study.folder / "rounds.jsonl", table)
        study.page("A reward model and its policy in turn")
    return "\n".join(map(_line, table))


def _columns(
    given: tuple[Sequence[str], Sequence[str], Sequence[str | Path]], reward: str
) -> tuple[list[str], dict[str, str]]:
    """The objective's columns of rows, and where all fields lie in a round's data."""
    gin_files, bindings, search_paths = given
    if not {*_OWN} <= configs.macros(gin_files, search_paths):
        raise configs.ConfigError(
            f"No run of MetaRM in {', '.join(map(str, gin_files))}: add a file that "
            "describes one, such as --gin_file=runs/reward_meta.gin."
        )
    later = ["DATA = 'x'", "MODEL_DIR = 'x'", f"INITIAL_CHECKPOINT_PATH = {reward!r}"]
    configs.parse(gin_files, [*bindings, *later], search_paths)
    described = runs.from_gin()
    objective = described.objective(model=described.model)
    if not isinstance(objective, MetaRM):
        raise ValueError(
            f"{type(objective).__name__} would take samples for preferences: take "
            "runs/reward_meta.gin (META_RATE = 0 is Bradley-Terry alone)."
        )
    columns = list(batch.extra(objective.columns, "rows"))
    fields = ("chosen", "rejected", "margin", *columns)
    return columns, {name: f"pairs[].{name}" for name in fields}


def _groups(held_out: str) -> list[tuple[str, list[str]]]:
    examples, _ = records.load(held_out, "preference")
    rows = [record for example in examples for record in example.records]
    return [(row["prompt"], [row["chosen"], row["rejected"]]) for row in rows]


def _epoch(
    given: tuple[Sequence[str], Sequence[str], Sequence[str | Path]],
    macros: Mapping[str, Any],
) -> int:
    """The steps of one epoch over a round's data."""
    gin_files, bindings, search_paths = given
    values = {k: str(v) if isinstance(v, Path) else v for k, v in macros.items()}
    spelt = [f"{k} = {v!r}" for k, v in values.items()]
    configs.parse(gin_files, [*bindings, *spelt, "MODEL_DIR = 'x'"], search_paths)
    described = runs.from_gin()
    objective = described.objective(model=described.model)
    built = inputs.build(described.dataset, objective, described.vocabulary)
    return built.train.steps_per_epoch


def _line(row: Mapping[str, Any]) -> str:
    right = f", accuracy {row['accuracy']:.3f}" if "accuracy" in row else ""
    return (
        f"round {row['round']}: scores of two samples are {row['apart_before']:.3g} "
        f"apart before and {row['apart']:.3g} after{right}: {row['reward']}, "
        f"{row['policy']}"
    )
