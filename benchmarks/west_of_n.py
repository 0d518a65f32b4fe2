"""Is West-of-N worth more than more human pairs, and from which N on?

    python benchmarks/west_of_n.py --run_dir=runs/west_bench --seeds=3 --n=2,16,64

Pairs of the embedded village, labelled by its true reward with a share of the labels
turned round, stand for people's. A base reward model learns from them; a policy
trained on demonstrations is sampled at other prompts; for each N a new reward model
learns from the mixture. It is compared with the base and with models of 1.5 and 2 times
as many human pairs, by the share of unseen pairs that each orders as the true reward
does; and so are pairs of the policy's own samples, which are what it is for. All take
as many steps. Intervals are over seeds; a plot is on the page.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign import files, judges, world
from jaxalign.data import jsonl
from jaxalign.evaluation import intervals
from jaxalign.inference import generation
from jaxalign.pipelines import pools, quickstart, west_of_n
from jaxalign.pipelines.study import Study
from jaxalign.report.bars import Plot, figure

SETTINGS = [
    "TASK_FEATURE_LENGTHS = {'inputs': 48, 'targets': 64}",
    "BATCH_SIZE = 32",
    "PACKING = 1",
    "LEARNING_RATE = 2e-3",
    "WARMUP_STEPS = 50",
    "OPTIMIZER_NAME = 'adamw'",
    "SCHEDULE = @schedules.cosine()",
    "run.Run.sampler = None",
    "CENTRE = 0.01",
    "EVAL_FRACTION = 0.0",
]


def write_human(output: Path, split: str, size: int, seed: int, noise: float) -> None:
    """Pairs in the order of their true rewards, of which some are turned round."""
    draw, rows = random.Random(f"{seed} {split}"), []
    for row in world.rows("preference", split, 4 * size, seed):
        texts = [row["chosen"], row["rejected"]]
        texts.sort(key=lambda text: -world.true_reward(row["prompt"], text))
        best, worst = (world.true_reward(row["prompt"], text) for text in texts)
        if best > worst and len(rows) < size:
            sides = texts[::-1] if draw.random() < noise else texts
            pair = dict(zip(("chosen", "rejected"), sides, strict=True))
            rows.append({"prompt": row["prompt"], **pair})
    jsonl.write_rows(output, rows)


def write_prompts(output: Path, split: str, size: int, seed: int) -> None:
    """Prompts to sample at, drawn by another seed than the pairs'."""
    texts = world.sample_prompts(split, size, seed + 1000)
    jsonl.write_rows(output, [{"prompt": text} for text in dict.fromkeys(texts)])


def write_own(output: Path, samples: Path) -> None:
    """Two samples of each prompt that the true reward tells apart, in its order."""
    rows = []
    for pool in pools.pools(samples):
        worth = [world.true_reward(pool["prompt"], r) for r in pool["responses"]]
        if len({*worth[:2]}) == 2:
            best = int(worth[1] > worth[0])
            sides = pool["responses"][best], pool["responses"][1 - best]
            pair = dict(zip(("chosen", "rejected"), sides, strict=True))
            rows.append({"prompt": pool["prompt"], **pair})
    jsonl.write_rows(output, rows)


def accuracy(model: Path, path: Path) -> float:
    """The share of pairs that a model orders as the true reward does."""
    rows, judge = jsonl.read_rows(path), judges.resolve(f"reward:{model}")
    texts = [row[side] for side in ("chosen", "rejected") for row in rows]
    scores = judge([row["prompt"] for row in rows] * 2, texts)
    found = np.sign(scores[: len(rows)] - scores[len(rows) :])
    return float((found + 1).mean() / 2)


def labels(home: Path) -> float:
    """The share of the synthetic pairs whose label is the true reward's."""
    rows = jsonl.read_rows(home / "round1/pairs.jsonl")
    gaps = [
        world.true_reward(r["prompt"], r["chosen"])
        - world.true_reward(r["prompt"], r["rejected"])
        for r in rows
    ]
    return float((np.sign(gaps) + 1).mean() / 2)


def one(study: Study, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    home = f"seed{seed}"
    policy = quickstart.train(
        study,
        f"{home}/sft",
        "supervised",
        asked.demonstrations,
        seed,
        {**quickstart.SFT, "TRAIN_STEPS": asked.policy_steps},
    )
    of: dict[str, Any] = {"split": "train", "seed": seed}
    test = study.file(f"{home}/test.jsonl", write_human, split="test", size=1000,
                      seed=seed, noise=0.0)  # fmt: skip
    prompts = study.file(
        f"{home}/prompts.jsonl", write_prompts, size=asked.prompts, **of
    )
    unseen = study.file(f"{home}/unseen.jsonl", write_prompts, split="test", size=500,
                        seed=seed)  # fmt: skip
    sampled = study.file(
        f"{home}/drawn.jsonl", generation.generate, checkpoint=policy, prompts=unseen,
        num_samples=8, temperature=1.0, max_new_tokens=64, seed=seed,
        execution={"batch_size": 32},
    )  # fmt: skip
    own = study.file(f"{home}/own.jsonl", write_own, samples=sampled)
    told: dict[str, Any] = {}

    def measure(name: str, model: Path) -> None:
        told[name] = accuracy(model, test)
        told[f"{name}, on samples"] = accuracy(model, own)

    for share in (1.0, 1.5, 2.0):
        name = f"human x{share:g}"
        size = round(share * asked.pairs)
        data = study.file(
            f"{home}/human{share:g}.jsonl",
            write_human,
            noise=asked.noise,
            size=size,
            **of,
        )
        model = study.train(
            f"{home}/model{share:g}",
            ["runs/reward_model.gin"],
            bindings=SETTINGS,
            execution={"CACHE_DIR": str(study.folder / "cache")},
            DATA=data,
            TRAIN_STEPS=asked.steps,
            RANDOM_SEED=seed,
        )
        measure(name, model)
        if share == 1.0:
            human, base = data, model
    for n in asked.n:
        folder = study.folder / home / f"n{n}"
        west_of_n.run(
            data=str(human),
            policy=str(policy),
            base=f"reward:{base}?scale=raw",
            prompts=str(prompts),
            test=str(test),
            run_dir=str(folder),
            num_samples=n,
            temperature=asked.temperature,
            max_new_tokens=64,
            batch_size=32,
            bindings=[*SETTINGS, f"TRAIN_STEPS = {asked.steps}"],
            seed=seed,
        )
        measure(f"N = {n}", folder / "round1/model")
        told[f"N = {n}, labels right"] = labels(folder)
    return told


def plot(table: dict[str, Any], n: list[int]) -> str:
    """Accuracy by N beside that of more human pairs."""
    drawn = []
    for ending, caption in (("", "Unseen pairs"), (", on samples", "Its own samples")):
        means = [table[f"N = {k}{ending}"]["mean"] for k in n]
        human = [table[f"human x{s}{ending}"]["mean"] for s in ("1", "1.5", "2")]
        low, high = min(means + human), max(means + human)
        shown = Plot(
            (np.log2(n[0]), np.log2(n[-1])),
            (low - 0.01, high + 0.01),
            x_label="log2 N",
            title=caption,
        )
        shown.line(np.log2(n), means, 0)
        for value in human:
            shown.level(value)
        note = "Dashed: human pairs, 1, 1.5 and 2 times as many."
        drawn.append(figure(shown, f"{caption}: accuracy by N", note))
    return f'<div class="grid">{"".join(drawn)}</div>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run_dir", default="runs/west_bench")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--demonstrations", type=int, default=4000)
    parser.add_argument("--policy_steps", type=int, default=400)
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--n", default="2,16,64")
    asked = parser.parse_args()
    asked.n = [int(n) for n in asked.n.split(",")]
    found = []
    with Study(asked.run_dir) as study:
        for seed in range(asked.seeds):
            found.append(one(study, seed, asked))
            print(found[-1], flush=True)
        table: dict[str, Any] = {}
        names = list(found[0])
        gains = [f"N = {n}" for n in asked.n]
        for name in names:
            table[name] = summary([told[name] for told in found])
        for name in gains:
            for other in ("human x1", "human x1.5", "human x2"):
                values = [told[name] - told[other] for told in found]
                table[f"{name} - {other}"] = summary(values)
        text = json.dumps(jsonl.nulled(table), indent=2) + "\n"
        files.write_atomically(study.folder / "west_of_n.json", text)
        study.page("West-of-N by N", f"{plot(table, asked.n)}<pre>{text}</pre>")
        print(text)


def summary(values: list[float]) -> dict[str, Any]:
    """A mean over seeds, with Student's interval of them."""
    mean = intervals.mean_with_ci(values)
    return {"seeds": values, "mean": mean.mean, "ci95": [mean.low, mean.high]}


if __name__ == "__main__":
    main()
