"""A job of several processes whose loop stands still says so and ends."""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, Self

import jax
from orbax.checkpoint import multihost

from jaxalign.cluster import distributed

_log = logging.getLogger(__name__)


class Watchdog:
    """Ends a process whose loop stands still: JAX alone would wait for ever.

    A process that died misses JAX's heartbeats. One whose thread hangs, say on a disk,
    sends them still, and the others wait for it in a collective. Every process then
    says where it stands, names those that do not answer, and ends. While one is
    `patient`, in what takes as long as a disk, a network or a sampler does, neither it
    nor one that waits for it counts as standing still.

    Args:
      timeout: seconds without a sign of life that are too many.
      enabled: False where nobody else would wait.

    Example::

        with Watchdog(1800) as watchdog:
            for step in range(10):
                watchdog.beat(f"step {step}")
            with watchdog.patient("saving"):
                save()
    """

    EXIT_STATUS = 75  # EX_TEMPFAIL: the same command may well succeed

    def __init__(self, timeout: float, enabled: bool = True):
        self._timeout, self._enabled = timeout, enabled
        self._done = threading.Event()
        self._patient: tuple[float, str] | None = None  # until when, and in what
        self._begun: collections.deque[tuple[str, Any]] = collections.deque()

    def beat(self, position: str, begun: Any = None) -> None:
        """Says that the loop goes on, where it is, and which arrays are on their way.

        JAX dispatches far ahead of the devices, and a loop may then wait for many steps
        at once; each that is done is a sign of life too.
        """
        self._last = time.monotonic(), position
        leaves = jax.tree.leaves(begun)
        if self._enabled and leaves:
            self._begun.append((position, leaves[0]))

    @contextlib.contextmanager
    def patient(self, position: str, seconds: float = distributed.PATIENCE) -> Iterator:
        """While inside, only so many seconds are too many, here and in the others."""
        self.beat(position)
        self._patient = time.monotonic() + seconds, position
        try:
            yield
        finally:
            self.beat(f"the end of {position}")
            self._patient = None

    def __enter__(self) -> Self:
        self.beat("the start")
        if self._enabled:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        told = None
        while not self._done.wait(min(self._timeout / 10, 10)):
            while self._begun and self._begun[0][1].is_ready():
                self._last = time.monotonic(), self._begun.popleft()[0]
            # Short phases are over before the others are told of them.
            patient = self._patient
            if patient != told:
                _tell(patient)
                told = patient
            when, position = self._last
            now = time.monotonic()
            if patient and now < patient[0]:
                continue
            if now - when > self._timeout:
                if not _others_are_patient():
                    self._end(position)
                # When the other is done, what waited for it has its full time again.
                self._last = now, position
        if told:
            _tell(None)

    def _end(self, position: str) -> None:
        main = sys._current_frames()[threading.main_thread().ident]
        _log.error(
            "Nothing happened in process %d of %d for %g s after %s. It stands at\n%s",
            jax.process_index(),
            jax.process_count(),
            self._timeout,
            position,
            "".join(traceback.format_stack(main)[-8:]).rstrip(),
        )
        try:
            distributed.barrier("nothing happens", min(self._timeout, 30))
        except (distributed.MissingProcessesError, jax.errors.JaxRuntimeError) as error:
            _log.error("%s", error)
        os._exit(self.EXIT_STATUS)


_KEYS = "jaxalign/patient"  # one below it for each process


def _tell(patient: tuple[float, str] | None) -> None:
    """Tells the other processes until when this one may be long."""
    if jax.process_count() == 1:
        return
    client = multihost.get_jax_distributed_client()
    key = f"{_KEYS}/{jax.process_index()}"
    try:
        if patient is None:
            client.key_value_delete(key)
        else:
            left = patient[0] - time.monotonic()
            until = json.dumps([time.time() + left, patient[1]])
            client.key_value_set(key, until, allow_overwrite=True)
    except jax.errors.JaxRuntimeError as error:  # the job is ending
        _log.warning("The other processes could not be told: %s", error)


def _others_are_patient() -> bool:
    """Whether another process is in what may take long."""
    if jax.process_count() == 1:
        return False
    client = multihost.get_jax_distributed_client()
    try:
        found = client.key_value_dir_get(_KEYS)
    except jax.errors.JaxRuntimeError:  # nobody told anything, or the job is ending
        return False
    return any(json.loads(until)[0] > time.time() for _, until in found)
