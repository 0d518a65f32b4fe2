"""Launch files: they parse, refuse calls without a command, print what they run."""

from __future__ import annotations

import os
import pathlib
import shlex
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SCRIPTS = {
    "slurm.sbatch": [],
    "ssh.sh": ["node0,me@node1,node2"],
    "tpu_vm.sh": ["slice", "v5litepod-16"],
}
COMMAND = ["jaxalign", "train", "--gin.DATA='my pairs.jsonl'", "--run_dir=runs/x"]


def call(name, *arguments, **environment):
    return subprocess.run(
        ["bash", str(LAUNCH / name), *arguments],
        env=os.environ | {"DRY_RUN": "1", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_every_script_is_tested():
    found = {p.name for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch")}
    assert found == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_call_without_a_command_says_how(name):
    done = call(name)
    assert done.returncode == 2 and "usage:" in done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name):
    command = [pathlib.Path(sys.executable).with_name("shellcheck"), LAUNCH / name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stdout


def test_slurm_runs_the_command_on_every_task():
    done = call("slurm.sbatch", *COMMAND)
    assert shlex.split(done.stdout) == ["srun", "--kill-on-bad-exit=1", *COMMAND]


def test_ssh_numbers_the_processes_and_names_the_first_as_coordinator():
    done = call("ssh.sh", *SCRIPTS["ssh.sh"], *COMMAND, SETUP="cd code", PORT="9000")
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[:3] for line in lines] == [
        ["ssh", "-tt", host] for host in ("node0", "me@node1", "node2")
    ]
    for i, (*_, remote) in enumerate(lines):
        assert remote.startswith("cd code && exec ")
        assert shlex.split(remote)[4:] == [
            *COMMAND,
            "--coordinator_address=node0:9000",
            "--process_count=3",
            f"--process_index={i}",
        ]


def test_ssh_runs_processes_and_ends_all_when_one_fails(tmp_path):
    """With a stand-in for ssh that runs the command here."""
    stand_in = tmp_path / "ssh"
    stand_in.write_text('#!/usr/bin/env bash\nexec bash -c "$3"\n')
    stand_in.chmod(0o755)
    code = (
        "import sys, time; i = int(sys.argv[-1][-1]); print('here', i, flush=True); "
        "time.sleep(0.5); sys.exit(3) if i == 1 else time.sleep(60)"
    )
    done = call(
        "ssh.sh",
        "a,b,c",
        sys.executable,
        "-c",
        code,
        DRY_RUN="",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    assert done.returncode != 0
    assert {"[0] here 0", "[1] here 1", "[2] here 2"} <= set(done.stdout.splitlines())


def test_the_local_launcher_ends_all_when_a_later_process_is_killed():
    code = (
        "import os, signal, sys, time; "
        "os.kill(os.getpid(), signal.SIGKILL) if sys.argv[-1][-1] == '1' "
        "else time.sleep(60)"
    )
    began = time.monotonic()
    launcher = [sys.executable, str(LAUNCH / "local.py"), "-n", "2", "--grace=0.5"]
    done = subprocess.run([*launcher, "--", sys.executable, "-c", code], timeout=60)
    assert done.returncode == 128 + 9
    assert time.monotonic() - began < 30


def test_tpu_vm_creates_runs_on_all_workers_and_deletes():
    arguments = [*SCRIPTS["tpu_vm.sh"], *COMMAND]
    done = call("tpu_vm.sh", *arguments, PROJECT="p", ZONE="z", SPOT="1")
    create, _, run, delete = map(shlex.split, done.stdout.splitlines())
    assert create[3:6] == ["queued-resources", "create", "slice"] and "--spot" in create
    assert "--worker=all" in run and delete[4] == "delete"
    (remote,) = [x for x in run if x.startswith("--command=")]
    assert shlex.split(remote.removeprefix("--command="))[-4:] == COMMAND


def test_the_jobset_asks_for_hosts_that_make_the_topology():
    import yaml

    spec = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    rows, columns = map(int, topology.split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == rows * columns // chips
    assert container["command"][:2] == ["jaxalign", "train"]
    mounted = {m["name"] for m in container["volumeMounts"]}
    assert mounted == {v["name"] for v in pod["volumes"]}


@pytest.mark.slow
def test_the_jobs_of_the_jobset_follow_kubernetes_schema():
    import kubernetes_validate
    import yaml

    manifest = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    version = kubernetes_validate.latest_version()
    for replicated in manifest["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
        job["spec"] = replicated["template"]["spec"]
        kubernetes_validate.validate(job, version, strict=True)
        job["spec"]["parallelizm"] = 3
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(job, version, strict=True)
