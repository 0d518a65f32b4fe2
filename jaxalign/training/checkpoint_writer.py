"""Writes a run's checkpoints beside training, and restores the newest intact one.

Orbax writes to a temporary folder and renames it, so a killed writer leaves no half
checkpoint behind. Nothing is deleted because it could not be read: a checkpoint whose
files are proved not to be those that were written is renamed to ``<step>.damaged`` when
a run goes on from the one before it.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxalign.cluster import distributed
from jaxalign.training import checkpoints, damage, format_2
from jaxalign.training.damage import DamagedCheckpointError
from jaxalign.training.fingerprints import fingerprints, of_network
from jaxalign.training.partition import parted
from jaxalign.training.remote_checkpoints import FOLDER
from jaxalign.training.step import TrainState

_log = logging.getLogger(__name__)
STATE = "state"  # the item beside the networks

# Where more room helps: a full disk, a full quota, a limit on the size of files.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; those before it are intact."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      run_dir: the run directory.
      keep: how many to keep; None keeps all.

    Attributes:
      set_aside: steps whose checkpoints `restore` found damaged and renamed.

    Example::

        with Checkpoints(run_dir) as checkpoints:
            checkpoints.save(state, meta)  # training goes on
            checkpoints.settle()  # all is on disk
    """

    def __init__(self, run_dir: str | Path, keep: int | None = 2):
        self.directory = Path(run_dir).absolute() / FOLDER
        self.set_aside: list[int] = []
        if jax.process_index() == 0:
            # What a kill left. Orbax would do it in a thread that outlives a refusal.
            for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=True,
                async_options=ocp.AsyncOptions(
                    # A folder that cannot be made is an error at once; Orbax's threads
                    # would wait for it.
                    create_directories_asynchronously=False,
                    post_finalization_callback=self._describe,
                ),
            ),
        )
        self._step = 0  # being written, or written last
        self._meta: dict[str, Any] = {}  # its meta
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(
        self,
        state: TrainState,
        meta: dict[str, Any],
        then: Callable[[dict[str, Any]], None] = lambda meta: None,
    ) -> None:
        """Takes a copy of a state and writes it while training goes on.

        Waits for the checkpoint before it. Of several processes, all have to call it;
        their parameters are gathered for the fingerprints before it returns.

        Args:
          state: may be donated as soon as this returns.
          meta: what is saved with it; fingerprints are added. Its ``networks``
            describe them; one that comes ``from`` a checkpoint is not written, and of
            one with a ``base`` what trains.
          then: called with the whole meta, in another thread, when all is on disk.

        Raises:
          CheckpointWriteError: where this or the one before it cannot be written, as
            on a full disk.
        """
        self.settle()
        self._step = int(state.step)
        about = meta.get("networks", {})
        held = _held(state, about)
        trained = tuple(state.params)  # the writer keeps no state alive
        alone = jax.process_count() == 1
        if not alone:
            meta = _with_fingerprints(meta, held, trained)
        if not alone and (problem := distributed.from_first(self._try_directory)):
            raise self._write_error(OSError(problem))
        held, rest = _copied((held, _rest(state)))

        def begin() -> None:
            items = {**held, STATE: rest}
            args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
            self._manager.save(self._step, args=ocp.args.Composite(**args), force=True)

        def write() -> None:
            try:
                if alone:
                    self._meta = _with_fingerprints(meta, held, trained)
                    begin()
                self._manager.wait_until_finished()
                then(self._meta)
            except Exception as error:  # noqa: BLE001 - told by the next call
                self._error = error

        self._meta = meta
        if not alone:  # its barriers come in the order of the main thread's
            try:
                begin()
            except Exception as error:
                raise self._write_error(error) from error
        self._writer = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._writer.start()

    def check(self) -> None:
        """Whether the last checkpoint has failed so far; does not wait.

        Raises:
          CheckpointWriteError: if so.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise self._write_error(error) from error

    def settle(self) -> None:
        """Waits until the last checkpoint is on disk, and `then` was called.

        Raises:
          CheckpointWriteError: where it could not be written.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self.check()

    def _describe(self) -> None:
        """Writes meta into a checkpoint that lacks only its name."""
        if jax.process_index() == 0:
            folder = next(self.directory.glob(f"{self._step}.orbax-checkpoint-tmp*"))
            damage.write_meta(folder, self._meta)

    def _try_directory(self) -> str | None:
        """Why no checkpoint can be made here, if so; Orbax tells one process only."""
        probe = self.directory / ".probe"
        try:
            probe.mkdir(exist_ok=True)
            probe.rmdir()
        except OSError as error:
            return str(error)
        return None

    def _write_error(self, error: Exception) -> CheckpointWriteError:
        before = [
            step
            for step in checkpoints.saved_steps(self.directory.parent)
            if step < self._step
        ]
        kept = "There is none before it:"
        if before:
            kept = f"That of step {before[-1]} is intact:"
        mend = "make room" if _is_full(error) else "mend that"
        said = damage.first_line(error).rstrip(".")
        return CheckpointWriteError(
            f"The checkpoint of step {self._step} could not be written to "
            f"{self.directory}: {said}. {kept} {mend}, then start the same command "
            "again."
        )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the newest intact checkpoint, or None if there is none.

        Those that are proved damaged are renamed to ``<step>.damaged``, if there is an
        intact one before them: the run will come to their steps again.

        Args:
          like: a state of ``ShapeDtypeStruct``s with shardings.

        Returns:
          The state, without the frozen networks that the checkpoint does not hold, and
          the checkpoint's ``meta``.

        Raises:
          DamagedCheckpointError: when none is intact; nothing is renamed.
          OSError: when a checkpoint cannot be read, damaged or not.
          ValueError: when the saved parameters do not have the shapes of `like`.
        """
        problems: dict[int, str] = {}
        for step in reversed(self.steps()):
            problem = distributed.from_first(lambda step=step: self._damage(step))
            if problem is None:
                try:
                    restored = checkpoints.patiently(
                        lambda s=step: self._restore_step(s, like)
                    )
                except DamagedCheckpointError as error:
                    problem = str(error)
                else:
                    self._set_aside(problems, step)
                    return restored
            problems[step] = problem
        if problems:
            raise DamagedCheckpointError(
                f"No checkpoint in {self.directory} is intact; give another --run_dir, "
                "or delete it to start over. " + " ".join(problems.values())
            )
        return None

    def _damage(self, step: int) -> str | None:
        folder = self.directory / str(step)
        try:
            damage.check_files(folder, damage.read_meta(folder))
        except DamagedCheckpointError as error:
            return str(error)
        return None

    def _set_aside(self, problems: dict[int, str], intact: int) -> None:
        for step, problem in problems.items():
            folder = self.directory / str(step)
            aside = free_name(folder.with_name(f"{step}.damaged"))
            if jax.process_index() == 0:
                os.rename(folder, aside)
            _log.warning(
                "The checkpoint of step %d is damaged and set aside as %s; going back "
                "to step %d. %s",
                step,
                aside.name,
                intact,
                problem,
            )
            self.set_aside.append(step)
        if problems:
            distributed.barrier("damaged checkpoints set aside", 600)
            self._manager.reload()

    def _restore_step(self, step: int, like: TrainState) -> Any:
        folder = self.directory / str(step)
        meta = damage.read_meta(folder)
        before = meta.get("format", 1) < 3
        state = (format_2.restore if before else _restored)(folder, meta, like)
        # Later formats know the fingerprint of each network: none is hashed twice.
        about = meta["networks"]
        found = fingerprints(_held(state, about), state.params if before else ())
        for name, print_ in found["networks"].items():
            written = about.get(name, {}).get("fingerprint")
            print_ = of_network(about.get(name, {}), print_)
            damage.compare(folder, meta, name, written, print_)
        if before:
            written = meta.get("params_fingerprint")
            damage.compare(folder, meta, "rest", written, found["params_fingerprint"])
        return state, meta

    def close(self) -> None:
        """Waits for what is being written.

        Raises:
          CheckpointWriteError: where it could not be.
        """
        self.settle()
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        """The loop has ended; if by an error, a failed checkpoint may be its cause.

        What is being written is finished, where no other process has to help.
        """
        if error is None or isinstance(error, CheckpointWriteError):
            return
        if jax.process_count() == 1:
            self.settle()
        self.check()


def _is_full(error: BaseException | None) -> bool:
    """Whether a disk, a quota or a file has no room, as the system said it."""
    while error is not None:
        said = re.findall(r"(?:Errno|OS error) (\d+)", str(error))
        if {getattr(error, "errno", None), *map(int, said)} & {*_FULL}:
            return True
        error = error.__cause__ or error.__context__
    return False


def free_name(path: Path) -> Path:
    """A path that does not exist: this one, or with the first number that is free."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _with_fingerprints(
    meta: dict[str, Any], held: dict[str, Any], trained: tuple[str, ...]
) -> dict[str, Any]:
    """``meta`` with the fingerprints of all parameters and of each network."""
    found = fingerprints(held, trained)
    about = meta.get("networks", {})
    described = {
        name: {
            **about.get(name, {}),
            "fingerprint": of_network(about.get(name, {}), print_),
        }
        for name, print_ in found["networks"].items()
    }
    return {**meta, **found, "networks": {**about, **described}}


def _held(state: TrainState, about: dict[str, Any]) -> dict[str, Any]:
    """Of each network what a checkpoint holds: all, what trains, or nothing."""
    found = {}
    for name, tree in state.networks.items():
        told = about.get(name, {})
        if "base" in told:
            found[name] = state.params[name]
        elif "from" not in told:
            found[name] = tree
    return found


def _rest(state: TrainState) -> dict[str, Any]:
    """What the item ``state`` holds."""
    return {
        "opt_state": state.opt_state,
        "step": state.step,
        "running": state.running,
    }


def _restored(folder: Path, meta: dict[str, Any], like: TrainState) -> TrainState:
    about = meta["networks"]
    written = {name for name, told in about.items() if "from" not in told}
    params, frozen = {}, {}
    for name, tree in _held(like, about).items():
        if name in written or name in like.params:
            found = checkpoints.read_item(folder, meta, name, tree)
            trained, resting = parted(found, like.params.get(name, {}))
            params |= {name: trained} if trained else {}
            frozen |= {name: resting} if resting else {}
    rest = checkpoints.read_item(folder, meta, STATE, _rest(like))
    return TrainState(
        params=params,
        frozen=frozen,
        finite=jax.device_put(np.array(True), like.finite.sharding),
        **rest,
    )


def _copied(tree: Any) -> Any:
    """A copy that training does not change: on the host, if one process has all.

    Of several processes Orbax copies each one's part to the host; only on CPU devices
    that copy is the array itself.
    """
    on_cpu = jax.default_backend() == "cpu"
    if jax.process_count() > 1:
        return jax.tree.map(jnp.copy, tree) if on_cpu else tree
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not on_cpu:
            leaf.copy_to_host_async()
    return jax.tree.map(np.array if on_cpu else np.asarray, tree)
