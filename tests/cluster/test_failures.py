"""A process that fails ends its job, and says why in all of them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxalign.cluster import failures

LAUNCHER = Path(__file__).parents[2] / "launch" / "local.py"

JOIN = """
import argparse, logging
from jaxalign.cluster import distributed, failures
logging.basicConfig(level=logging.INFO)
parser = argparse.ArgumentParser()
parser.add_argument("failing")
parser.add_argument("--coordinator_address")
parser.add_argument("--process_count", type=int)
parser.add_argument("--process_index", type=int)
args = parser.parse_args()
own = args.coordinator_address, args.process_count, args.process_index
distributed.start(distributed.Settings("auto", *own, 120))
distributed.barrier("here", 100)
print("all here", flush=True)
if str(args.process_index) in args.failing:
    failures.leave(2, "OSError: no more room")
if args.failing != "none":
    distributed.barrier("the other never comes", 600)
"""


def test_one_process_is_not_ended(monkeypatch):
    monkeypatch.setattr(failures.os, "_exit", None)  # would be called
    assert not failures.in_a_job()
    failures.leave(2, "an error")


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["0", "1", "01", "none"])
def test_a_process_that_fails_ends_the_others_at_once(tmp_path, failing):
    script = tmp_path / "join.py"
    script.write_text(JOIN)
    launched = [sys.executable, str(LAUNCHER), "-n", "2", "--grace=100", "--"]
    command = [*launched, sys.executable, str(script), failing]
    said = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        for line in job.stdout:
            said.append(line)
            if "all here" in line:
                began = time.monotonic()
    assert job.returncode == (0 if failing == "none" else 2), "".join(said)
    assert time.monotonic() - began < 30
    for process in {"0", "1"} - {*failing} if len(failing) == 1 else ():
        told = f"Process {failing} has stopped: OSError: no more room"
        assert any(x.startswith(f"[{process}]") and told in x for x in said)
