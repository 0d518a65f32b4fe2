"""LoRA on T5 1.1 XL: planned for a GPU that is not here, and run on what is.

    CHECKPOINT=flan-t5-xl PAIRS=pairs.jsonl python examples/lora_on_xl.py

2.8 billion parameters rest and 9 million train. `jaxalign plan` compiles the step and
says what it takes; the run below has the same settings, of whatever CHECKPOINT is.
"""

# %% One configuration for the plan and the run
import json
import os
import subprocess
import sys
from pathlib import Path

import tiny

import jaxalign

SETTINGS = {
    "TASK_FEATURE_LENGTHS": {"inputs": 512, "targets": 128},
    "PACKING": 1,
    "REFERENCE": "online",  # the base that is there without LoRA: no second copy
    "LORA_RANK": 16,
    "models.T5Config.scan_layers": True,  # compiles one layer instead of 24
    "models.T5Config.remat_policy": "full",  # computes activations again
}
FILES = ["runs/dpo.gin", "adapters/lora.gin"]

# %% Does XL fit on one GPU of 80 GB? No GPU is needed to know
command = [sys.executable, "-m", "jaxalign.cli", "plan"]
command += ["--topology=gpu-h100:1", "--steps=train", "--batch_size=8"]
command += [f"--gin_file={name}" for name in ("models/t5_1_1_xl.gin", *FILES)]
command += [f"--gin.{name}={value!r}" for name, value in SETTINGS.items()]
subprocess.run([*command, "--output=runs/examples/lora_on_xl.json"], check=True)
plan = json.loads(Path("runs/examples/lora_on_xl.json").read_text())
memory = plan["candidates"][0]["hbm_bytes"]
limit = memory.pop("limit")
needed = sum(memory.values())
print(f"XL with LoRA takes {needed / 2**30:.1f} GiB of {limit / 2**30:.0f}")

# %% The same for real
checkpoint, pairs = os.environ.get("CHECKPOINT"), os.environ.get("PAIRS")
small = {} if checkpoint else tiny.SETTINGS
checkpoint = checkpoint or tiny.checkpoint()
rows = [
    {"prompt": f"Is {n} even?", "chosen": answer, "rejected": other}
    for n in range(64)
    for answer, other in [("Yes.", "No.") if n % 2 == 0 else ("No.", "Yes.")]
]
if not pairs:
    pairs = Path("runs/examples/even_pairs.jsonl")
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
policy = jaxalign.train(
    objective="dpo",
    checkpoint=checkpoint,
    data=pairs,
    run_dir="runs/examples/lora",
    gin_files=["adapters/lora.gin"],
    steps=40,
    **SETTINGS | small,
)

# %% Its checkpoints hold the adapter alone; peft loads it beside the same checkpoint
if not Path("runs/examples/lora_peft").exists():
    command = [sys.executable, "-m", "jaxalign.cli", "convert", "runs/examples/lora"]
    command += ["runs/examples/lora_peft", "--format=peft"]
    subprocess.run(command, check=True)
start = jaxalign.load(checkpoint)
texts = [[row[name] for row in rows] for name in ("prompt", "chosen", "rejected")]
margins = []
for which in (start, policy):
    likely, unlikely = (which.score(texts[0], answers) for answers in texts[1:])
    margins.append((sum(likely) - sum(unlikely)) / len(rows))
before, after = margins
print(f"margin of the chosen answer: {before:+.2f} nats before, {after:+.2f} after")
