"""Run directories in a bucket: the bits of local ones, however they were stopped."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import buckets
import jax
import numpy as np
import pytest
import tiny_run

from jaxalign import cli, remote
from jaxalign.inference import evaluation as inference
from jaxalign.training import (
    checkpoints,
    damage,
    mirror,
    remote_checkpoints,
    run_directory,
    starts,
)
from jaxalign.training import train as loop

LAUNCHER = Path(__file__).parents[2] / "launch" / "local.py"


@pytest.fixture(scope="module")
def new_bucket():
    with buckets.server() as make:
        yield make


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mirror")
    tiny_run.write_data(folder / "data.jsonl")
    return folder


@pytest.fixture(scope="module")
def local(work) -> Path:
    """A run in a local folder, to compare with."""
    train(work, work / "local", checkpoint_period=4)
    return work / "local"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Moves to a machine that has copies of nothing."""

    def move(name: str) -> None:
        monkeypatch.setenv(remote.FOLDER_VARIABLE, str(tmp_path / name))

    move("first")
    return move


def train(work, run_dir, objective="SFT", **changes) -> None:
    loop.train(
        tiny_run.make_run(run_dir, work / "data.jsonl", work, objective, **changes),
        "# the configuration",
    )


def manifest(url: str) -> dict:
    return json.loads(buckets.get(f"{url}/manifest.json"))


def losses(text: str) -> list:
    lines = [json.loads(line) for line in text.splitlines()]
    return [(x["step"], x["train/loss"]) for x in lines if "train/loss" in x]


def same_as(url: str, local: Path) -> bool:
    """Whether a run in a bucket has the bits and numbers of a local one."""
    metrics = buckets.get(f"{url}/metrics.jsonl").decode()
    theirs = run_directory.read_manifest(local)
    return manifest(url)["params_fingerprint"] == theirs["params_fingerprint"] and (
        losses(metrics) == losses((local / "metrics.jsonl").read_text())
    )


@pytest.mark.slow
def test_a_run_in_a_bucket_is_resumed_elsewhere_to_the_bits_of_a_local_one(
    work, local, new_bucket, machine, monkeypatch, caplog
):
    caplog.set_level(logging.INFO, "jaxalign")
    url = f"{new_bucket()}/some/run"
    monkeypatch.setattr(mirror, "SECONDS", 0.0)  # every line is copied at once
    train(work, url, train_steps=4, checkpoint_period=4)
    assert manifest(url)["step"] == 4
    machine("second")
    train(work, url, checkpoint_period=4, keep_checkpoints=1)
    assert f"Resumed {url} at step 4" in caplog.text
    assert same_as(url, local)
    assert manifest(url)["status"] == "finished"
    names = remote.listing(url)
    assert buckets.get(f"{url}/config.gin") == b"# the configuration"
    assert sum("tfevents" in name for name in names) > 1
    # One checkpoint is kept, and nothing on the machine.
    assert remote_checkpoints.complete(url) == [6]
    assert not [n for n in names if n.startswith("checkpoints/4")]
    assert not remote.copy_path(url, "runs").exists()
    # What the bucket holds is a run directory like any other.
    fetched = remote.home() / "fetched"
    fs, path = remote.connect(url)
    fs.get(path, str(fetched), recursive=True)
    ours = checkpoints.load(fetched).params
    theirs = checkpoints.load(local).params
    assert checkpoints.params_fingerprint(ours) == checkpoints.params_fingerprint(
        theirs
    )


def checkpoint(folder: mirror.RunFolder, step: int) -> None:
    """Something that looks like a checkpoint to who copies it."""
    path = folder.path / "checkpoints" / str(step) / "policy"
    path.mkdir(parents=True)
    (path / "data").write_text(f"of step {step}")


def test_a_checkpoint_counts_when_it_is_whole(new_bucket, machine, monkeypatch, caplog):
    url = f"{new_bucket()}/run"
    folder = mirror.RunFolder(url, keep=3)
    for step in (2, 4, 6, 8):
        checkpoint(folder, step)
    for step in (2, 4, 6):
        folder.saved(step)
    with monkeypatch.context() as patch:
        upload = remote.upload
        patch.setattr(
            remote, "upload", lambda f: None if "/8.json" in str(f) else upload(f)
        )
        folder.saved(8)
    assert buckets.get(f"{url}/checkpoints/8/policy/data") == b"of step 8"
    assert remote_checkpoints.complete(url) == [2, 4, 6]
    # Of 6 the bytes are others, not the length; of 4 a file is gone.
    buckets.put(f"{url}/checkpoints/6/policy/data", b"of step 7")
    machine("second")
    mirror.RunFolder(url)  # a run that is refused changes nothing
    assert not remote.holds(f"{url}/checkpoints", "6.damaged.json")
    assert resumed(url) == ["4"]
    assert "step 6" in caplog.text and "is not what was written there" in caplog.text
    aside = f"{url}/checkpoints/6.damaged"
    assert buckets.get(f"{aside}/policy/data") == b"of step 7"
    assert remote.holds(f"{url}/checkpoints", "6.damaged.json")
    fs, path = remote.connect(f"{url}/checkpoints/4/policy/data")
    fs.rm_file(path)
    assert resumed(url) == ["2"]
    # The run comes to those steps again: they are written again.
    folder = mirror.RunFolder(url, keep=3)
    checkpoint(folder, 4)
    folder.saved(4)
    assert remote_checkpoints.complete(url) == [2, 4]
    assert resumed(url) == ["4"]
    # Where none is left, the user decides.
    for step in (2, 4):
        buckets.put(f"{url}/checkpoints/{step}/policy/data", b"")
    with pytest.raises(damage.DamagedCheckpointError, match="No checkpoint of s3"):
        resumed(url)
    assert remote_checkpoints.complete(url) == [2, 4]


def resumed(url: str) -> list[str]:
    """The checkpoints that a run which starts now has."""
    folder = mirror.RunFolder(url)
    folder.set_aside([])
    return sorted(p.name for p in (folder.path / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_run_skips_incomplete_and_damaged_checkpoints(
    work, local, new_bucket, machine, monkeypatch, caplog
):
    url = f"{new_bucket()}/run"
    upload = remote.upload

    def full(files):
        if any("checkpoints/6.json" in name for name in files):
            raise OSError("no more")
        upload(files)

    monkeypatch.setattr(remote, "upload", full)
    with pytest.raises(OSError, match="no more"):
        train(work, url)
    monkeypatch.undo()
    machine("second")
    assert any(n.startswith("checkpoints/6/") for n in remote.listing(url))
    assert remote_checkpoints.complete(url) == [2, 4]
    assert checkpoints.resolve(url).name == "4"
    # A file of the newest complete one is changed, too: not even its length differs.
    damaged = next(
        n for n in remote.listing(url) if n.startswith("checkpoints/4/policy/d/")
    )
    content = buckets.get(f"{url}/{damaged}")
    buckets.put(f"{url}/{damaged}", content[:-1] + bytes([content[-1] ^ 1]))
    caplog.set_level(logging.INFO, "jaxalign")
    train(work, url)
    assert "checkpoint of step 4" in caplog.text and "is damaged" in caplog.text
    assert f"Resumed {url} at step 2" in caplog.text
    assert same_as(url, local)
    assert remote_checkpoints.complete(url) == [4, 6]
    machine("third")
    assert checkpoints.resolve(url).name == "6"


@pytest.fixture(scope="module")
def uploaded(local, new_bucket) -> str:
    """The local run in a bucket, as a run there would have left it."""
    url = f"{new_bucket()}/uploaded"
    buckets.put_folder(local, url)
    remote_checkpoints.give(local / "checkpoints" / "6", f"{url}/checkpoints/6")
    return url


def verb(name: str, checkpoint, data, output) -> int:
    flag = "--data" if name == "score" else "--prompts"
    more = () if name == "score" else ("--max_new_tokens=4", "--seed=1")
    given = (f"--checkpoint={checkpoint}", f"{flag}={data}", f"--output={output}")
    return cli.main([name, *given, *more])


@pytest.mark.parametrize(
    "name", ["score", pytest.param("generate", marks=pytest.mark.slow)]
)
def test_a_policy_in_a_bucket_is_used_like_a_local_one(
    name, local, uploaded, machine, tmp_path
):
    data = f"{uploaded}/prompts.jsonl"
    here = tmp_path / "prompts.jsonl"
    here.write_text('{"prompt": "say 3", "completion": "it is 3"}\n')
    buckets.put(data, here.read_bytes())
    assert verb(name, uploaded, data, tmp_path / "remote.jsonl") == 0
    assert verb(name, local, here, tmp_path / "local.jsonl") == 0
    expected = (tmp_path / "local.jsonl").read_bytes()
    assert (tmp_path / "remote.jsonl").read_bytes() == expected
    # Only what inference needs was copied; who asks again gets the copy that is there.
    copied = remote.copy_path(uploaded) / "checkpoints" / "6"
    assert {p.name for p in copied.iterdir()} == {"policy", "meta"}
    before = copied.stat().st_ino
    assert checkpoints.resolve(f"{uploaded}/checkpoints/6") == copied
    assert copied.stat().st_ino == before


def test_outputs_are_uploaded_whole_or_refused(uploaded, machine, capsys):
    out = f"{uploaded}/out/scores.jsonl"
    assert inference.write_jsonl(out, [{"a": 1}]) == 1
    assert buckets.get(out) == b'{"a": 1}\n'
    assert verb("generate", uploaded, "prompts.jsonl", f"{uploaded}/out.jsonl") == 2
    said = capsys.readouterr().err
    assert "--output, which grows line by line, needs a local path" in said


def test_a_run_starts_from_a_policy_in_a_bucket(work, uploaded, machine, tmp_path):
    job = tiny_run.make_run(tmp_path / "next", work / "data.jsonl", work)
    policy = starts.load_network(uploaded, "policy", loop.setup(job))
    own = checkpoints.load(f"{uploaded}/checkpoints/6").params
    jax.tree.map(np.testing.assert_array_equal, policy, own)


def test_a_run_that_was_copied_by_other_means_is_named_by_its_checkpoint(
    local, new_bucket, machine, caplog
):
    url = f"{new_bucket()}/copied"
    buckets.put_folder(local, url)
    with pytest.raises(FileNotFoundError, match=r"No checkpoint at .* 6\.json|<step>"):
        checkpoints.load(url)
    assert f"has to be named itself: {url}/checkpoints/6" in caplog.text
    theirs = checkpoints.load(local).params
    ours = checkpoints.load(f"{url}/checkpoints/6").params
    assert checkpoints.params_fingerprint(ours) == checkpoints.params_fingerprint(
        theirs
    )


def test_a_bucket_that_is_not_there_stops_the_run_before_it_steps(
    work, new_bucket, machine, monkeypatch
):
    new_bucket()
    monkeypatch.setattr(loop.Setup, "train_step", None)  # would be called
    with pytest.raises(FileNotFoundError, match=r"s3://nobody/run/.* does not exist"):
        train(work, "s3://nobody/run")


def test_metrics_that_cannot_be_copied_now_do_not_stop_the_run(
    new_bucket, machine, monkeypatch, caplog
):
    folder = mirror.RunFolder(f"{new_bucket()}/run")
    (folder.path / "metrics.jsonl").write_text("{}\n")
    monkeypatch.setattr(mirror, "SECONDS", -1.0)
    with monkeypatch.context() as patch:

        def unreachable(files):
            raise OSError("no way")

        patch.setattr(remote, "upload", unreachable)
        folder.logged()
    assert f"files stay in {folder.path} for now. no way" in caplog.text
    folder.logged()
    folder.close()
    assert remote.listing(folder.name) == ["metrics.jsonl"]


def test_processes_that_do_not_share_a_disk_are_told_so(
    new_bucket, machine, monkeypatch
):
    monkeypatch.setattr(mirror.jax, "process_index", lambda: 1)
    with pytest.raises(ValueError, match="Process 1 does not see .*_REMOTE_DIR"):
        mirror.RunFolder(f"{new_bucket()}/run")


@pytest.mark.slow
def test_a_killed_run_in_a_bucket_goes_on(work, new_bucket, machine):
    def process(run_dir, *kill) -> subprocess.CompletedProcess:
        script = [sys.executable, tiny_run.__file__]
        return subprocess.run(
            [*script, run_dir, str(work), "DPO", *kill],
            capture_output=True,
            text=True,
            timeout=300,
        )

    url = f"{new_bucket()}/run"
    assert process(str(work / "unkilled")).returncode == 0
    assert process(url, "step", "5").returncode == -signal.SIGKILL
    resumed = process(url)
    assert resumed.returncode == 0, resumed.stderr
    assert f"Resumed {url} at step" in resumed.stderr
    assert same_as(url, work / "unkilled")


@pytest.mark.slow
def test_two_processes_write_each_file_once_and_go_on(work, new_bucket, machine):
    def launch(run_dir, steps: int) -> str:
        command = [
            *(sys.executable, str(LAUNCHER), "-n", "2", "--devices_per_process=2"),
            *("--", sys.executable, "-m", "jaxalign.cli", "train"),
            *("--gin_file=runs/sft.gin", f"--gin.DATA='{work / 'data.jsonl'}'"),
            f"--gin.CACHE_DIR='{work / 'cache'}'",
            "--gin.TASK_FEATURE_LENGTHS={'inputs': 12, 'targets': 12}",
            *("--gin.BATCH_SIZE=8", "--gin.CHECKPOINT_PERIOD=2"),
            "--gin.sampling.Sampler.max_new_tokens=4",
            *(f"--gin.TRAIN_STEPS={steps}", f"--run_dir={run_dir}"),
        ]
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=500, env=environment
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    url = f"{new_bucket()}/run"
    launch(work / "two", 4)
    launch(url, 2)
    assert f"Resumed {url} at step 2" in launch(url, 4)
    theirs = run_directory.read_manifest(work / "two")
    assert manifest(url)["params_fingerprint"] == theirs["params_fingerprint"]
    names = remote.listing(url)
    assert {"config.gin", "metrics.jsonl", "samples/2.jsonl"} <= set(names)
    assert sum("tfevents" in name for name in names) == 2  # one of each command
