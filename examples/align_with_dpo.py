"""Align Flan-T5 with DPO: a checkpoint, a file of pairs, one call, a folder for others.

    CHECKPOINT=flan-t5-small PAIRS=pairs.jsonl python examples/align_with_dpo.py

CHECKPOINT is a Hugging Face folder (`hf download google/flan-t5-small --local-dir
flan-t5-small`), a T5X checkpoint or a run; without it a tiny random network stands in.
"""

# %% What to start from, and what to learn
import json
import logging
import os
import shutil
from pathlib import Path

import tiny

import jaxalign

logging.basicConfig(level=logging.WARNING, format="%(message)s")
logging.getLogger("jaxalign").setLevel(logging.INFO)  # how the run goes

checkpoint, pairs = os.environ.get("CHECKPOINT"), os.environ.get("PAIRS")
settings = {} if checkpoint else tiny.SETTINGS
checkpoint = checkpoint or tiny.checkpoint()
folder = Path("runs/examples/dpo")

if not pairs:
    rows = [
        {
            "prompt": f"Is {n} even?",
            "chosen": "Yes." if n % 2 == 0 else "No.",
            "rejected": "No." if n % 2 == 0 else "Yes.",
        }
        for n in range(64)
    ]
    pairs = Path("runs/examples/even.jsonl")
    pairs.parent.mkdir(parents=True, exist_ok=True)
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))

# %% Which answers does it find likelier before?
rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
prompts, chosen, rejected = (
    [row[name] for row in rows] for name in ("prompt", "chosen", "rejected")
)


def share(policy) -> float:
    """Of pairs whose chosen answer is likelier than the rejected one."""
    scores = (policy.score(prompts, answers) for answers in (chosen, rejected))
    found = [high > low for high, low in zip(*scores, strict=True)]
    return sum(found) / len(found)


before = share(jaxalign.load(checkpoint))

# %% Train; the reference is the start, scored once
policy = jaxalign.train(
    objective="dpo",
    checkpoint=checkpoint,
    data=pairs,
    run_dir=folder,
    steps=40,
    **settings,
)
after = share(policy)
print(f"chosen answers that are likelier: {before:.0%} before, {after:.0%} after")

# %% Use it, and hand it on: AutoModelForSeq2SeqLM.from_pretrained reads this folder
print(policy.generate(prompts[:2], num_samples=2, max_new_tokens=16))
shutil.rmtree("runs/examples/dpo_hf", ignore_errors=True)
policy.save("runs/examples/dpo_hf", format="hf")
