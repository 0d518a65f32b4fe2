"""Whether a checkpoint's files are those that were written.

``meta/metadata``, written last, is JSON that names the SHA-256 of every file of the
other items (``files``) and its own (``meta_fingerprint``). So damage is proved by
content, file by file, and a disk or network that fails for a moment proves nothing.
Checkpoints that were written without such a list are judged by the fingerprint of their
parameters alone.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxalign import files
from jaxalign.files import write_atomically
from jaxalign.training import fingerprints

_T = TypeVar("_T")

META_FILE = "meta/metadata"  # where Orbax's JSON handler looks too
NEW_KEYS = _OWN, _FILES = "meta_fingerprint", "files"
_KINDS = {"networks": dict, "main": str, "vocabulary": dict, "step": int}
_PAUSES = (0.2, 1.0, 3.0)  # seconds between attempts to read


class DamagedCheckpointError(ValueError):
    """A checkpoint is not what was written; the message names the file."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type if it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def patiently(read: Callable[[], _T]) -> _T:
    """Calls what reads files, again after a moment where it fails."""
    for pause in _PAUSES:
        try:
            return read()
        except OSError:
            time.sleep(pause)
    return read()


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Writes a checkpoint's ``meta``, with the SHA-256 of all files there are."""
    names = sorted(
        file.relative_to(folder).as_posix()
        for item in folder.iterdir()
        if item.is_dir()
        for file in item.rglob("*")
        if file.is_file()
    )
    meta = {**meta, _FILES: fingerprints.files_sha256(folder, names)}
    meta = json.loads(json.dumps(meta))  # as it will be read: lists, no tuples
    meta[_OWN] = files.json_sha256(meta)
    write_atomically(folder / META_FILE, json.dumps(meta))


def read_meta(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint's ``meta``.

    Raises:
      DamagedCheckpointError: when it is missing or not what was written.
      OSError: when it cannot be read.
    """
    path = folder / META_FILE

    def damaged(problem: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(f"{path} is damaged: {problem}.")

    try:
        meta = json.loads(patiently(path.read_bytes))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise damaged("the file is missing") from error
    except (ValueError, RecursionError) as error:
        raise damaged(f"it is no JSON ({first_line(error)})") from error
    if not isinstance(meta, dict):
        raise damaged("it is no JSON object")
    own = meta.pop(_OWN, None)
    if (own or _FILES in meta) and own != files.json_sha256(meta):
        raise damaged(f"its own {_OWN} differs from its content")
    if meta.get("format", 1) < 3:
        meta = _with_networks(meta)
    for name, kind in _KINDS.items():
        if not isinstance(meta.get(name), kind):
            raise damaged(f"it lacks {name!r}")
    stats = meta.get("reward_stats")
    if stats is not None and (not isinstance(stats, list) or len(stats) != 2):
        raise damaged(f"reward_stats is {stats!r}, expected mean and deviation")
    return meta


def _with_networks(meta: dict[str, Any]) -> dict[str, Any]:
    """The ``meta`` of formats 1 and 2, which described the policy alone."""
    if not isinstance(meta.get("model"), dict):
        return meta
    policy = {
        "kind": "T5",
        "options": {},
        "shape": meta["model"],
        "execution": meta.get("execution", {}),
        "fingerprint": meta.get("policy_fingerprint"),
    }
    return {**meta, "main": "policy", "networks": {"policy": policy}}


def check_files(folder: Path, meta: dict[str, Any], *items: str) -> None:
    """Compares the files of some items, or of all, with those that were written.

    Raises:
      DamagedCheckpointError: naming the first that is missing or differs.
      OSError: when one cannot be read.
    """
    listed = meta.get(_FILES, {})
    names = [n for n in sorted(listed) if not items or n.split("/", 1)[0] in items]
    missing = [n for n in names if not (folder / n).is_file()]
    if missing and folder.is_dir():
        raise DamagedCheckpointError(
            f"{folder / missing[0]} is missing: the checkpoint is damaged."
        )
    found = patiently(lambda: fingerprints.files_sha256(folder, names))
    for name in names:
        if found[name] != listed[name]:
            size = (folder / name).stat().st_size
            raise DamagedCheckpointError(
                f"{folder / name} ({size} bytes) is damaged: its fingerprint is not "
                "that of the file that was written."
            )


def explain(
    folder: Path, meta: dict[str, Any], item: str, error: Exception
) -> Exception:
    """What an error in reading an item means: damage, or something else.

    Returns:
      A `DamagedCheckpointError` only where the files prove it.
    """
    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
        return error
    try:
        check_files(folder, meta, item)
    except DamagedCheckpointError as damaged:
        return damaged
    if _FILES in meta:
        return error
    # Without a list: what can be read as it is, whatever it was to become, is whole.
    try:
        _read_as_it_is(folder / item)
    except (MemoryError, jax.errors.JaxRuntimeError) as failed:
        return failed
    except Exception as failed:  # noqa: BLE001 - decoders raise anything
        said = first_line(failed)[:300]
        if re.search(r"OS error (?!2\b)\d+|UNAVAILABLE|PERMISSION_DENIED", str(failed)):
            return OSError(f"{folder / item} cannot be read now: {said}")
        return DamagedCheckpointError(f"{folder / item} is damaged: {said}")
    return error


def _read_as_it_is(path: Path) -> None:
    """Decodes all arrays of an item; every process of a job has to ask."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=args))


def compare(
    folder: Path, meta: dict[str, Any], item: str, written: str | None, found: str
) -> None:
    """Compares the fingerprint of parameters that were read with the saved one."""
    if written is None or written == found:
        return
    check_files(folder, meta, item)  # names the file, where there is a list
    raise DamagedCheckpointError(
        f"{folder / item} is damaged: the fingerprint of its parameters is "
        f"{found[:16]}..., {META_FILE} says {str(written)[:16]}..."
    )
