"""The loop end to end: runs, resumes, refuses, and stops on NaN."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from jaxalign import objectives
from jaxalign.training import checkpoints, optimizers, run_directory, starts
from jaxalign.training import train as loop


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    tiny_run.write_data(folder / "data.jsonl")
    return folder


def run(work, name, objective="DPO", **changes):
    return tiny_run.make_run(
        work / name, work / "data.jsonl", work, objective, **changes
    )


def fingerprint(folder) -> str:
    return run_directory.read_manifest(folder)["params_fingerprint"]


def metrics(folder) -> list[dict]:
    """Metric lines without what depends on the clock."""
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if "second" not in k and k != "time"}
        for line in lines
    ]


# The slow tests take all.
_FIRST = {"SFT"}


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(name, marks=() if name in _FIRST else pytest.mark.slow)
        for name in sorted(objectives.OBJECTIVES)
    ],
)
def test_every_objective_trains_from_a_file(work, objective):
    folder = work / f"all_{objective}"
    job = run(work, folder.name, objective, mesh=None, sampler=tiny_run.sampler())
    last = loop.train(job)
    assert np.isfinite(list(last.values())).all()
    manifest = run_directory.read_manifest(folder)
    assert manifest["status"] == "finished"
    assert manifest["step"] == tiny_run.STEPS
    assert any("eval/objective" in line for line in metrics(folder))
    main = checkpoints.load(folder, None)
    print_ = checkpoints.params_fingerprint(main.params)
    assert print_ == manifest["networks"][main.name]
    if main.name == "policy":
        samples = (folder / "samples" / "6.jsonl").read_text().splitlines()
        assert set(json.loads(samples[0])) >= {"prompt", "response", "target", "logp"}


@pytest.fixture(scope="module")
def unbroken(work) -> Path:
    """A run that nobody kills, in this process."""
    loop.train(run(work, "unbroken"))
    return work / "unbroken"


def _process(work, name, *kill) -> subprocess.CompletedProcess:
    script = Path(tiny_run.__file__)
    return subprocess.run(
        [sys.executable, str(script), str(work / name), str(work), "DPO", *kill],
        capture_output=True,
        text=True,
        timeout=300,
    )


# Between steps, while the checkpoint of step 4 is written, in the evaluation at step 3.
@pytest.mark.parametrize(
    ("moment", "at", "checkpoint"),
    [
        ("step", "3", 2),
        pytest.param("write", "2", 2, marks=pytest.mark.slow),
        pytest.param("evaluation", "1", 2, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_with_the_bits_of_an_unkilled_one(
    work, unbroken, moment, at, checkpoint
):
    name = f"killed_{moment}"
    killed = _process(work, name, moment, at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert run_directory.read_manifest(work / name)["status"] == "running"
    resumed = _process(work, name)
    assert resumed.returncode == 0, resumed.stderr
    assert f"at step {checkpoint}" in resumed.stderr
    assert fingerprint(work / name) == fingerprint(unbroken)
    assert metrics(work / name) == metrics(unbroken)


def test_sigterm_saves_and_exits_cleanly(work, unbroken, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "summarize", loop.summarize)  # restored at the end
        tiny_run.arm("sigterm", 3)
        loop.train(run(work, "terminated"))
    manifest = run_directory.read_manifest(work / "terminated")
    assert (manifest["status"], manifest["step"]) == ("interrupted", 4)
    loop.train(run(work, "terminated"))
    assert fingerprint(work / "terminated") == fingerprint(unbroken)


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(work, unbroken):
    stopped = _process(work, "full", "disk_full", "2")
    assert stopped.returncode == 1
    assert "CheckpointWriteError: The checkpoint of step 4" in stopped.stderr
    assert "That of step 2 is intact: make room" in stopped.stderr
    resumed = _process(work, "full")
    assert resumed.returncode == 0, resumed.stderr
    assert "at step 2" in resumed.stderr
    assert fingerprint(work / "full") == fingerprint(unbroken)
    assert metrics(work / "full") == metrics(unbroken)


def test_a_nan_stops_with_the_step_and_leaves_the_last_checkpoint(work):
    folder = work / "nan"
    # A rate that overflows in the third step; the loss of the fourth is not finite.
    optimizer = optimizers.optimizer(
        "adamw", learning_rate=lambda s: jnp.where(s < 2, 1e-2, 1e30)
    )
    loop.train(run(work, "nan", train_steps=2, optimizer=optimizer))
    good = fingerprint(folder)
    broken = run(work, "nan", optimizer=optimizer)
    with pytest.raises(loop.NonFiniteLossError, match=r"step 4 is NaN"):
        loop.train(broken)
    assert fingerprint(folder) == good
    saved = np.load(folder / "non_finite_step_4.npz")
    assert saved["encoder_input_tokens"].shape[0] == 8


def test_a_damaged_checkpoint_is_skipped_and_written_again(work, unbroken, caplog):
    folder = work / "damaged"
    loop.train(run(work, "damaged", train_steps=4))
    files = [p for p in (folder / "checkpoints" / "4").rglob("*") if p.is_file()]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    loop.train(run(work, "damaged"))
    assert "going back to step 2" in caplog.text
    assert fingerprint(folder) == fingerprint(unbroken)


def test_a_run_on_other_data_is_refused(work, tmp_path):
    loop.train(run(work, "first", train_steps=2))
    other = tmp_path / "other.jsonl"
    tiny_run.write_data(other, count=50)
    job = tiny_run.make_run(work / "first", other, tmp_path)
    with pytest.raises(ValueError, match="data_fingerprint: saved .*, now"):
        loop.train(job)


def test_reference_cache_and_reference_in_the_step_give_the_same_bits(work):
    loop.train(run(work, "sft", "SFT"))
    for reference in ("cached", "online"):
        loop.train(
            run(
                work,
                f"ref_{reference}",
                reference=reference,
                initial_checkpoint_path=str(work / "sft"),
            )
        )
    assert fingerprint(work / "ref_cached") == fingerprint(work / "ref_online")
    start = metrics(work / "ref_cached")[0]
    assert start["train/rewards/margins"] == 0.0
    np.testing.assert_allclose(start["train/loss"], np.log(2.0), rtol=1e-6)


def test_alignment_starts_from_the_supervised_policy(work):
    loop.train(run(work, "base", "SFT"))
    job = run(work, "dro", "DROV", initial_checkpoint_path=str(work / "base"))
    ready = loop.setup(job)
    policy = checkpoints.load(work / "base").params
    loaded = {"policy": starts.load_network(str(work / "base"), "policy", ready)}
    params = ready.init_networks(jax.random.key(0), loaded)
    for network in ("policy", "value"):
        found = params[network]["encoder"]
        jax.tree.map(np.testing.assert_array_equal, found, policy["encoder"])


def test_another_network_is_refused_by_name(work):
    loop.train(run(work, "small", "SFT", train_steps=2))
    wider = dataclasses.replace(tiny_run.CONFIG, mlp_dim=64)
    job = run(
        work,
        "wider",
        model=type(run(work, "x").model)(wider),
        initial_checkpoint_path=str(work / "small"),
    )
    with pytest.raises(ValueError, match="mlp_dim: checkpoint 32, MODEL 64"):
        loop.train(job)


def test_batches_that_do_not_divide_are_refused_before_anything_is_read(work):
    job = run(work, "y", mesh={"data": 8}, batch_size=12)
    with pytest.raises(ValueError, match=r"BATCH_SIZE=12 .* nearest: \[8, 16\]"):
        loop.setup(job)
