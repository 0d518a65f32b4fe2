"""Real processes: they meet, they agree with one process, they name who is missing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from jaxalign.training import distributed

LAUNCHER = Path(__file__).parents[2] / "launch" / "local.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "on"}, "--distributed=on: expected auto or off"),
        ({"process_count": 2}, "Give all of --coordinator_address"),
        (
            {"coordinator_address": "host", "process_count": 2, "process_index": 0},
            "expected HOST:PORT",
        ),
        (
            {"coordinator_address": "h:1", "process_count": 2, "process_index": 2},
            r"must lie in \[0, 2\)",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        distributed.Settings(**settings)


def test_one_process_is_no_job(monkeypatch):
    monkeypatch.setattr(distributed.jax.distributed, "initialize", None)
    distributed.start(distributed.Settings("off", "127.0.0.1:1", 2, 0))
    distributed.start(distributed.Settings("auto", "127.0.0.1:1", 1, 0))
    for name in ("SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    distributed.start(distributed.Settings())


def meet(count: int, present: list[int], timeout: float) -> dict[int, str]:
    address = f"127.0.0.1:{free_port()}"
    said = {}

    def come(index: int) -> None:
        try:
            distributed.rendezvous(address, count, index, timeout)
            said[index] = "all here"
        except distributed.MissingProcessesError as error:
            said[index] = str(error)

    threads = [threading.Thread(target=come, args=(i,)) for i in present]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_processes_meet_and_everyone_hears_who_is_missing():
    assert meet(3, [2, 0, 1], 20) == dict.fromkeys(range(3), "all here")
    said = meet(4, [0, 2], 1.0)
    assert set(said) == {0, 2}
    assert all("Processes [1, 3] of 4 did not come" in text for text in said.values())
    assert "Processes [0] of 2" in meet(2, [1], 0.5)[1]


def launch(work: Path, name: str, n: int, devices: int, *more: str):
    """A training run by the launcher, one process with `devices` where n is 1."""
    command = [
        *(sys.executable, str(LAUNCHER), "-n", str(n)),
        *(f"--devices_per_process={devices}", "--grace=10", "--"),
        *(sys.executable, "-m", "jaxalign.cli", "train", "--gin_file=runs/dpo.gin"),
        f"--gin.DATA='{work / 'data.jsonl'}'",
        f"--gin.CACHE_DIR='{work / f'cache_{name}'}'",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 16}",
        *("--gin.BATCH_SIZE=8", "--gin.LOG_PERIOD=1", "--gin.EVAL_PERIOD=2"),
        "--gin.CHECKPOINT_PERIOD=2",
        "--gin.sampling.Sampler.max_new_tokens=4",
        "--gin.models.T5Config.num_encoder_layers=1",
        "--gin.models.T5Config.num_decoder_layers=1",
        *(f"--run_dir={work / name}", "--distributed_timeout=120", *more),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=500, env=environment
    )


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    tiny_run.write_data(folder / "data.jsonl")
    return folder


@pytest.mark.slow
def test_one_device_eight_devices_and_two_processes_agree_and_resume_each_other(work):
    """Reference caching, training, evaluation, samples and checkpoints in each."""
    mesh = "--gin.MESH={'data': 2, 'fsdp': 2, 'tensor': 2}"
    steps = "--gin.TRAIN_STEPS=4"
    for name, n, devices, more in (
        ("one", 1, 1, ()),
        ("eight", 1, 8, (mesh,)),
        ("two_by_four", 2, 4, (mesh,)),
    ):
        done = launch(work, name, n, devices, steps, *more)
        assert done.returncode == 0, done.stdout[-3000:]
        assert len(losses(work / name)) == 4
        samples = (work / name / "samples" / "4.jsonl").read_text().splitlines()
        assert len(samples) == 3  # what is held out of 60 prompts
    # The same mesh on one or two processes: the same bits.
    assert (
        manifest(work / "eight")["params_fingerprint"]
        == manifest(work / "two_by_four")["params_fingerprint"]
    )
    for name in ("eight", "two_by_four"):
        np.testing.assert_allclose(losses(work / name), losses(work / "one"), rtol=1e-5)
    # A checkpoint of two processes goes on elsewhere, on the same batches.
    for name, devices in (("two_by_four", 4), ("two_by_four", 1), ("two_by_four", 8)):
        already = manifest(work / name)["step"]
        done = launch(work, name, 1, devices, f"--gin.TRAIN_STEPS={already + 2}")
        assert done.returncode == 0, done.stdout[-3000:]
        assert f"at step {already}" in done.stdout
    done = launch(work, "one", 1, 1, "--gin.TRAIN_STEPS=10")
    assert done.returncode == 0, done.stdout[-3000:]
    np.testing.assert_allclose(
        losses(work / "two_by_four"), losses(work / "one"), rtol=1e-5
    )


@pytest.mark.slow
def test_two_processes_generate_what_one_does(work):
    done = launch(work, "sft", 1, 1, "--gin.TRAIN_STEPS=2", "--gin_file=runs/sft.gin")
    assert done.returncode == 0, done.stdout[-3000:]
    texts = {}
    for n, devices in ((1, 1), (1, 4), (2, 2)):
        output = work / f"generated_{n}_{devices}.jsonl"
        command = [
            *(sys.executable, str(LAUNCHER), "-n", str(n)),
            *(f"--devices_per_process={devices}", "--"),
            *(sys.executable, "-m", "jaxalign.cli", "generate"),
            *(f"--checkpoint={work / 'sft'}", f"--prompts={work / 'data.jsonl'}"),
            *(f"--output={output}", "--num_samples=2", "--max_new_tokens=6"),
            "--batch_size=8",
        ]
        if n * devices > 1:
            command.append("--gin.MESH={'data': -1}")
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=500, env=environment
        )
        assert done.returncode == 0, done.stdout[-3000:]
        lines = map(json.loads, output.read_text().splitlines())
        texts[n, devices] = [line["response"] for line in lines]
    assert len(texts[1, 1]) == 120
    assert texts[1, 1] == texts[1, 4] == texts[2, 2]


@pytest.mark.slow
def test_a_missing_process_is_named_and_the_job_ends(work):
    address = f"127.0.0.1:{free_port()}"
    command = [
        *(sys.executable, "-m", "jaxalign.cli", "train", "--gin_file=runs/sft.gin"),
        *(f"--coordinator_address={address}", "--process_count=3"),
        *("--process_index=0", "--distributed_timeout=2"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Processes [1, 2] of 3 did not come" in done.stderr


def test_the_launchers_dry_run_prints_every_processs_command():
    command = [sys.executable, str(LAUNCHER), "-n", "2", "--devices_per_process=4"]
    done = subprocess.run(
        [*command, "--dry_run", "--", "jaxalign", "train", "--gin.DATA='a b'"],
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 2
    assert "JAX_NUM_CPU_DEVICES=4" in lines[0] and "--process_index=1" in lines[1]
