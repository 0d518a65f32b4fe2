"""A process of a job that fails says why to the others, and all end.

JAX lets the others wait: in a barrier, in a collective, in Orbax's threads, for minutes
or for ever, and none of them knows the reason. So a process that ends with an error
writes it where all of them look (the coordinator's keys), and each ends at once.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import sys
import threading
import time
from typing import Any

import jax
from jax._src import distributed as _jax_distributed

_log = logging.getLogger(__name__)

_KEY = "jaxalign/failed"
_SECONDS = 1.0  # between two looks
# Process 0 holds the keys: it stays until the others have looked.
_LAST_LOOK = 3 * _SECONDS
_LONGEST = 2000  # characters of a reason

_ended = threading.Event()


def _client() -> Any:
    """The job's client; None where this process is no job's."""
    return _jax_distributed.global_state.client


def in_a_job() -> bool:
    """Whether other processes wait for this one."""
    return _client() is not None


def listen() -> None:
    """From now on this process ends when another of its job has failed."""
    thread = threading.Thread(target=_listen, daemon=True, name="failures")
    thread.start()

    def stop() -> None:
        _ended.set()
        thread.join(2 * _SECONDS)

    atexit.register(stop)


def _listen() -> None:
    while not _ended.wait(_SECONDS):
        try:
            found = json.loads(_client().key_value_try_get(_KEY))
        except (jax.errors.JaxRuntimeError, AttributeError):
            continue  # nobody has failed, or the job is over
        if _ended.is_set():  # this one has failed too, and says so itself
            return
        _log.error("Process %d has stopped: %s", found["process"], found["reason"])
        _end(found["status"])


def leave(status: int, reason: str) -> None:
    """Ends this process with a status, and the others of its job; else returns.

    Nothing waits for threads or peers here: they may be waiting for this process.
    """
    if not in_a_job():
        return
    _ended.set()
    reason = reason[:_LONGEST]
    told = {"process": jax.process_index(), "status": status, "reason": reason}
    # Another may have been first, or the coordinator may be gone.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(_KEY, json.dumps(told))
    _end(status)


def _end(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(_LAST_LOOK)
    os._exit(status)
