"""The main job on embedded data: supervise a T5, then align it three ways.

Every stage is an ordinary ``jaxalign train`` run of a packaged gin file; the printed
commands reproduce them one by one. The village (`jaxalign.world`) judges any response
exactly, so the table at the end is a measurement, not a model's opinion.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from pathlib import Path
from typing import Any

from jaxalign import configs, report, world
from jaxalign.decoding import Sampling
from jaxalign.evaluation import compare, mean_reward
from jaxalign.pipelines import generation
from jaxalign.training import checkpoints, run_directory
from jaxalign.training import train as loop


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run.

    Attributes:
      name: of the run's folder and of its gin file.
      schema: of the embedded data (`jaxalign.world.SCHEMAS`).
      rows: training examples.
      settings: gin macros and their values, as a gin file spells them.
    """

    name: str
    schema: str
    rows: int
    settings: dict[str, str]


_COMMON = {
    "TASK_FEATURE_LENGTHS": "{'inputs': 48, 'targets': 56}",
    "PACKING": "1",
    "EVAL_PERIOD": "100",
    "EVAL_STEPS": "4",
    "CHECKPOINT_PERIOD": "1000",
    "SCHEDULE": "@schedules.cosine()",
    "WARMUP_STEPS": "10",
    "TRAIN_STEPS": "100",
    "LEARNING_RATE": "3e-3",
}
_SFT = Stage(
    "sft",
    "supervised",
    8000,
    {
        "TRAIN_STEPS": "400",
        "WARMUP_STEPS": "40",
        "BATCH_SIZE": "64",
        "LEARNING_RATE": "4e-2",
    },
)
_ALIGNED = (
    Stage(
        "dro_v",
        "trajectory",
        4000,
        {"BATCH_SIZE": "48", "TAU": "0.5", "VALUE_LEARNING_RATE": "1e-2"},
    ),
    # Two prompts to a row: each is the other's mismatched prompt.
    Stage(
        "kto", "trajectory", 4000, {"BATCH_SIZE": "16", "PACKING": "2", "BETA": "0.5"}
    ),
    Stage("dpo", "preference", 4000, {"BATCH_SIZE": "32", "BETA": "0.5"}),
)
_TEST_PROMPTS = 500


def run(run_dir: str | Path, seed: int = 0) -> str:
    """Trains SFT, DRO-V, KTO and DPO, and compares them under the true reward.

    Args:
      run_dir: gets ``data/``, a run directory per stage, ``results.json`` and
        ``report.html``. Stages that are finished are not repeated.
      seed: of the data, the initialisation and the samples.

    Returns:
      The table that `jaxalign quickstart` prints.
    """
    folder = Path(run_dir)
    started = time.monotonic()
    _train(folder, _SFT, seed, {})
    start_from = {"INITIAL_CHECKPOINT_PATH": repr(str(folder / "sft"))}
    for stage in _ALIGNED:
        _train(folder, stage, seed, start_from)
    results = _evaluate(folder, [s.name for s in (_SFT, *_ALIGNED)], seed)
    run_directory.write_atomically(
        folder / "results.json", json.dumps(results, indent=2) + "\n"
    )
    page = report.write_report([folder / name for name in results], None)
    minutes = (time.monotonic() - started) / 60
    return f"{_table(results)}\n\nReport: {page}   ({minutes:.1f} minutes)"


def _train(folder: Path, stage: Stage, seed: int, extra: dict[str, str]) -> None:
    data = folder / "data"
    paths = {
        "DATA": data / f"{stage.schema}.train.jsonl",
        "EVAL_DATA": data / f"{stage.schema}.validation.jsonl",
    }
    for (_, path), split, size in zip(
        paths.items(), ("train", "validation"), (stage.rows, 400), strict=True
    ):
        world.write_dataset(path, stage.schema, split, size, seed)
    macros = {
        **{name: repr(str(path)) for name, path in paths.items()},
        "CACHE_DIR": repr(str(folder / "cache")),
        "RANDOM_SEED": str(seed),
        **_COMMON,
        **stage.settings,
        **extra,
    }
    gin_file = f"runs/{stage.name}.gin"
    directory = str(folder / stage.name)
    flags = [f"--gin.{name}={value}" for name, value in macros.items()]
    command = ["jaxalign", "train", f"--gin_file={gin_file}", *flags]
    print("\n$ " + shlex.join([*command, f"--run_dir={directory}"]), flush=True)
    macros["MODEL_DIR"] = repr(directory)
    configs.parse([gin_file], [f"{name} = {value}" for name, value in macros.items()])
    text = configs.config_str()
    loop.train(configs.configured(loop.Run)(), text)


def _evaluate(folder: Path, names: list[str], seed: int) -> dict[str, dict[str, Any]]:
    """True reward, win rate and length of every policy on the test prompts."""
    prompts = world.sample_prompts("test", _TEST_PROMPTS, seed)
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
        reward = mean_reward(prompts, texts[name], world.true_reward)
        lengths = [len(tokens) for g in generations for tokens in g.tokens]
        results[name] = {
            "true_reward": reward.mean,
            "ci95": [reward.low, reward.high],
            "mean_tokens": sum(lengths) / len(lengths),
        }
        if name != "sft":
            compared = compare.compare_responses(
                prompts, texts[name], texts["sft"], world.true_reward
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
