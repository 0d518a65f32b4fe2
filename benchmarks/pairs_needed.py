"""How many pairs DPO needs, with rationales and without.

    python benchmarks/pairs_needed.py --run_dir=runs/compare --plot=pairs_needed.svg

Both train from the same policy, on the same pairs of the embedded village (rationale
rows, whose preferences hold no noise), for as many steps, whatever the number of pairs;
RDPO also learns the judge's reasons. The policy they start from has been taught to
answer and, on other pairs, to write reasons, as the paper's instructed models have;
``--untaught`` starts from one that only answers. A folder that ``jaxalign compare`` has
written to lends its supervised policies.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np

from jaxalign import files, world
from jaxalign.pipelines import compare, quickstart
from jaxalign.pipelines.study import Study
from jaxalign.prepare import rationales
from jaxalign.report.comparison import pyplot

METHODS = ("dpo", "rdpo")
_TAUGHT_REASONS = 4000


def _write_taught(output: Path, seed: int) -> None:
    """Answers, and reasons for other pairs."""
    order = random.Random(seed)
    rows = list(world.rows("supervised", "train", quickstart.SFT_ROWS, seed))
    for row in world.rows("rationale", "train", _TAUGHT_REASONS, seed + 100):
        chosen_second = order.random() < 0.5
        rows.append(
            {
                "prompt": rationales.rationale_prompt(row, chosen_second),
                "completion": row["rationale"],
            }
        )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    files.write_atomically(output, text)


def teach(study: Study, seed: int, sft: Path) -> Path:
    """Goes on with a supervised policy, on its answers and reasons for other pairs."""
    name = f"data/taught.{_TAUGHT_REASONS}.{seed}.jsonl"
    settings = compare.settings_of("rdpo", 200)[1] | {
        "DATA": study.file(name, _write_taught, seed=seed),
        "BATCH_SIZE": 24,
        "LEARNING_RATE": 1e-2,
        "WARMUP_STEPS": 40,
        "INITIAL_CHECKPOINT_PATH": sft,
    }
    del settings["BETA"]
    rows = quickstart.SFT_ROWS
    home = f"seed{seed}/taught"
    return quickstart.train(study, home, "supervised", rows, seed, settings, "sft")


def measure(
    study: Study,
    sizes: list[int],
    *,
    seeds: int,
    steps: int,
    num_prompts: int,
    split: str,
    settings: dict[str, float],
    taught: bool,
) -> dict[str, list[list[float]]]:
    """Mean true rewards ``{method: [size][seed]}``; finished runs are kept."""
    found: dict[str, dict[int, list[Path]]] = {
        method: {size: [] for size in sizes} for method in METHODS
    }
    for seed in range(seeds):
        sft = compare.supervised(study, seed)
        start, suffix = (teach(study, seed, sft), "-taught") if taught else (sft, "")
        home = f"responses/{split}/seed{seed}"
        prompts = quickstart.village_prompts(study, home, split, num_prompts, seed)
        for size in sizes:
            for method in METHODS:
                own = compare.settings_of(method, steps)[1]
                own |= {"INITIAL_CHECKPOINT_PATH": start}
                own |= settings if method == "rdpo" else {}
                home = f"seed{seed}/{method}-{size}-pairs{suffix}"
                policy = quickstart.train(
                    study, home, "rationale", size, seed, own, method
                )
                answers = compare.answers(study, policy, sft, prompts, seed)
                found[method][size].append(answers)
    return {
        method: [compare.means(paths)["reward"] for paths in by_size.values()]
        for method, by_size in found.items()
    }


def plot(path: str, sizes: list[int], rewards: dict[str, list[list[float]]]) -> None:
    """Rewards against pairs, a line per method and a dot per seed."""
    figure, axes = pyplot().subplots(figsize=(6, 4))
    for method, colour in zip(METHODS, ("tab:blue", "tab:orange"), strict=True):
        values = np.array(rewards[method])
        axes.plot(sizes, values.mean(1), "o-", color=colour, label=method.upper())
        axes.plot(sizes, values, ".", color=colour, alpha=0.5, markersize=4)
    axes.axhline(
        np.mean(rewards["dpo"][-1]), color="tab:blue", linestyle=":", linewidth=1
    )
    axes.set_xscale("log")
    axes.set_xticks(sizes, sizes)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("pairs")
    axes.set_ylabel("true reward")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run_dir", type=Path, default=Path("runs/compare"))
    parser.add_argument("--sizes", default="250,1000,4000")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--num_prompts", type=int, default=300)
    parser.add_argument("--split", default="test")
    parser.add_argument("--gamma", type=float, default=0.1, help="RDPO's")
    parser.add_argument("--untaught", action="store_true")
    parser.add_argument("--plot", help="file to draw into (.svg, .png)")
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    with Study(args.run_dir) as study:
        rewards = measure(
            study,
            sizes,
            seeds=args.seeds,
            steps=args.steps,
            num_prompts=args.num_prompts,
            split=args.split,
            settings={"GAMMA": args.gamma},
            taught=not args.untaught,
        )
    print(f"\n{'pairs':>8}" + "".join(f"{m:>20}" for m in METHODS))
    for i, size in enumerate(sizes):
        cells = []
        for method in METHODS:
            values = rewards[method][i]
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            cells.append(f"{np.mean(values):.3f} +- {spread:.3f}")
        print(f"{size:>8}" + "".join(f"{cell:>20}" for cell in cells))
    if args.plot:
        plot(args.plot, sizes, rewards)


if __name__ == "__main__":
    main()
