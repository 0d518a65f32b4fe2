"""Checkpoints: Orbax, asynchronous, self-describing.

``RUN_DIR/checkpoints/<step>/`` holds three items: ``policy`` (what is generated and
scored with), ``rest`` (other networks and the optimizer's state) and ``meta`` (JSON:
step, data position and fingerprint, reward statistics, model, vocabulary, parameter
fingerprints). Orbax writes to a temporary folder and renames it, so a killed writer
leaves no half checkpoint behind.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxalign import models, remote, vocabularies
from jaxalign.training import remote_checkpoints
from jaxalign.training.step import TrainState

_log = logging.getLogger(__name__)
_FOLDER = remote_checkpoints.FOLDER


def leaf_names(tree: Any) -> dict[str, Any]:
    """The leaves of a nested dict by ``/``-joined name, in name order."""
    named = {
        "/".join(str(getattr(k, "key", k)) for k in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return dict(sorted(named.items()))


def params_fingerprint(params: Any) -> str:
    """SHA-256 over the parameter leaves' names and bytes, in name order.

    Little-endian, C order, gathered over processes first: the same parameters give the
    same fingerprint however they were sharded.
    """
    digest = hashlib.sha256()
    for name, leaf in leaf_names(params).items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; those before it are intact."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      run_dir: the run directory.
      keep: how many to keep; None keeps all.
    """

    def __init__(self, run_dir: str | Path, keep: int | None = 2):
        self.directory = Path(run_dir).absolute() / _FOLDER
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=("policy", "rest", "meta"),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, cleanup_tmp_directories=True
            ),
        )

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves; returns when all is on disk.

        Raises:
          CheckpointWriteError: where it cannot be written, as on a full disk.
        """
        before = self.steps()
        try:
            self._save(state, meta)
            self._manager.wait_until_finished()
        except Exception as error:
            kept = "There is none before it:"
            if before:
                kept = f"That of step {before[-1]} is intact:"
            raise CheckpointWriteError(
                f"The checkpoint of step {int(state.step)} could not be written to "
                f"{self.directory}: {str(error).splitlines()[0]} {kept} make room, "
                "then start the same command again."
            ) from error

    def _save(self, state: TrainState, meta: dict[str, Any]) -> None:
        others = {k: v for k, v in state.params.items() if k != "policy"}
        rest = _rest(others, state)
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                policy=ocp.args.StandardSave(state.params["policy"]),
                rest=ocp.args.StandardSave(rest),
                meta=ocp.args.JsonSave(meta),
            ),
            force=True,
        )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the newest intact checkpoint, or None if there is none.

        Args:
          like: a state of ``ShapeDtypeStruct``s with shardings.

        Raises:
          ValueError: when the saved parameters do not have the shapes of `like`.
        """
        problems: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                restored = self._restore_step(step, like)
            except Exception as error:  # noqa: BLE001 - any damage: try an older one
                problems[step] = str(error).splitlines()[0]
                continue
            for damaged, problem in problems.items():
                _log.warning(
                    "The checkpoint of step %d is damaged and removed; going back to "
                    "step %d. %s",
                    damaged,
                    step,
                    problem,
                )
                # The run will come to this step again, and must be able to save it.
                self._manager.delete(damaged)
            return restored
        if problems:
            raise ValueError(
                f"No checkpoint in {self.directory} could be restored into this "
                "model and optimizer (give another --run_dir, or the settings the run "
                "was started with): "
                + "; ".join(f"step {s}: {p}" for s, p in problems.items())
            )
        return None

    def _restore_step(self, step: int, like: TrainState) -> Any:
        others = {k: v for k, v in like.params.items() if k != "policy"}
        rest = _rest(others, like)
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                policy=ocp.args.StandardRestore(like.params["policy"]),
                rest=ocp.args.StandardRestore(rest),
                meta=ocp.args.JsonRestore(),
            ),
        )
        state = TrainState(
            step=found.rest["step"],
            params={"policy": found.policy, **found.rest["params"]},
            opt_state=found.rest["opt_state"],
            finite=jax.device_put(np.array(True), like.finite.sharding),
            carried=found.rest["carried"],
        )
        return state, found.meta

    def close(self) -> None:
        self._manager.close()


def _rest(others: dict[str, Any], state: TrainState) -> dict[str, Any]:
    """All of a state but the policy."""
    return {
        "params": others,
        "opt_state": state.opt_state,
        "step": state.step,
        "carried": state.carried,
    }


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
    if (path / "meta").is_dir():
        return path
    steps = [p for p in (path / _FOLDER).glob("*") if p.name.isdigit()]
    if not steps:
        raise FileNotFoundError(
            f"No checkpoint at {path}: expected a run directory with "
            f"{_FOLDER}/<step>/, or one of those steps."
        )
    return max(steps, key=lambda p: int(p.name))


def read_meta(path: str | Path) -> dict[str, Any]:
    """The ``meta`` item of a checkpoint or run directory."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore(resolve(path) / "meta")


def newest_meta(run_dir: str | Path) -> dict[str, Any] | None:
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
    """
    folder = resolve(path)
    meta = read_meta(folder)
    model = stored_model(meta)
    shapes = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, shapes)
    like = jax.tree.map(
        lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh),
        shapes,
        shardings,
    )
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(folder / "policy", like)
    vocabulary = vocabularies.from_json(meta["vocabulary"], folder.parents[1])
    return Policy(model, params, vocabulary, meta, folder)
