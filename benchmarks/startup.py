"""Seconds from the command to its end, of the smallest work: what a start costs.

    python benchmarks/startup.py [--runs=5] [--verbs=import,train,generate,score]

A tiny T5 is trained for one step, samples one answer and scores one, each time in a new
process, in a folder of its own whose compilation cache the first run of each fills (it
is told apart). One line of JSON for each: median, smallest and largest seconds, and
the median processor time, which other load on the machine changes least.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PAIRS = [
    {"prompt": f"Is {n} even?", "chosen": "yes" if n % 2 == 0 else "no"}
    | {"rejected": "no" if n % 2 == 0 else "yes"}
    for n in range(40)
]
JAXALIGN = [sys.executable, "-m", "jaxalign.cli"]
GIN = ["--gin_file=models/t5_1_1_tiny.gin", "--gin.CACHE_DIR=cache"]


def commands(i: int) -> dict[str, list[str]]:
    """The `i`-th run of every verb; what it writes is new each time."""
    train = [*JAXALIGN, "train", "--gin_file=runs/dpo.gin", *GIN, "--data=pairs.jsonl"]
    policy = "--checkpoint=trained0"
    return {
        "import": [sys.executable, "-c", "import jaxalign.training.train"],
        "train": [*train, "--steps=1", f"--run_dir=trained{i}"],
        "generate": [
            *(*JAXALIGN, "generate", policy, "--prompts=prompts.jsonl"),
            *("--max_new_tokens=8", f"--output=samples{i}.jsonl"),
        ],
        "score": [
            *(*JAXALIGN, "score", policy, "--data=answers.jsonl"),
            f"--output=scores{i}.jsonl",
        ],
    }


def timed(argv: list[str], folder: Path) -> tuple[float, float]:
    """Seconds of wall and of processor."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "HOME": str(folder)}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)  # the default, under HOME
    before, begun = os.times(), time.perf_counter()
    subprocess.run(argv, cwd=folder, env=env, check=True, capture_output=True)
    wall, after = time.perf_counter() - begun, os.times()
    used = after.children_user - before.children_user
    return wall, used + after.children_system - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--verbs", default=",".join(commands(0)))
    given = parser.parse_args()
    verbs = given.verbs.split(",")
    if unknown := set(verbs) - set(commands(0)):
        parser.error(f"--verbs: {sorted(unknown)} are none of {list(commands(0))}.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = {
            "pairs": PAIRS,
            "prompts": [{"prompt": "Is 3 even?"}],
            "answers": [{"prompt": "Is 3 even?", "completion": "no"}],
        }
        for kind, lines in rows.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"{kind}.jsonl").write_text(text)
        if {"generate", "score"} & set(verbs) and "train" not in verbs:
            timed(commands(0)["train"], folder)
        for verb in verbs:
            first, *found = (
                timed(commands(i)[verb], folder) for i in range(given.runs + 1)
            )
            walls, used = zip(*found, strict=True)
            told = {
                "verb": verb,
                "seconds": round(statistics.median(walls), 2),
                "least": round(min(walls), 2),
                "most": round(max(walls), 2),
                "processor": round(statistics.median(used), 2),
                "first": round(first[0], 2),
            }
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
