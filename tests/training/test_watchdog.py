"""A loop that stands still is noticed, explained and ended."""

from __future__ import annotations

import subprocess
import sys

from jaxalign.training.watchdog import Watchdog

_HANGS = """
import logging, time
from jaxalign.training.watchdog import Watchdog

def read_from_a_dead_disk():
    time.sleep(60)

logging.basicConfig(level=logging.INFO)
with Watchdog(0.5) as dog:
    dog.beat("step 7")
    read_from_a_dead_disk()
"""


def test_a_loop_that_hangs_ends_and_says_where():
    done = subprocess.run(
        [sys.executable, "-c", _HANGS], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == Watchdog.EXIT_STATUS
    assert "in process 0 of 1 for 0.5 s after step 7" in done.stderr
    assert "in read_from_a_dead_disk" in done.stderr


def test_a_loop_that_goes_on_or_is_over_is_left_alone():
    code = """
import time
from jaxalign.training.watchdog import Watchdog
with Watchdog(1.0) as dog:
    for step in range(8):
        dog.beat(f"step {step}")
        time.sleep(0.25)
with Watchdog(0.2, enabled=False):
    time.sleep(0.5)
time.sleep(1.5)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=60)
    assert done.returncode == 0
