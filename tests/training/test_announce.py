"""What a run says of itself."""

from __future__ import annotations

import dataclasses
import logging

import jax
import pytest
import tiny_run

from jaxalign.training import announce
from jaxalign.training import run as runs


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    folder = tmp_path_factory.mktemp("announce")
    data = tiny_run.write_data(folder / "data.jsonl")
    return runs.setup(tiny_run.make_run(folder / "run", data, folder, "DPO"))


def test_a_run_says_what_it_is(ready):
    run = ready.run
    objective, data, start, steps = announce.describe(run, ready, 0)
    leaves = jax.tree.leaves(ready.abstract_state.params["policy"])
    count = sum(leaf.size for leaf in leaves)
    assert objective == (
        f"DPO of a T5: {count:,} parameters (1+1 layers of width 16, 384 ids)"
    )
    assert data.startswith("Data: ") and "rows (" in data and "data.jsonl" in data
    assert "evaluation: " in data
    assert start == "Start: random weights; reference (cached): random weights"
    assert steps.startswith("Steps 0 to 6, 8 rows each, on data=")
    begun = dataclasses.replace(
        run, initial_checkpoint_path="runs/sft", reference_checkpoint_path="runs/ref"
    )
    assert announce.describe(begun, ready, 0)[2] == (
        "Start: runs/sft; reference (cached): runs/ref"
    )
    assert announce.describe(begun, ready, 4)[2].startswith(
        "Start: this run's checkpoint of step 4; "
    )


def test_a_preference_objective_from_random_weights_warns(ready, caplog):
    caplog.set_level(logging.INFO, "jaxalign")
    announce.started(ready.run, ready, 0)
    warning = "DPO starts from random weights, and the reference is it too"
    assert warning in caplog.text
    caplog.clear()
    announce.started(ready.run, ready, 4)  # it goes on
    started = dataclasses.replace(ready.run, initial_checkpoint_path="runs/sft")
    announce.started(started, ready, 0)
    assert not [r for r in caplog.records if r.levelno > logging.INFO]


def test_the_end_says_what_is_next(caplog):
    caplog.set_level(logging.INFO, "jaxalign")
    announce.ended("runs/my dpo", 100)
    assert "Finished at step 100: runs/my dpo/checkpoints/100" in caplog.text
    assert "jaxalign generate --checkpoint='runs/my dpo' --prompts" in caplog.text
    assert "jaxalign report 'runs/my dpo'" in caplog.text
