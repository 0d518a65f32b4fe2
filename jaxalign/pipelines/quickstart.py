"""The main job on embedded data: supervise a T5, then align it three ways.

A study whose stages are ordinary ``jaxalign train`` runs of packaged gin files; the
printed commands reproduce them one by one. The village (`jaxalign.world`) judges any
response exactly, so the table at the end is a measurement, not a model's opinion.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxalign import files, judges, report, world
from jaxalign.data import jsonl
from jaxalign.evaluation import compare
from jaxalign.inference import generation
from jaxalign.pipelines.study import Study

# The embedded data's lengths in bytes, and a schedule that suits runs of minutes.
COMMON: dict[str, Any] = {
    "TASK_FEATURE_LENGTHS": {"inputs": 48, "targets": 56},
    "PACKING": 1,
    "EVAL_PERIOD": 100,
    "EVAL_STEPS": 4,
    "CHECKPOINT_PERIOD": 1000,
    "WARMUP_STEPS": 10,
    "TRAIN_STEPS": 100,
    "LEARNING_RATE": 3e-3,
}
SFT: dict[str, Any] = {
    "TRAIN_STEPS": 400,
    "WARMUP_STEPS": 40,
    "BATCH_SIZE": 64,
    "LEARNING_RATE": 4e-2,
}
SFT_ROWS = 8000
# Objective: schema and settings. KTO has two prompts to a row: each is the other's
# mismatched prompt.
_ALIGNED: dict[str, tuple[str, dict[str, Any]]] = {
    "dro_v": (
        "trajectory",
        {"BATCH_SIZE": 48, "TAU": 0.5, "VALUE_LEARNING_RATE": 1e-2},
    ),
    "kto": ("trajectory", {"BATCH_SIZE": 16, "PACKING": 2, "BETA": 0.5}),
    "dpo": ("preference", {"BATCH_SIZE": 32, "BETA": 0.5}),
}
_TEST_PROMPTS = 500


def run(
    *, run_dir: str = "runs/quickstart", seed: int = 0, redo: Sequence[str] = ()
) -> str:
    """The main job on embedded data, in minutes.

    Trains SFT, DRO-V, KTO and DPO, and compares them under the true reward.

    Args:
      run_dir: where all is written: ``data/``, a run directory per objective,
        ``samples/``, ``results.json``, ``report.html`` and ``study.html``.
      seed: of data, training and samples.
      redo: stages to make again, such as ``dpo``.
    """
    started = time.monotonic()
    with Study(run_dir, redo=redo) as study:
        policies = {"sft": train(study, "sft", "supervised", SFT_ROWS, seed, SFT)}
        for name, (schema, settings) in _ALIGNED.items():
            start = {**settings, "INITIAL_CHECKPOINT_PATH": policies["sft"]}
            policies[name] = train(study, name, schema, 4000, seed, start)
        prompts = village_prompts(study, "samples", "test", _TEST_PROMPTS, seed)
        asked = {"prompts": prompts, "num_samples": 2, "max_new_tokens": 64}
        asked |= {"seed": seed, "execution": {"batch_size": 64}}
        samples = {
            name: study.file(
                f"samples/{name}.jsonl", generation.generate, checkpoint=policy, **asked
            )
            for name, policy in policies.items()
        }
        results = _evaluate(samples)
        text = jsonl.dumps(results, indent=2) + "\n"
        files.write_atomically(study.folder / "results.json", text)
        page = report.write_report(list(policies.values()))
        table = _table(results)
        study.page("Quickstart", f"<pre>{table}</pre>")
    minutes = (time.monotonic() - started) / 60
    return f"{table}\n\nReport: {page}   ({minutes:.1f} minutes)"


def train(
    study: Study,
    name: str,
    schema: str,
    rows: int,
    seed: int,
    settings: dict[str, Any],
    gin_file: str = "",
) -> Path:
    """A training run on the village's data, which is written first if it is missing.

    Args:
      study: gets the stages.
      name: of the run directory; its last part is the gin file's if none is given.
      schema: of the data (`jaxalign.world.SCHEMAS`).
      rows: training examples.
      seed: of the data and the run.
      settings: gin macros beside `COMMON`'s.
      gin_file: ``runs/<gin_file>.gin``.
    """
    macros = {"RANDOM_SEED": seed, **COMMON, **settings}
    parts = {"DATA": ("train", rows), "EVAL_DATA": ("validation", 400)}
    for macro, (split, size) in parts.items():
        asked = {"schema": schema, "split": split, "size": size, "seed": seed}
        path = f"data/{schema}.{split}.{size}.{seed}.jsonl"
        macros.setdefault(macro, study.file(path, _write_data, **asked))
    return study.train(
        name,
        [f"runs/{gin_file or Path(name).name}.gin"],
        bindings=["SCHEDULE = @schedules.cosine()"],
        execution={"CACHE_DIR": str(study.folder / "data" / "cache")},
        **macros,
    )


def village_prompts(
    study: Study, folder: str, split: str, num_prompts: int, seed: int
) -> Path:
    """A file of unseen prompts of a split, ``folder/prompts.jsonl``."""
    asked = {"split": split, "num_prompts": num_prompts, "seed": seed}
    return study.file(f"{folder}/prompts.jsonl", _write_prompts, **asked)


def _write_data(output: Path, **asked: Any) -> None:
    world.write_dataset(output, **asked)


def _write_prompts(output: Path, split: str, num_prompts: int, seed: int) -> None:
    texts = world.sample_prompts(split, num_prompts, seed)
    jsonl.write_rows(output, [{"prompt": text} for text in texts])


def _evaluate(samples: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """True reward, win rate and length of every policy on the test prompts."""
    judge = judges.from_function(world.true_reward)
    results: dict[str, dict[str, Any]] = {}
    texts: dict[str, list[list[str]]] = {}
    for name, path in samples.items():
        rows = jsonl.read_rows(path)
        prompts = [row["prompt"] for row in rows if row["sample"] == 0]
        given = [row["response"] for row in rows]
        texts[name] = own = [given[i : i + 2] for i in range(0, len(given), 2)]
        compared = compare.compare_responses(prompts, own, texts["sft"], judge)
        reward, *ends = compared.reward_a
        tokens = sum(row["num_tokens"] for row in rows) / len(rows)
        results[name] = {"true_reward": reward, "ci95": ends, "mean_tokens": tokens}
        if name != "sft":
            rate, *ends = compared.win_rate
            results[name] |= {"win_rate_vs_sft": rate, "win_rate_ci95": ends}
    return results


def _table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"{'objective':<11}{'true reward':>12}  {'95% interval':<18}"
        f"{'win rate vs SFT':>16}{'mean tokens':>13}"
    ]
    for name, row in results.items():
        low, high = row["ci95"]
        won = f"{row['win_rate_vs_sft']:.1%}" if "win_rate_vs_sft" in row else "-"
        lines.append(
            f"{name:<11}{row['true_reward']:>12.3f}  [{low:.3f}, {high:.3f}]    "
            f"{won:>16}{row['mean_tokens']:>13.1f}"
        )
    return "\n".join(lines)
