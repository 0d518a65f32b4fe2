"""Real processes: they meet, they agree with one process, they name who is missing."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from jaxalign.cluster import distributed, rendezvous
from jaxalign.training import checkpoints, fingerprints

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
            rendezvous.rendezvous(address, count, index, timeout)
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


STRANGERS = [
    *(b"", b"7", b"7000", b"1", b"1\n", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
    *(b"jaxalign: process 0 of 3\n", b"jaxalign: process 1 of 2\n"),
    *(b"jaxalign: process 9 of 3\n", b"jaxalign: process 1 of 3\nx", b"\xff" * 5000),
]


def test_strangers_at_the_port_change_nothing():
    port, said, kept = free_port(), {}, []

    def come(index: int) -> None:
        try:
            rendezvous.rendezvous(f"127.0.0.1:{port}", 3, index, 30)
            said[index] = "all here"
        except BaseException as error:
            said[index] = repr(error)

    threads = [threading.Thread(target=come, args=(i,)) for i in range(3)]
    threads[0].start()
    for wave in range(2):
        for greeting in STRANGERS:
            for reset in (False, True):
                while True:
                    try:
                        client = socket.create_connection(("127.0.0.1", port))
                        break
                    except ConnectionRefusedError:
                        time.sleep(0.05)
                client.sendall(greeting)
                if reset:  # gone without a word
                    linger = struct.pack("ii", 1, 0)
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    client.close()
                else:
                    kept.append(client)
        if wave == 0:  # one that comes and goes has not come
            gone = socket.create_connection(("127.0.0.1", port))
            gone.sendall(rendezvous._greeting(3, 2))
            time.sleep(0.2)
            gone.close()
            threads[1].start()
    time.sleep(0.5)
    assert not said
    threads[2].start()
    for thread in threads:
        thread.join()
    for client in kept:
        client.close()
    assert said == dict.fromkeys(range(3), "all here")


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 No\r\n\r\n", b"[]", b'{"missing": 3}']
)
def test_somebody_else_at_the_coordinators_address_is_not_process_0(answer):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(100)
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(distributed.MissingProcessesError, match=r"\[0\] of 2"):
            rendezvous.rendezvous(address, 2, 1, 1)
        server.shutdown(socket.SHUT_RDWR)


def launch(work: Path, name: str, n: int, devices: int, *more: str):
    """A training run by the launcher, one process with `devices` where n is 1."""
    named = any(flag.startswith("--gin_file=runs/") for flag in more)
    command = [
        *(sys.executable, str(LAUNCHER), "-n", str(n)),
        *(f"--devices_per_process={devices}", "--grace=10", "--"),
        *(sys.executable, "-m", "jaxalign.cli", "train"),
        *([] if named else ["--gin_file=runs/dpo.gin"]),
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
    name = "two_by_four"
    for n, devices in ((1, 4), (1, 1), (4, 2)):
        already = manifest(work / name)["step"]
        done = launch(work, name, n, devices, f"--gin.TRAIN_STEPS={already + 2}")
        assert done.returncode == 0, done.stdout[-3000:]
        assert f"at step {already}" in done.stdout
    done = launch(work, "one", 1, 1, "--gin.TRAIN_STEPS=10")
    assert done.returncode == 0, done.stdout[-3000:]
    np.testing.assert_allclose(
        losses(work / "two_by_four"), losses(work / "one"), rtol=1e-5
    )


def policy(folder: Path) -> dict[str, np.ndarray]:
    return fingerprints.leaf_names(checkpoints.load(folder).params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "mesh", "n", "devices"),
    [
        ("sft", {"data": 8}, 4, 2),
        ("kto", {"data": 2, "fsdp": 4}, 2, 4),
        ("dro_v", {"data": 4, "tensor": 2}, 4, 2),
    ],
)
def test_processes_end_with_the_parameters_of_one_device(
    work, objective, mesh, n, devices
):
    own = (f"--gin_file=runs/{objective}.gin", "--gin.TRAIN_STEPS=3")
    sharded = f"--gin.MESH={mesh}"
    for name, count, each, more in (
        (f"{objective}_one", 1, 1, ()),
        (f"{objective}_many", n, devices, (sharded,)),
    ):
        done = launch(work, name, count, each, *own, *more)
        assert done.returncode == 0, done.stdout[-3000:]
    one, many = (work / f"{objective}_{name}" for name in ("one", "many"))
    np.testing.assert_allclose(losses(many), losses(one), rtol=1e-5)
    expected, found = policy(one), policy(many)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


def signal_one(run_dir: Path, which: int, number: int = signal.SIGKILL) -> None:
    """Signals process `which` of the job that writes to a run directory, if it runs."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if f"--run_dir={run_dir}" in words and f"--process_index={which}" in words:
            os.kill(int(folder.name), number)


@pytest.mark.slow
def test_a_host_that_stops_answering_ends_the_others(work):
    """SIGSTOP: the process is there and does nothing, heartbeats included."""
    run_dir = work / "frozen"

    def stop_after_a_checkpoint() -> None:
        metrics = run_dir / "metrics.jsonl"
        # The line of step 3 comes after the checkpoint of step 2.
        while not metrics.exists() or '"step": 3,' not in metrics.read_text():
            time.sleep(0.2)
        signal_one(run_dir, 1, signal.SIGSTOP)

    threading.Thread(target=stop_after_a_checkpoint, daemon=True).start()
    own = ("--gin_file=runs/sft.gin", "--gin.TRAIN_STEPS=100000")
    began = time.monotonic()
    done = launch(work, "frozen", 2, 1, *own, "--distributed_timeout=60")
    assert done.returncode not in (0, None)
    assert time.monotonic() - began < 300
    # JAX's coordinator or the watchdog, whichever notices first; both name process 1.
    heard = r"stopped sending heartbeats\):\n\[0\] 1\n|Processes \[1\] of 2"
    assert re.search(heard, done.stdout), done.stdout
    assert checkpoints.saved_steps(run_dir)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_ends_all_processes(work):
    run_dir = work / "unwritable"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints" / ".probe").write_text("no folder can have this name")
    own = ("--gin_file=runs/sft.gin", "--gin.TRAIN_STEPS=100000")
    done = launch(work, "unwritable", 2, 1, *own)
    assert done.returncode == 2, done.stdout[-3000:]
    for process in (0, 1):
        told = f"[{process}] CheckpointWriteError: The checkpoint of step 2 could not"
        assert told in done.stdout


KILLS = int(os.environ.get("CHAOS_KILLS", "30"))


@pytest.mark.slow
def test_a_two_process_run_survives_kills_at_any_moment(work):
    """SIGKILL of one of the processes, again and again, from start to end."""
    own = ("--gin_file=runs/sft.gin", "--gin.CHECKPOINT_PERIOD=3")
    steps = f"--gin.TRAIN_STEPS={8 * KILLS}"
    done = launch(work, "calm", 1, 2, *own, steps)
    assert done.returncode == 0, done.stdout[-3000:]
    draw = random.Random(0)
    moments = []
    for _ in range(KILLS):
        # From the first import to well into the loop.
        moments.append(draw.uniform(1.0, 25.0))
        end = threading.Timer(
            moments[-1], signal_one, (work / "chaos", draw.randrange(2))
        )
        end.start()
        done = launch(work, "chaos", 2, 1, *own, steps)
        end.cancel()
        if done.returncode == 0:
            break
    done = launch(work, "chaos", 2, 1, *own, steps)
    assert done.returncode == 0, done.stdout[-3000:]
    assert (
        manifest(work / "chaos")["params_fingerprint"]
        == manifest(work / "calm")["params_fingerprint"]
    )
    assert losses(work / "chaos") == losses(work / "calm")
    print(f"{len(moments)} kills, at {[round(m, 1) for m in moments]} s")


@pytest.fixture(scope="module")
def supervised(work) -> Path:
    done = launch(work, "sft", 1, 1, "--gin.TRAIN_STEPS=2", "--gin_file=runs/sft.gin")
    assert done.returncode == 0, done.stdout[-3000:]
    return work / "sft"


def use(checkpoint: Path, verb: str, n: int, devices: int, *more: str) -> None:
    """A verb by the launcher, on a mesh where there is more than one device."""
    mesh = ["--gin.MESH={'data': -1}"] if n == 1 and devices > 1 else []
    command = [
        *(sys.executable, str(LAUNCHER), "-n", str(n)),
        *(f"--devices_per_process={devices}", "--"),
        *(sys.executable, "-m", "jaxalign.cli", verb, f"--checkpoint={checkpoint}"),
        *("--batch_size=8", *mesh, *more),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env=environment
    )
    assert done.returncode == 0, done.stdout[-3000:]


CUTS = ((1, 1), (1, 4), (2, 2))


def column(folder: Path, verb: str, field: str, *more: str) -> dict:
    """A field of the lines that a verb writes, for each of the cuts."""
    found = {}
    for cut in CUTS:
        output = folder / "{}-{}-{}.jsonl".format(verb, *cut)
        use(folder / "sft", verb, *cut, f"--output={output}", *more)
        lines = map(json.loads, output.read_text().splitlines())
        found[cut] = [line[field] for line in lines]
    return found


@pytest.mark.slow
def test_two_processes_generate_what_one_does(work, supervised):
    flags = (f"--prompts={work / 'data.jsonl'}", "--num_samples=2")
    texts = column(work, "generate", "response", *flags, "--max_new_tokens=6")
    assert len(texts[1, 1]) == 120
    assert texts[1, 1] == texts[1, 4] == texts[2, 2]


@pytest.mark.slow
def test_two_processes_score_what_one_does(work, supervised):
    logps = column(work, "score", "logp", f"--data={work / 'data.jsonl'}")
    assert len(logps[1, 1]) == 60
    for cut in CUTS[1:]:
        np.testing.assert_allclose(logps[cut], logps[1, 1], rtol=1e-5)


@pytest.mark.slow
def test_two_processes_evaluate_what_one_does(work, supervised):
    judge = work / "judge.py"
    judge.write_text("def longer(prompt, a, b):\n    return float(len(a) > len(b))\n")
    results = {}
    for cut in CUTS:
        output = work / "evaluated-{}-{}.json".format(*cut)
        flags = (f"--data={work / 'data.jsonl'}", f"--output={output}")
        compared = (f"--judge={judge}:longer", f"--baseline={supervised}")
        more = ("--metrics=token_accuracy", "--temperature=1", "--max_new_tokens=6")
        use(supervised, "eval", *cut, *flags, *compared, *more)
        results[cut] = json.loads(output.read_text())
    assert results[1, 1] == results[1, 4] == results[2, 2]


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
