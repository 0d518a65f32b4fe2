"""Many processes, one job: starting, waiting for each other, stopping together.

``--distributed=auto`` joins the job that the environment describes (SLURM, Open MPI,
GKE or Cloud TPU, or the three overrides that ``launch/`` sets) and is a no-op where
there is none. JAX ends a process whose peers do not come with a stack trace and no
names, so the processes meet on the coordinator's port first and say who is missing.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import logging
import os
import re
import signal
import threading
from collections.abc import Callable
from typing import Any, Self, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from jaxalign.cluster import failures
from jaxalign.cluster.rendezvous import MissingProcessesError, rendezvous

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

MODES = ("auto", "off")
# Seconds for what is as slow as a disk or network: far more than it takes.
PATIENCE = 86_400.0
_LONGEST = 4096  # bytes that `from_first` sends


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a process joins its job.

    Attributes:
      mode: ``"auto"`` or ``"off"``.
      coordinator_address: ``HOST:PORT`` of process 0. Pin the port: the default of JAX
        moved, and firewalls block what they do not know.
      process_count: processes in all; this one is `process_index`, from 0.
      timeout: seconds to wait for the others, here and before the first step.
    """

    mode: str = "auto"
    coordinator_address: str | None = None
    process_count: int | None = None
    process_index: int | None = None
    timeout: int = 1800

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(
                f"--distributed={self.mode}: expected {' or '.join(MODES)}."
            )
        known = (self.coordinator_address, self.process_count, self.process_index)
        given = [value is not None for value in known]
        if any(given) and not all(given):
            raise ValueError(
                "Give all of --coordinator_address=HOST:PORT, --process_count=N and "
                "--process_index=I, or none and let --distributed=auto find them; got "
                f"{known}."
            )
        if not all(given):
            return
        if not re.fullmatch(r".+:\d+", self.coordinator_address or ""):
            raise ValueError(
                f"--coordinator_address={self.coordinator_address}: expected "
                "HOST:PORT, such as 10.0.0.2:8482."
            )
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"--process_index={self.process_index} must lie in "
                f"[0, {self.process_count}), as --process_count={self.process_count}."
            )


def start(settings: Settings) -> None:
    """Joins the job, if there is one; before anything else is asked of JAX."""
    if settings.mode == "off" or jax.distributed.is_initialized():
        return
    address, count = settings.coordinator_address, settings.process_count
    if count == 1 or (address is None and not expected()):
        return
    if address is not None:
        rendezvous(address, count, settings.process_index, settings.timeout)
    jax.distributed.initialize(
        coordinator_address=address,
        num_processes=count,
        process_id=settings.process_index,
        initialization_timeout=settings.timeout,
        heartbeat_timeout_seconds=min(100, settings.timeout),
    )
    failures.listen()
    _log.info(
        "Process %d of %d, %d of %d devices",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
    )


def expected(environment: dict[str, str] | None = None) -> bool:
    """Whether the environment describes a job of several processes.

    >>> expected({"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_JOB_ID": "7"})
    True
    >>> expected({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"})
    False
    """
    env = os.environ if environment is None else environment
    if "SLURM_PROCID" in env and "SLURM_JOB_ID" in env:
        # A step's own count, where srun was given one, overrides the job's.
        return int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", 1))) > 1
    if "OMPI_COMM_WORLD_SIZE" in env:
        return int(env["OMPI_COMM_WORLD_SIZE"]) > 1
    if "TPU_WORKER_HOSTNAMES" in env and "TPU_WORKER_ID" in env:  # GKE
        return "," in env["TPU_WORKER_HOSTNAMES"]
    # On a Cloud TPU host JAX asks the metadata server; elsewhere that hangs.
    devices = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    found = bool(devices) and importlib.util.find_spec("libtpu") is not None
    return found and env.get("JAX_PLATFORMS", "tpu").startswith("tpu")


def barrier(name: str, timeout: float) -> None:
    """Waits for all processes at a named point; after `timeout` s names the missing."""
    if jax.process_count() == 1:
        return
    try:
        multihost.get_barrier_sync_fn()(key=name, timeout_ms=int(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        late = re.search(r"timed out task names:\s*([\d\s,]+)", str(error))
        if late is None:
            raise
        missing = sorted(int(n) for n in re.findall(r"\d+", late.group(1)))
        raise MissingProcessesError(
            f"Processes {missing} of {jax.process_count()} did not reach {name!r} "
            f"within {timeout:g} s; see their logs."
        ) from error


def main_first(function: Callable[[], _T], name: str) -> _T:
    """Calls a function in process 0, then in the others.

    What process 0 leaves on a shared disk, such as a prepared cache, the others find;
    on a disk of their own they make it themselves.
    """
    first = jax.process_index() == 0
    result = function() if first else None
    barrier(f"{name}: made", PATIENCE)
    return result if first else function()


def all_agree(value: bool) -> bool:
    """Whether a condition holds in every process."""
    return bool(smallest(int(value)))


def smallest(value: int) -> int:
    """The smallest of the processes' values."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(jax.numpy.asarray(value)).min())


def from_first(function: Callable[[], str | None]) -> str | None:
    """What a function says in process 0, for all; what a disk holds is found once."""
    if jax.process_count() == 1:
        return function()
    said = (function() or "") if jax.process_index() == 0 else ""
    sent = np.frombuffer(said.encode()[:_LONGEST].ljust(_LONGEST, b"\0"), np.uint8)
    heard = np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8)
    return heard.tobytes().rstrip(b"\0").decode(errors="replace") or None


class StopOnSigterm:
    """Turns SIGTERM into a request to stop after a step, the same in every process."""

    def __init__(self) -> None:
        self._requested = False

    def __enter__(self) -> Self:
        # Only the main thread may install handlers; elsewhere, nobody sends signals.
        # In a job of several processes JAX has its own, which tells all of them.
        self._usable = (
            jax.process_count() == 1
            and threading.current_thread() is threading.main_thread()
        )
        if self._usable:
            self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def _request(self, *unused: Any) -> None:
        self._requested = True

    def after(self, step: int) -> bool:
        """Whether to stop after this step; asked once per step, by every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def __exit__(self, *unused: object) -> None:
        if self._usable:
            signal.signal(signal.SIGTERM, self._previous)
