"""A loop that stands still is noticed, explained and ended."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest

from jaxalign.cluster.watchdog import Watchdog

_HANGS = """
import logging, time
from jaxalign.cluster.watchdog import Watchdog

def read_from_a_dead_disk():
    time.sleep(60)

logging.basicConfig(level=logging.INFO)
with Watchdog(0.5) as dog:
    dog.beat("step 7")
    read_from_a_dead_disk()
"""


class Told(Watchdog):
    """Tells where the loop stood instead of ending this process."""

    place = None

    def _end(self, place):
        self.place = place
        self._done.set()


def test_a_loop_that_hangs_ends_and_says_where():
    done = subprocess.run(
        [sys.executable, "-c", _HANGS], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == Watchdog.EXIT_STATUS
    assert "in process 0 of 1 for 0.5 s after step 7" in done.stderr
    assert "in read_from_a_dead_disk" in done.stderr


def test_a_loop_that_goes_on_or_is_over_is_left_alone():
    dogs = [Told(1.0), Told(0.2, enabled=False)]
    with dogs[0] as dog:
        for step in range(6):
            dog.beat(f"step {step}")
            time.sleep(0.25)
    with dogs[1]:
        time.sleep(0.5)
    time.sleep(1)
    assert [dog.place for dog in dogs] == [None, None]


class Array:
    """An array that is computed when somebody says so."""

    done = False

    def is_ready(self):
        return self.done


def test_what_may_take_long_takes_long():
    with Told(0.3) as dog:
        with dog.patient("the checkpoint of step 2"):
            dog.beat("a part of it")
            time.sleep(1)
        assert dog.place is None
        time.sleep(1)
        assert dog.place == "the end of the checkpoint of step 2"
    with Told(0.3) as dog, dog.patient("a copy", 0.5):
        time.sleep(1.5)
        assert dog.place == "a copy"  # its own time is over too


def test_a_loop_that_waits_for_steps_begun_before_is_not_standing_still():
    arrays = [Array() for _ in range(5)]
    with Told(1) as dog:
        for i, array in enumerate(arrays):
            dog.beat(f"step {i}", {"loss": array})  # all dispatched at once
        for array in arrays[:4]:
            time.sleep(0.5)
            array.done = True
        assert dog.place is None
        time.sleep(2)
        assert dog.place == "step 3"  # the last one that was done


_TWO = """
import sys, time
from jaxalign.cluster import distributed
from jaxalign.cluster.watchdog import Watchdog

index = int(sys.argv[2])
distributed.start(distributed.Settings("auto", sys.argv[1], 2, index, 60))
with Watchdog(1.5) as dog:
    if index == 0:
        with dog.patient("copying"):
            time.sleep(5)
        time.sleep(1)  # what process 1 waits for has its own time again
    else:
        dog.beat("step 3")
    distributed.barrier("met", 60)
time.sleep(1)
"""


@pytest.mark.slow
def test_waiting_for_a_host_that_copies_is_not_standing_still():
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", _TWO, address]
    both = [
        subprocess.Popen([*command, str(i)], stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    said = [process.communicate(timeout=90)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
