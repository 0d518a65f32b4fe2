"""A reward from Python: sample, judge, keep the best, learn from best against worst.

    CHECKPOINT=flan-t5-small python examples/reward_from_python.py

The judge is a function in short_answers.py. `jaxalign iterate` does the same in rounds
that go on where they were stopped; here each step is in sight.
"""

# %% A policy and a judge
import json
import os
from pathlib import Path

import tiny

import jaxalign
from jaxalign import judges

checkpoint = os.environ.get("CHECKPOINT")
settings = {} if checkpoint else tiny.SETTINGS
checkpoint = checkpoint or tiny.checkpoint()
policy = jaxalign.load(checkpoint)
judge = judges.resolve(f"{Path(__file__).parent}/short_answers.py:score")

# %% Best of n
prompts = [f"Tell me about the number {n}." for n in range(32)]


def judged(policy, seed):
    """Each prompt's samples, best first, with their scores."""
    samples = policy.generate(prompts, num_samples=6, max_new_tokens=12, seed=seed)
    found = []
    for prompt, texts in zip(prompts, samples, strict=True):
        scores = judge([prompt] * len(texts), texts)
        found.append(sorted(zip(scores.tolist(), texts, strict=True), reverse=True))
    return found


def mean(ranked, which=slice(None)):
    scores = [score for found in ranked for score, _ in found[which]]
    return sum(scores) / len(scores)


ranked = judged(policy, seed=0)
print(f"mean {mean(ranked):.2f}, best of 6 {mean(ranked, slice(1)):.2f}")

# %% The best against the worst are pairs
pairs = Path("runs/examples/judged.jsonl")
pairs.parent.mkdir(parents=True, exist_ok=True)
with pairs.open("w") as file:
    for prompt, found in zip(prompts, ranked, strict=True):
        (high, best), (low, worst) = found[0], found[-1]
        if high > low and best and worst:
            row = {"prompt": prompt, "chosen": best, "rejected": worst}
            file.write(json.dumps(row) + "\n")

aligned = jaxalign.train(
    objective="dpo",
    checkpoint=checkpoint,
    data=pairs,
    run_dir="runs/examples/judged",
    steps=30,
    **settings,
)

# %% One sample of the aligned policy against one of its start
before, after = mean(ranked), mean(judged(aligned, seed=1))
print(f"mean score: {before:.2f} before, {after:.2f} after")
