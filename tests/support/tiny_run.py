"""A training run of a tiny network, in this process or killed in another one.

``python tiny_run.py RUN_DIR CACHE_DIR OBJECTIVE [MOMENT COUNT]`` trains, and sends
itself SIGKILL (SIGTERM for ``sigterm``) when MOMENT comes for the COUNT-th time.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from pathlib import Path

# As in conftest.py, for the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import orbax.checkpoint as ocp

from jaxalign import models, objectives
from jaxalign import vocabularies as vocabs
from jaxalign.training import (
    checkpoint_writer,
    inputs,
    optimizers,
    sampling,
    schedules,
)
from jaxalign.training import train as loop

STEPS = 6
CONFIG = models.T5Config(
    vocab_size=384,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=1,
    num_decoder_layers=1,
)


def write_data(path: Path, count: int = 60) -> Path:
    """Rows that serve every schema."""
    rows = [
        {
            "prompt": f"say {i}",
            "chosen": f"it is {i}",
            "rejected": "no" * (i % 5 + 1),
            "completion": f"it is {i}",
            "reward": (i * 7 % 11) / 10,
            "label": i % 3 > 0,
            "rationale": f"[chosen] says {i}",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_run(run_dir, data, cache_dir, objective="DPO", **changes) -> loop.Run:
    """A run of six steps with checkpoints at 2, 4, 6 and evaluation at 3, 6."""
    dataset = inputs.Dataset(
        data=str(data),
        feature_lengths={"inputs": 12, "targets": 12},
        batch_size=changes.pop("batch_size", 8),
        eval_fraction=0.2,
        packing=2,
        cache_dir=str(cache_dir),
        **changes.pop("dataset", {}),
    )
    settings = {
        "model": models.T5(CONFIG),
        "objective": objectives.OBJECTIVES[objective],
        "vocabulary": vocabs.ByteVocabulary(extra_ids=125),
        "dataset": dataset,
        "optimizer": optimizers.optimizer(
            "adamw", learning_rate=schedules.constant(1e-2, warmup_steps=2)
        ),
        "train_steps": STEPS,
        "run_dir": str(run_dir),
        "eval_period": 3,
        "checkpoint_period": 2,
        "log_period": 1,
        "sampler": None,
    }
    return loop.Run(**{**settings, **changes})


def arm(moment: str, step: int) -> None:
    """Plants a kill by its moment, a SIGTERM or a full disk."""
    if moment == "disk_full":
        fill_disk(step)
        return
    name = signal.SIGTERM if moment == "sigterm" else signal.SIGKILL
    calls = {"count": 0}

    def wrap(owner, attribute, at):
        original = getattr(owner, attribute)

        def wrapped(*args, **kwargs):
            calls["count"] += 1
            if calls["count"] == at:
                os.kill(os.getpid(), name)
            return original(*args, **kwargs)

        setattr(owner, attribute, wrapped)

    if moment in ("step", "sigterm"):
        wrap(loop, "summarize", step)  # every step is logged; the fourth is evaluation
    elif moment == "write":
        # Orbax's writer thread has started; here it is waited for.
        wrap(ocp.CheckpointManager, "wait_until_finished", step)
    elif moment == "evaluation":
        wrap(loop.steps, "evaluation_loss", step)
    else:
        raise ValueError(moment)


def fill_disk(save: int) -> None:
    """From a save on, files cannot grow beyond a few bytes, as on a full disk."""
    original = checkpoint_writer.Checkpoints.save
    calls = {"count": 0}

    def full(*args, **kwargs):
        calls["count"] += 1
        if calls["count"] == save:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
        return original(*args, **kwargs)

    checkpoint_writer.Checkpoints.save = full


def sampler() -> sampling.Sampler:
    return sampling.Sampler(num_prompts=2, max_new_tokens=4)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, force=True)
    run_dir, cache_dir, objective, *kill = sys.argv[1:]
    if kill:
        arm(kill[0], int(kill[1]))
    data = Path(cache_dir) / "data.jsonl"
    loop.train(make_run(run_dir, data, cache_dir, objective))
