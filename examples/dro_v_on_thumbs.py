"""DRO-V on thumbs: one answer to each prompt, and whether somebody liked it.

    CHECKPOINT=flan-t5-small THUMBS=thumbs.jsonl python examples/dro_v_on_thumbs.py

Rows are {"prompt", "completion", "label"}. A label is a reward of 1 or 0 to DRO-V, and
a field `reward` of any scale serves as well. KTO reads the same file: objective="kto".
"""

# %% Thumbs: answers that greet by name are liked
import json
import os
from pathlib import Path

import tiny

import jaxalign

checkpoint, thumbs = os.environ.get("CHECKPOINT"), os.environ.get("THUMBS")
settings = {} if checkpoint else tiny.SETTINGS
checkpoint = checkpoint or tiny.checkpoint()
NAMES = ["Ann", "Ben", "Cem", "Dao", "Eva", "Fay", "Gus", "Hal"]

if not thumbs:
    rows = [
        {
            "prompt": f"{name} says {word}.",
            "completion": f"Hi {name}!" if liked else "Go away.",
            "label": liked,
        }
        for name in NAMES
        for word in ("hello", "hi", "good day", "hey")
        for liked in (True, False)
    ]
    thumbs = Path("runs/examples/thumbs.jsonl")
    thumbs.parent.mkdir(parents=True, exist_ok=True)
    thumbs.write_text("".join(json.dumps(row) + "\n" for row in rows))

# %% Two networks learn: the policy, and the value of a prompt that it is held against
policy = jaxalign.train(
    objective="dro_v",
    checkpoint=checkpoint,
    data=thumbs,
    run_dir="runs/examples/dro_v",
    steps=30,
    **settings,
)

# %% By how much has an answer become likelier than it was? In nats
start = jaxalign.load(checkpoint)
prompts = [f"{name} says hello." for name in NAMES]
gains = {}
for answer in ("Hi {}!", "Go away."):
    answers = [answer.format(name) for name in NAMES]
    now, then = (p.score(prompts, answers) for p in (policy, start))
    gains[answer] = sum(now) / len(now) - sum(then) / len(then)
    print(f"{answer:<10} {gains[answer]:+.2f}")
