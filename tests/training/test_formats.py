"""Checkpoints that earlier code wrote: format 1, and 2 with and without a reference.

Each archive is a run directory after three steps with its data; the JSON beside it is
what the code that wrote it measured: fingerprints, scores, and how the run went on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from jaxalign.inference import score
from jaxalign.training import checkpoints

BEFORE = Path(__file__).parent / "checkpoints_of_before"
NAMES = ("format1", "format2", "format2_moving")


@pytest.fixture(params=NAMES)
def before(request, tmp_path):
    """A folder with ``run``, and what is known of it."""
    with tarfile.open(BEFORE / f"{request.param}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    known = json.loads((BEFORE / f"{request.param}.json").read_text())
    return tmp_path / request.param, known


def test_its_policy_is_the_one_that_was_written(before):
    folder, known = before
    policy = checkpoints.load(folder / "run")
    assert policy.fingerprint == known["policy_fingerprint"]
    assert policy.fingerprint == checkpoints.params_fingerprint(policy.params)
    assert policy.meta["format"] == known["format"]
    pairs = [(row["prompt"], row["completion"]) for row in known["scores"]]
    logps, lengths = score.score_pairs(policy, pairs)
    # Another processor rounds otherwise.
    np.testing.assert_allclose(logps, [r["logp"] for r in known["scores"]], rtol=1e-5)
    assert lengths.tolist() == [row["num_tokens"] for row in known["scores"]]


@pytest.mark.slow  # a training run in a process of its own
def test_it_goes_on_as_with_the_code_that_wrote_it(before):
    folder, known = before
    data = "prepared" if (folder / "prepared").is_dir() else "rows.jsonl"
    bindings = {
        "DATA": f"'{data}'",
        "CACHE_DIR": "'cache'",
        "BATCH_SIZE": 4,
        "LOG_PERIOD": 1,
        "EVAL_PERIOD": 3,
        "EVAL_FRACTION": 0.2,
        "WARMUP_STEPS": 0,
        "LEARNING_RATE": 1e-2,
        "TRAIN_STEPS": 6,
        "sampling.Sampler.num_prompts": 1,
        "sampling.Sampler.max_new_tokens": 4,
    }
    asked = [f"--gin_file={known['run_file']}", "--gin_file=small.gin", "--run_dir=run"]
    asked += [f"--gin.{name}={value}" for name, value in bindings.items()]
    subprocess.run(
        [sys.executable, "-m", "jaxalign.cli", "train", *asked, *known["bindings"]],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        check=True,
    )
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["step"] > 3]
    for name, values in known["resumed_to_step_6"]["metrics_of_steps_4_to_6"].items():
        found = [row[name] for row in rows if name in row]
        np.testing.assert_allclose(found, values, rtol=1e-4)
    assert checkpoints.read_meta(folder / "run")["format"] == 3
    policy = checkpoints.load(folder / "run")
    assert policy.fingerprint == checkpoints.params_fingerprint(policy.params)
