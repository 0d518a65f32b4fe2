"""Checkpoints: Orbax, written beside training, self-describing, compared when read.

``RUN_DIR/checkpoints/<step>/`` holds three items: ``policy`` (what is generated and
scored with), ``rest`` (other networks and the optimizer's state) and ``meta`` (JSON:
step, data position and fingerprint, reward statistics, model, vocabulary, fingerprints
of parameters and files; see `jaxalign.training.damage`). Orbax writes to a temporary
folder and renames it, so a killed writer leaves no half checkpoint behind.

Nothing is deleted because it could not be read. A checkpoint whose files are proved not
to be those that were written is renamed to ``<step>.damaged`` when a run goes on from
the one before it.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxalign import models, remote, vocabularies
from jaxalign.cluster import distributed
from jaxalign.training import damage, remote_checkpoints
from jaxalign.training.damage import DamagedCheckpointError
from jaxalign.training.fingerprints import (
    fingerprints,
    leaf_names,
    params_fingerprint,
)
from jaxalign.training.step import TrainState

__all__ = [
    "CheckpointWriteError",
    "Checkpoints",
    "DamagedCheckpointError",
    "Policy",
    "leaf_names",
    "load_policy",
    "newest_meta",
    "newest_policy",
    "params_fingerprint",
    "read_meta",
    "resolve",
    "verify",
]

_log = logging.getLogger(__name__)
_FOLDER = remote_checkpoints.FOLDER
_ALL = "params_fingerprint"  # of the policy and the other networks
_T = TypeVar("_T")

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
        self.directory = Path(run_dir).absolute() / _FOLDER
        self.set_aside: list[int] = []
        if jax.process_index() == 0:
            # What a kill left. Orbax would do it in a thread that outlives a refusal.
            for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=("policy", "rest"),
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
          meta: what is saved with it; fingerprints are added.
          then: called with the whole meta, in another thread, when all is on disk.

        Raises:
          CheckpointWriteError: where this or the one before it cannot be written, as
            on a full disk.
        """
        self.settle()
        self._step = int(state.step)
        alone = jax.process_count() == 1
        if not alone:
            meta = {**meta, **fingerprints(state.params)}
        if not alone and (problem := distributed.from_first(self._try_directory)):
            raise self._write_error(OSError(problem))
        policy, rest = _copied((state.params["policy"], _rest(state)))

        def begin() -> None:
            self._manager.save(
                self._step,
                args=ocp.args.Composite(
                    policy=ocp.args.StandardSave(policy),
                    rest=ocp.args.StandardSave(rest),
                ),
                force=True,
            )

        def write() -> None:
            try:
                if alone:
                    params = {"policy": policy, **rest["params"]}
                    self._meta = {**meta, **fingerprints(params)}
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
        before = [step for step in _steps(self.directory.parent) if step < self._step]
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
                    restored = _patiently(lambda s=step: self._restore_step(s, like))
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
            damage.check_files(folder, damage.read_meta(folder), "policy", "rest")
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
        policy = _read(folder, meta, "policy", like.params["policy"])
        rest = _read(folder, meta, "rest", _rest(like))
        params = {"policy": policy, **rest["params"]}
        found = fingerprints(params)
        for item, name in (("policy", "policy_fingerprint"), ("rest", _ALL)):
            damage.compare(folder, meta, name, item, found[name])
        state = TrainState(
            step=rest["step"],
            params=params,
            opt_state=rest["opt_state"],
            finite=jax.device_put(np.array(True), like.finite.sharding),
            carried=rest["carried"],
        )
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


def _rest(state: TrainState) -> dict[str, Any]:
    """All of a state but the policy."""
    return {
        "params": {k: v for k, v in state.params.items() if k != "policy"},
        "opt_state": state.opt_state,
        "step": state.step,
        "carried": state.carried,
    }


def _patiently(read: Callable[[], _T]) -> _T:
    """Repeats a read that fails; of several processes, none may read alone."""
    return damage.patiently(read) if jax.process_count() == 1 else read()


def _read(folder: Path, meta: dict[str, Any], item: str, like: Any) -> Any:
    """Reads an item as arrays of the shapes and shardings of `like`."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder / item, like)
    except Exception as error:
        meant = damage.explain(folder, meta, item, error)
        if meant is not error or not isinstance(error, ValueError | KeyError):
            raise meant from error
        raise ValueError(
            f"{folder / item} is intact, but does not fit this model and optimizer "
            "(give another --run_dir, or the settings the run was started with): "
            f"{damage.first_line(error)}"
        ) from error


@dataclasses.dataclass(frozen=True)
class Policy:
    """A trained policy as loaded from a checkpoint: all that inference needs."""

    model: models.T5
    params: Any
    vocabulary: Any
    meta: dict[str, Any]
    path: Path


def resolve(path: str | Path) -> Path:
    """The checkpoint folder a path means: itself, or the newest of a run directory.

    Of a remote one it is a local copy with what inference reads.

    Raises:
      FileNotFoundError: saying what was looked for, and where.
    """
    if remote.is_remote(path):
        return remote_checkpoints.copy_policy(str(path))
    path = Path(path).absolute()
    if (path / "meta").is_dir() or (path / "policy").is_dir():
        return path
    steps = _steps(path)
    if not steps:
        raise FileNotFoundError(
            f"No checkpoint at {path}: expected a run directory with "
            f"{_FOLDER}/<step>/, or one of those steps."
        )
    return path / _FOLDER / str(steps[-1])


def _steps(run_dir: Path) -> list[int]:
    """The steps of which a run directory has a checkpoint, ascending."""
    names = (p.name for p in (run_dir / _FOLDER).glob("*"))
    return sorted(int(name) for name in names if name.isdigit())


def read_meta(path: str | Path) -> dict[str, Any]:
    """The ``meta`` item of a checkpoint or run directory.

    Raises:
      DamagedCheckpointError: when it is not what was written.
    """
    return damage.read_meta(resolve(path))


def verify(path: str | Path) -> None:
    """Compares a policy's files with what was written, without loading them.

    Raises:
      DamagedCheckpointError: naming the file that differs.
    """
    folder = resolve(path)
    damage.check_files(folder, damage.read_meta(folder), "policy")


def run_meta(run_dir: str | Path) -> dict[str, Any] | None:
    """The newest readable ``meta`` of a run directory; None if it has none.

    It only reads: a folder that turns out to be another run's stays as it is.
    """
    steps = (Path(run_dir) / _FOLDER).glob("*")
    for step in sorted((int(p.name) for p in steps if p.name.isdigit()), reverse=True):
        try:
            return read_meta(Path(run_dir) / _FOLDER / str(step))
        except Exception:  # noqa: BLE001 - any damage, which restoring tells
            continue
    return None


def stored_model(meta: dict[str, Any]) -> models.T5:
    """The network of a checkpoint, in its layout and as this machine can compute it."""
    execution = meta.get("execution", {})
    return models.T5(models.T5Config.stored(meta["model"], execution))


def load_policy(path: str | Path, shardings: Any = None) -> Policy:
    """Loads the policy of a checkpoint or run directory.

    Args:
      path: a run directory (its newest checkpoint is taken) or a checkpoint.
      shardings: tree of shardings for the parameters; one device by default.

    Raises:
      DamagedCheckpointError: when it is not what was written; the message names the
        file.
    """
    folder = resolve(path)
    meta = damage.read_meta(folder)
    model = stored_model(meta)
    _log.info("Network of %s: %s", path, models.describe(model))
    shapes = models.shapes(model)
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, shapes)
    like = jax.tree.map(
        lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh),
        shapes,
        shardings,
    )
    # Before it is decoded: decoders of damaged files print, wait or crash.
    damage.check_files(folder, meta, "policy")
    params = _patiently(lambda: _read(folder, meta, "policy", like))
    found = params_fingerprint(params)
    damage.compare(folder, meta, "policy_fingerprint", "policy", found)
    vocabulary = vocabularies.from_json(meta["vocabulary"], folder.parents[1])
    return Policy(model, params, vocabulary, meta, folder)


def newest_policy(path: str | Path, shardings: Any = None) -> Policy:
    """Loads the newest intact policy of a run directory, or the checkpoint named.

    A damaged one is passed over, with a warning, where the run has an older one.

    Raises:
      DamagedCheckpointError: when the checkpoint named, or all of a run, are damaged.
    """
    more = () if shardings is None else (shardings,)
    return _newest_intact(path, lambda path: load_policy(path, *more))


def newest_meta(path: str | Path) -> dict[str, Any]:
    """The newest intact ``meta`` of a run directory, or that of the checkpoint named.

    Raises:
      DamagedCheckpointError: as `newest_policy`.
    """
    return _newest_intact(path, lambda path: read_meta(path))


def _newest_intact(path: str | Path, read: Callable[[str | Path], _T]) -> _T:
    try:
        return read(path)
    except DamagedCheckpointError as error:
        for older in _older(path):
            try:
                found = read(older)
            except DamagedCheckpointError:
                continue
            _log.warning("%s Using %s instead.", error, older)
            return found
        raise


def _older(path: str | Path) -> list[str]:
    """The checkpoints of a run directory but the newest, the newest first."""
    if remote.is_remote(path):
        run_dir, steps = str(path).rstrip("/"), remote_checkpoints.complete(str(path))
    else:
        run_dir, steps = str(Path(path).absolute()), _steps(Path(path))
    return [f"{run_dir}/{_FOLDER}/{step}" for step in reversed(steps[:-1])]
