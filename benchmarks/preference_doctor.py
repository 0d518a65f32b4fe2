"""Does a low strength find labels that are wrong, and does repairing them help?

    python benchmarks/preference_doctor.py --run_dir=runs/doctor_bench --seeds=3

Pairs of the embedded village, ordered by its true reward; a share of the labels is then
turned round. `jaxalign preference_strength` grades them; a reward model trained on what
it repaired is compared with one trained on the pairs as they are, on unseen prompts,
by the share of pairs that it orders as the true reward does.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np

from jaxalign import files, judges, world
from jaxalign.data import jsonl
from jaxalign.evaluation import intervals, strength
from jaxalign.pipelines import preference_strength
from jaxalign.pipelines.study import Study

SETTINGS = [
    "TASK_FEATURE_LENGTHS = {'inputs': 48, 'targets': 56}",
    "BATCH_SIZE = 32",
    "PACKING = 1",
    "LEARNING_RATE = 2e-3",
    "WARMUP_STEPS = 50",
    "OPTIMIZER_NAME = 'adamw'",
    "SCHEDULE = @schedules.cosine()",
    "run.Run.sampler = None",
    "CENTRE = 0.01",
]


def _write(output: Path, split: str, size: int, seed: int, noise: float) -> None:
    """Pairs in the order of their true rewards, of which some are turned round."""
    draw, rows = random.Random(f"{seed} {split}"), []
    for row in world.rows("preference", split, 4 * size, seed):
        texts = [row["chosen"], row["rejected"]]
        texts.sort(key=lambda text: -world.true_reward(row["prompt"], text))
        best, worst = (world.true_reward(row["prompt"], text) for text in texts)
        if best > worst and len(rows) < size:
            planted = draw.random() < noise
            sides = texts[::-1] if planted else texts
            pair = dict(zip(("chosen", "rejected"), sides, strict=True))
            rows.append({"prompt": row["prompt"], **pair, "planted": planted})
    jsonl.write_rows(output, rows)


def accuracy(model: Path, rows: list[dict]) -> list[float]:
    """Of each pair, 1 where a model orders it as the true reward does."""
    judge = judges.resolve(f"reward:{model}")
    prompts = [row["prompt"] for row in rows]
    found = judge(prompts * 2, [r[s] for s in ("chosen", "rejected") for r in rows])
    return (found[: len(rows)] > found[len(rows) :]).astype(float).tolist()


def one(study: Study, seed: int, asked: argparse.Namespace) -> dict:
    home = f"seed{seed}"
    data, test = (
        study.file(f"{home}/{split}.jsonl", _write, split=split, size=size, seed=seed,
                   noise=noise)
        for split, size, noise in (
            ("train", asked.pairs, asked.noise), ("test", 1000, 0.0)
        )
    )  # fmt: skip
    folder = study.folder / home / "doctor"
    print(
        preference_strength.run(
            data=str(data),
            run_dir=str(folder),
            members=asked.members,
            folds=asked.folds,
            shared_trunk=True,
            steps=asked.steps,
            truth="planted",
            mode=asked.mode,
            flip_share=asked.flip_share,
            bindings=SETTINGS,
            seed=seed,
        )
    )
    graded = jsonl.read_rows(folder / "strengths.jsonl")
    means = np.array([row["strength_mean"] for row in graded])
    wrong = np.array([row["planted"] for row in graded])
    cleaned = jsonl.read_rows(folder / "cleaned.jsonl")
    left = np.mean([row["planted"] != row["flipped"] for row in cleaned])
    told = {"auroc": strength.auroc(-means, wrong), "wrong_left": float(left)}
    rows = jsonl.read_rows(test)
    for name, path, graded_rows in (
        ("raw", data, False),
        ("cleaned", folder / "cleaned.jsonl", True),
    ):
        model = study.train(
            f"{home}/{name}",
            ["runs/reward_model.gin"],
            bindings=SETTINGS,
            execution={"CACHE_DIR": str(study.folder / "cache")},
            DATA=path,
            GRADED=graded_rows,
            EVAL_FRACTION=0.0,
            TRAIN_STEPS=asked.steps,
            RANDOM_SEED=seed,
            MARGIN_SCALE=asked.margin_scale if graded_rows else 1.0,
        )
        told[name] = accuracy(model, rows)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run_dir", default="runs/doctor_bench")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--noise", type=float, default=0.2)
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--mode", default="flip")
    parser.add_argument("--flip_share", type=float, default=0.2)
    parser.add_argument("--margin_scale", type=float, default=0.0)
    asked = parser.parse_args()
    found = []
    with Study(asked.run_dir) as study:
        for seed in range(asked.seeds):
            found.append(one(study, seed, asked))
            print({k: float(np.mean(v)) for k, v in found[-1].items()}, flush=True)
        table = {}
        for name in found[0]:
            values = [float(np.mean(told[name])) for told in found]
            table[name] = {"seeds": values, "mean": float(np.mean(values))}
            if len(values) > 1:
                mean = intervals.mean_with_ci(values)
                table[name]["ci95"] = [mean.low, mean.high]
        gaps = [np.subtract(t["cleaned"], t["raw"]) for t in found]
        clusters = np.concatenate([[s] * len(g) for s, g in enumerate(gaps)])
        gain = intervals.mean_with_ci(
            np.concatenate(gaps), clusters if len(gaps) > 1 else None
        )
        table["cleaned - raw"] = {"mean": gain.mean, "ci95": [gain.low, gain.high]}
        text = json.dumps(table, indent=2) + "\n"
        files.write_atomically(study.folder / "doctor.json", text)
        print(text)


if __name__ == "__main__":
    main()
