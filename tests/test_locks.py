"""Locks: one holder at a time, and none after a kill."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest

from jaxalign import locks

HOLD = """
import sys, time
from jaxalign import locks
with locks.hold(sys.argv[1], "output", is_file=True):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.02)
    monkeypatch.setattr(locks, "PATIENCE", 0.3)
    monkeypatch.setattr(locks, "SETTLE", 0.05)


def another_machine(monkeypatch):
    monkeypatch.setattr(locks, "_machine", lambda: "another boot")


def test_the_second_is_refused_with_the_holder_and_a_killed_one_holds_nothing(tmp_path):
    output = tmp_path / "out.jsonl"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output)], stdout=subprocess.PIPE, text=True
    )
    with first:
        assert first.stdout.readline() == "held\n"
        refused = rf"output .*out.jsonl is in use by process {first.pid} on .*since"
        with pytest.raises(locks.HeldError, match=refused):
            with locks.hold(output, "output", is_file=True):
                pass
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    assert (tmp_path / ".out.jsonl.lock").exists()  # stale
    started = time.monotonic()
    with locks.hold(output, "output", is_file=True):
        assert time.monotonic() - started < 5  # seen at once, not waited for
    assert list(tmp_path.iterdir()) == []


def test_an_error_releases_and_a_child_does_not_keep(tmp_path):
    with pytest.raises(KeyError):
        with locks.hold(tmp_path, "run directory"):
            raise KeyError
    with locks.hold(tmp_path, "run directory"):
        with warnings.catch_warnings():
            # Python 3.12 warns of threads, of which this child uses none.
            warnings.simplefilter("ignore", DeprecationWarning)
            # So does JAX where other tests have loaded it.
            warnings.simplefilter("ignore", RuntimeWarning)
            child = os.fork()
        if child == 0:
            time.sleep(5)
            os._exit(0)
    with locks.hold(tmp_path, "run directory"):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert list(tmp_path.iterdir()) == []


def test_of_many_threads_one_holds_at_a_time(tmp_path):
    inside, most = [], []

    def work():
        done = 0
        while done < 5:
            try:
                with locks.hold(tmp_path, "run directory"):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.001)
                    inside.pop()
                    done += 1
            except locks.HeldError:
                time.sleep(0.001)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 30


def test_a_lock_file_is_never_opened_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".lock").symlink_to("victim")
    with pytest.raises(OSError, match=r"\.lock"):
        with locks.hold(tmp_path, "run directory"):
            pass
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "\\u001b[2J"}'])
def test_any_content_may_lie_in_a_lock_file(tmp_path, quick, content):
    (tmp_path / ".lock").write_bytes(content)
    with locks.hold(tmp_path, "run directory"):
        holder = json.loads((tmp_path / ".lock").read_bytes())
        assert holder["pid"] == os.getpid()


def test_a_holder_of_another_host_is_watched(tmp_path, quick, monkeypatch):
    # As on a shared disk whose flock does not reach other hosts.
    monkeypatch.setattr(locks.fcntl, "flock", lambda *_: None)
    with locks.hold(tmp_path, "run directory"):
        with monkeypatch.context() as patch:
            another_machine(patch)
            with pytest.raises(locks.HeldError, match=f"process {os.getpid()} on"):
                with locks.hold(tmp_path, "run directory"):
                    pass
    left = {"pid": 7, "host": "gone", "machine": "m", "token": "t", "beat": 3}
    (tmp_path / ".lock").write_text(json.dumps(left))
    with locks.hold(tmp_path, "run directory"):  # nothing stirs: taken over
        assert json.loads((tmp_path / ".lock").read_bytes())["host"] != "gone"


@pytest.mark.parametrize("where", ["without flock", "in a bucket"])
def test_beats_decide_where_the_kernel_does_not(tmp_path, quick, monkeypatch, where):
    monkeypatch.setenv("JAXALIGN_REMOTE_DIR", str(tmp_path / "copies"))
    place = f"file://{tmp_path}/run"
    entry = tmp_path / "run" / ".lock"
    (tmp_path / "run").mkdir()
    if where == "without flock":
        place = tmp_path / "run"

        def nowhere(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(locks.fcntl, "flock", nowhere)
    with locks.hold(place, "run directory"):
        holder = json.loads(entry.read_bytes())
        monkeypatch.setenv("JAXALIGN_REMOTE_DIR", str(tmp_path / "another machine's"))
        with pytest.raises(locks.HeldError, match=f"process {os.getpid()} on"):
            with locks.hold(place, "run directory"):
                pass
        assert json.loads(entry.read_bytes())["token"] == holder["token"]
    assert not entry.exists()
    entry.write_text(json.dumps(holder))  # as a kill leaves it
    with locks.hold(place, "run directory"):
        assert json.loads(entry.read_bytes())["token"] != holder["token"]
    assert not entry.exists()


def test_of_two_that_begin_at_once_in_a_bucket_one_stays(tmp_path, quick, monkeypatch):
    held, refused = [], []

    def work(name):
        lock = locks._Object(f"file://{tmp_path}/.lock", "")
        try:
            with locks._holding(lock, "place", "run directory"):
                held.append(name)
                time.sleep(0.3)
        except locks.HeldError:
            refused.append(name)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 2
