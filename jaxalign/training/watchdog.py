"""A job of several processes whose loop stands still says so and ends."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from typing import Self

import jax

from jaxalign.training import distributed

_log = logging.getLogger(__name__)


class Watchdog:
    """Ends a process whose loop stands still: JAX alone would wait for ever.

    A process that died or was stopped misses JAX's heartbeats. One whose thread hangs,
    say on a disk, sends them still, and the others wait for it in a collective. Every
    process then says where it stands, names those that do not answer, and ends.

    Args:
      timeout: seconds without a `beat` that are too many.
      enabled: False where nobody else would wait.

    Example::

        with Watchdog(1800) as watchdog:
            for step in range(10):
                watchdog.beat(f"step {step}")
    """

    EXIT_STATUS = 75  # EX_TEMPFAIL: the same command may well succeed

    def __init__(self, timeout: float, enabled: bool = True):
        self._timeout, self._enabled = timeout, enabled
        self._done = threading.Event()

    def beat(self, place: str) -> None:
        """Says that the loop goes on, and where it is."""
        self._last = time.monotonic(), place

    def __enter__(self) -> Self:
        self.beat("the start")
        if self._enabled:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(min(self._timeout / 10, 10)):
            when, place = self._last
            if time.monotonic() - when > self._timeout:
                self._end(place)

    def _end(self, place: str) -> None:
        main = sys._current_frames()[threading.main_thread().ident]
        _log.error(
            "Nothing happened in process %d of %d for %g s after %s. It stands at\n%s",
            jax.process_index(),
            jax.process_count(),
            self._timeout,
            place,
            "".join(traceback.format_stack(main)[-8:]).rstrip(),
        )
        try:
            distributed.barrier("nothing happens", min(self._timeout, 30))
        except (distributed.MissingProcessesError, jax.errors.JaxRuntimeError) as error:
            _log.error("%s", error)
        os._exit(self.EXIT_STATUS)
