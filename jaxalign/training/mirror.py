"""A run directory in a bucket: written on this machine, mirrored to the bucket.

An object store can neither append nor rename, and a run does both. So a run writes into
a working copy on a local disk, and what it wrote is copied to the bucket: a checkpoint
when it is complete, the other files with it and once a minute. The bucket holds an
ordinary run directory, and a list of files beside each checkpoint (see
`jaxalign.training.remote_checkpoints`).

The bucket decides what there is. A run that starts forgets its working copy and takes
the newest checkpoint whose bytes are those that were written.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

from jaxalign import remote
from jaxalign.cluster import distributed
from jaxalign.training import damage, remote_checkpoints

_log = logging.getLogger(__name__)

SECONDS = 60.0  # between two copies of the files that change while a run steps
# What a run that goes on reads of the run before it, beside its checkpoint.
_RESUMED = ("manifest.json", "metrics.jsonl", "wandb_id.txt")
_LAST = "manifest.json"  # says what the run reached: copied after what it speaks of


class RunFolder(contextlib.AbstractContextManager):
    """A run directory as the loop uses it; a local one is itself.

    The loop tells when a checkpoint and when a line of metrics is written. For a local
    directory, and in all processes but the first, that changes nothing.

    Args:
      run_dir: a folder, or an address such as ``gs://bucket/run``.
      keep: how many checkpoints a bucket keeps; None keeps all.

    Attributes:
      name: the directory as messages should call it.
      path: where to write.
    """

    def __init__(self, run_dir: str | Path, keep: int | None = 2):
        self._url = os.fspath(run_dir).rstrip("/") if remote.is_remote(run_dir) else ""
        self._keep = keep
        self._copied: dict[Path, tuple[int, int]] = {}
        self._damaged: list[int] = []  # in the bucket, to be set aside
        self._last_copy = time.monotonic()
        # A checkpoint is copied by another thread than the loop's.
        self._lock = threading.Lock()
        self._copying_checkpoint = False
        if self._url:
            self.name = self._url
            self.path = remote.copy_path(self._url, "runs")
            distributed.main_first(self._take, "working copy")
        else:
            self.path = Path(run_dir).absolute()
            self.name = str(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
        self._writes = bool(self._url) and jax.process_index() == 0

    def _take(self) -> None:
        """Makes the working copy what the bucket holds."""
        if jax.process_index() > 0:
            if not self.path.is_dir():
                raise ValueError(
                    f"Process {jax.process_index()} does not see {self.path}, the "
                    f"working copy of {self._url}. The processes of a job need one "
                    f"that all of them see: set {remote.FOLDER_VARIABLE} to a folder "
                    "on a disk that they share."
                )
            return
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        for name in _RESUMED:
            if remote.holds(self._url, name):
                shutil.copyfile(remote.copy(f"{self._url}/{name}"), self.path / name)
        problems: dict[int, str] = {}
        for step in reversed(remote_checkpoints.complete(self._url)):
            target = self.path / remote_checkpoints.FOLDER / str(step)
            # Once more where it fails: the copy may be what is wrong.
            place = self._checkpoint(step)
            problem = remote_checkpoints.take(place, target)
            problem = problem and remote_checkpoints.take(place, target)
            if problem is None:
                break
            problems[step] = problem
        else:
            if problems:
                raise damage.DamagedCheckpointError(
                    f"No checkpoint of {self._url} is intact; give another --run_dir, "
                    "or delete it to start over. "
                    + " ".join(f"Step {s}: {p}" for s, p in problems.items())
                )
        for step, problem in problems.items():
            text = "The checkpoint of step %d in %s is damaged: %s"
            _log.warning(text, step, self._url, problem)
        self._damaged = list(problems)

    def set_aside(self, steps: Iterable[int]) -> None:
        """Renames the bucket's copies of damaged checkpoints, these and its own.

        Called when it is known that the run goes on: a refused one changes nothing.
        """
        if self._writes:
            for step in (*self._damaged, *steps):
                remote_checkpoints.set_aside(self._checkpoint(step))

    def started(self) -> None:
        """The run is about to compile: is the bucket there to write to?"""
        if self._writes:
            self._copy_files()

    def saved(self, step: int, reached: Callable[[], None] = lambda: None) -> None:
        """A checkpoint is on the disk: copies it, and all that came before it.

        May be called beside the loop. `reached` writes into the manifest that the run
        has the checkpoint, once that is so.
        """
        if self._writes:
            self._copying_checkpoint = True
            self._copy_files(but=_LAST)
            folder = self.path / remote_checkpoints.FOLDER / str(step)
            remote_checkpoints.give(folder, self._checkpoint(step))
        reached()
        if self._writes:
            self._copying_checkpoint = False
            self._copy_files()
            self._prune(step)
        if self._url:
            # At the next checkpoint the others would wait with less patience.
            distributed.barrier(f"checkpoint {step} copied", distributed.PATIENCE)

    def logged(self) -> None:
        """Metrics were written: copies the run's files if that was long ago."""
        if self._writes and time.monotonic() - self._last_copy > SECONDS:
            self._try_to_copy_files()

    def __exit__(self, *_: object) -> None:
        """The loop has ended, well or not: what it wrote last is copied too."""
        if self._writes:
            self._try_to_copy_files()

    def close(self) -> None:
        """The run has ended well: copies the rest, removes the working copy."""
        if self._writes:
            self._copy_files()
            shutil.rmtree(self.path, ignore_errors=True)

    def _try_to_copy_files(self) -> None:
        try:
            self._copy_files()
        except OSError as error:  # the next checkpoint says so again, and stops
            _log.warning("The run's files stay in %s for now. %s", self.path, error)

    def _copy_files(self, but: str = "") -> None:
        """Copies the files that changed, checkpoints and temporary ones apart."""
        with self._lock:
            self._last_copy = time.monotonic()
            but = _LAST if self._copying_checkpoint else but
            changed, copies = {}, {}
            for file in sorted(self.path.rglob("*")):
                name = file.relative_to(self.path)
                skipped = name.parts[0] in (remote_checkpoints.FOLDER, but)
                if file.is_file() and not skipped and not file.name.startswith("."):
                    stat = file.stat()
                    version = stat.st_mtime_ns, stat.st_size
                    if self._copied.get(file) != version:
                        changed[file] = version
                        copies[f"{self._url}/{name.as_posix()}"] = file
            remote.upload(copies)
            self._copied |= changed

    def _prune(self, step: int) -> None:
        """Removes the oldest checkpoints, where there are too many."""
        found = [s for s in remote_checkpoints.complete(self._url) if s <= step]
        for old in found[: -(self._keep or len(found))]:
            remote_checkpoints.remove(self._checkpoint(old))

    def _checkpoint(self, step: int) -> str:
        return f"{self._url}/{remote_checkpoints.FOLDER}/{step}"
