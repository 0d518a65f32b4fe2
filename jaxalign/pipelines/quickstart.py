"""The main job on embedded data: supervise a T5, then align it three ways.

Every stage is an ordinary ``jaxalign train`` run of a packaged gin file; the printed
commands reproduce them one by one. The village (`jaxalign.world`) judges any response
exactly, so the table at the end is a measurement, not a model's opinion.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from jaxalign import judges, remote, report, world
from jaxalign.cluster import exclusive
from jaxalign.data import jsonl
from jaxalign.decoding import Sampling
from jaxalign.evaluation import compare, mean_reward
from jaxalign.inference import generation
from jaxalign.pipelines import stages
from jaxalign.pipelines.stages import COMMON, SFT, Stage
from jaxalign.training import checkpoints, run_directory

_ALIGNED = (
    Stage(
        "dro_v",
        "trajectory",
        4000,
        {
            **COMMON,
            "BATCH_SIZE": "48",
            "TAU": "0.5",
            "VALUE_LEARNING_RATE": "1e-2",
        },
    ),
    # Two prompts to a row: each is the other's mismatched prompt.
    Stage(
        "kto",
        "trajectory",
        4000,
        {**COMMON, "BATCH_SIZE": "16", "PACKING": "2", "BETA": "0.5"},
    ),
    Stage("dpo", "preference", 4000, {**COMMON, "BATCH_SIZE": "32", "BETA": "0.5"}),
)
_TEST_PROMPTS = 500


def run(run_dir: str | Path = "runs/quickstart", seed: int = 0) -> str:
    """Trains SFT, DRO-V, KTO and DPO, and compares them under the true reward.

    Args:
      run_dir: gets ``data/``, a run directory per stage, ``results.json`` and
        ``report.html``. Stages that are finished are not repeated.
      seed: of the data, the initialisation and the samples.

    Returns:
      The table that `jaxalign quickstart` prints.

    Raises:
      ValueError: when a stage in `run_dir` was trained with other settings.
    """
    folder = remote.local_only(run_dir, "--run_dir of several runs")
    with exclusive.holding(folder, "folder of the quickstart"):
        return _run(folder, seed)


def _run(folder: Path, seed: int) -> str:
    started = time.monotonic()
    data = folder / "data"
    sft = stages.train(folder, SFT, data=data, seed=seed)
    start_from = {"INITIAL_CHECKPOINT_PATH": repr(str(sft))}
    for stage in _ALIGNED:
        settings = {**stage.settings, **start_from}
        stage = dataclasses.replace(stage, settings=settings)
        stages.train(folder, stage, data=data, seed=seed)
    results = _evaluate(folder, [s.name for s in (SFT, *_ALIGNED)], seed)
    run_directory.write_atomically(
        folder / "results.json", jsonl.dumps(results, indent=2) + "\n"
    )
    page = report.write_report([folder / name for name in results], None)
    minutes = (time.monotonic() - started) / 60
    return f"{_table(results)}\n\nReport: {page}   ({minutes:.1f} minutes)"


def _evaluate(folder: Path, names: list[str], seed: int) -> dict[str, dict[str, Any]]:
    """True reward, win rate and length of every policy on the test prompts."""
    prompts = world.sample_prompts("test", _TEST_PROMPTS, seed)
    judge = judges.from_function(world.true_reward)
    results: dict[str, dict[str, Any]] = {}
    texts: dict[str, list[list[str]]] = {}
    for name in names:
        generations = list(
            generation.sample(
                checkpoints.load_policy(folder / name),
                prompts,
                num_samples=2,
                sampling=Sampling(temperature=1.0),
                max_new_tokens=64,
                batch_size=64,
                seed=seed,
            )
        )
        texts[name] = [g.texts for g in generations]
        scores = judges.verdicts(zip(prompts, texts[name], strict=True), judge)
        reward = mean_reward(scores)
        lengths = [len(tokens) for g in generations for tokens in g.tokens]
        results[name] = {
            "true_reward": reward.mean,
            "ci95": [reward.low, reward.high],
            "mean_tokens": sum(lengths) / len(lengths),
        }
        if name != "sft":
            compared = compare.compare_responses(
                prompts, texts[name], texts["sft"], judge
            )
            rate = compared.win_rate
            results[name]["win_rate_vs_sft"] = rate.mean
            results[name]["win_rate_ci95"] = [rate.low, rate.high]
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
