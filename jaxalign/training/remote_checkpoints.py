"""Checkpoints in a bucket: a list of files, written last, makes one complete.

Beside ``checkpoints/<step>/`` lies ``checkpoints/<step>.json`` with the SHA-256 of each
of its files. An object store cannot rename a folder when it is whole,
so that list decides: a checkpoint without it is none, one with other bytes is damaged.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxalign import remote, vocabularies
from jaxalign.files import file_sha256
from jaxalign.training.damage import DamagedCheckpointError

_log = logging.getLogger(__name__)

FOLDER = "checkpoints"
_OF_TRAINING = ("state", "rest")  # items that only a run that goes on reads


def complete(run_dir: str) -> list[int]:
    """The steps whose checkpoints in a remote run directory are complete, ascending."""
    fs, path = remote.connect(f"{run_dir.rstrip('/')}/{FOLDER}")
    with remote.reporting(run_dir):
        names = {name.rsplit("/", 1)[-1] for name in fs.glob(f"{path}/*")}
    steps = {int(name) for name in names if name.isdecimal()}
    whole = sorted(step for step in steps if f"{step}.json" in names)
    if steps and not whole:
        _log.warning(
            "%s has checkpoints of steps %s, none of them complete: there is no "
            "%s/<step>.json, which is written last. One that was copied there by other "
            "means has to be named itself: %s/%s/%d",
            run_dir,
            sorted(steps),
            FOLDER,
            run_dir,
            FOLDER,
            max(steps),
        )
    return whole


def give(folder: Path, url: str) -> None:
    """Copies a checkpoint into a bucket; its list of files comes last."""
    files = {
        file.relative_to(folder).as_posix(): file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    content = {name: file_sha256(file) for name, file in files.items()}
    remove(url)  # what a killed process left
    remote.upload({f"{url}/{name}": file for name, file in files.items()})
    with remote.writing(f"{url}.json") as listed:
        listed.write_text(json.dumps({"sha256": content}, indent=1) + "\n")


def remove(url: str) -> None:
    """Removes a checkpoint from a bucket, its list of files first."""
    fs, path = remote.connect(url)
    with remote.reporting(url):
        if fs.exists(f"{path}.json"):
            fs.rm_file(f"{path}.json")
        if fs.exists(path):
            fs.rm(path, recursive=True)


def set_aside(url: str) -> None:
    """Renames a damaged checkpoint in a bucket, its list of files first.

    ``checkpoints/6`` becomes ``checkpoints/6.damaged``, which counts as no checkpoint.
    """
    fs, path = remote.connect(url)
    with remote.reporting(url):
        number, aside = 1, f"{path}.damaged"
        while fs.exists(aside) or fs.exists(f"{aside}.json"):
            number += 1
            aside = f"{path}.damaged-{number}"
        if fs.exists(f"{path}.json"):
            fs.mv(f"{path}.json", f"{aside}.json")
        for name in fs.find(path):  # an object store has no folders to rename
            fs.mv(name, f"{aside}{name[len(path) :]}")


def take(url: str, target: Path, without: tuple[str, ...] = ()) -> str | None:
    """Copies a checkpoint from a bucket, whole or not at all.

    Args:
      url: of the checkpoint, ``.../checkpoints/<step>``.
      target: the folder to make.
      without: items that are left there.

    Returns:
      None, or what is wrong with the checkpoint's files.
    """
    fs, path = remote.connect(url)
    try:
        listed = _listed(url)
    except DamagedCheckpointError as error:
        return str(error)
    names = listed if listed is not None else remote.listing(url)
    if without:  # nor what Orbax notes about the whole
        names = [n for n in names if "/" in n and n.split("/", 1)[0] not in without]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".taken-") as taken:
        try:
            files = [remote.below(Path(taken, "checkpoint"), name) for name in names]
        except ValueError as error:
            return f"its list of files leads elsewhere: {error}"
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with remote.reporting(url):
                fs.get([f"{path}/{name}" for name in names], [str(f) for f in files])
        except FileNotFoundError as error:
            return str(error)
        for name, file in zip(names, files, strict=True):
            if listed is not None and file_sha256(file) != listed[name]:
                size = file.stat().st_size
                return f"{name} ({size} bytes) is not what was written there."
        shutil.rmtree(target, ignore_errors=True)
        os.rename(Path(taken, "checkpoint"), target)
    return None


def copy_networks(path: str) -> Path:
    """A local copy of a remote checkpoint, or of a run directory's newest.

    It has what inference reads: networks, ``meta`` and the vocabulary. A copy that is
    there is used again as long as the checkpoint is the same.
    """
    url = path.rstrip("/")
    run_dir, parent, last = url.rsplit("/", 2)
    if not (parent == FOLDER and last.isdigit()):
        steps = complete(url)
        if not steps:
            raise FileNotFoundError(
                f"No checkpoint at {url}: expected a run directory with "
                f"{FOLDER}/<step>/ and {FOLDER}/<step>.json, or one of those "
                "steps."
            )
        run_dir, url = url, f"{url}/{FOLDER}/{steps[-1]}"
    target = remote.copy_path(url)
    mark = target.with_name(f".{target.name}.version")
    version = json.dumps(_listed(url) or _versions(url), sort_keys=True)
    with _alone(target):
        if not (target.is_dir() and mark.is_file() and mark.read_text() == version):
            mark.unlink(missing_ok=True)
            problem = take(url, target, _OF_TRAINING)
            if problem or not (target / "meta").is_dir():
                raise DamagedCheckpointError(
                    f"{url} is damaged: {problem or 'it has no meta'}"
                )
            mark.write_text(version)
    for name in vocabularies.FILES:
        if remote.holds(run_dir, name):
            remote.copy(f"{run_dir}/{name}")
    return target


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One process after the other: those of a job come here at the same time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(f".{target.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _listed(url: str) -> dict[str, str] | None:
    """SHA-256 by file of a checkpoint; None if it has no list."""
    fs, path = remote.connect(f"{url}.json")
    with remote.reporting(url):
        if not fs.exists(path):
            return None
        content = fs.cat_file(path)
    try:
        return dict(json.loads(content)["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(
            f"{url}.json is damaged: expected JSON with the SHA-256 of each file."
        ) from error


def _versions(url: str) -> dict[str, str]:
    """What tells whether files without a list have changed."""
    fs, path = remote.connect(url)
    with remote.reporting(url):
        return {name: fs.ukey(name) for name in sorted(fs.find(path))}
