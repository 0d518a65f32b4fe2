"""Folders in progress beside a cache: made under a name that tells whose they are."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import socket
import tempfile

_STALE_SECONDS = 24 * 3600


def temporary_folder(directory: pathlib.Path) -> pathlib.Path:
    """Where this process writes a cache; `remove_stale` finds it after a kill.

    What other processes load from such a folder lies in one of `private_folder`.
    """
    return directory.with_name(f"{_mark(directory)}{os.getpid()}")


def private_folder(directory: pathlib.Path) -> pathlib.Path:
    """Makes such a folder that nobody else can enter, under a name nobody can guess."""
    prefix = f"{temporary_folder(directory).name}-"
    return pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=directory.parent))


def remove_stale(directory: str | os.PathLike[str]) -> None:
    """Removes what killed writers of this cache left beside it.

    A writer on this machine is known by its process id; one elsewhere counts as dead
    after a day without a change.
    """
    directory = pathlib.Path(directory)
    here = _mark(directory)
    # A shared disk's clock is not this machine's: it is asked for its own time.
    with tempfile.TemporaryFile(dir=directory.parent) as probe:
        now = os.fstat(probe.fileno()).st_mtime
    for path in directory.parent.glob(f".{directory.name}.tmp-*"):
        pid = re.match(r"\d+", path.name.removeprefix(here))
        if path.name.startswith(here) and pid:
            dead = not _alive(int(pid[0]))
        else:
            newest = max(p.stat().st_mtime for p in list(path.iterdir()) or [path])
            dead = now - newest > _STALE_SECONDS
        if dead:
            shutil.rmtree(path, ignore_errors=True)


def _mark(directory: pathlib.Path) -> str:
    return f".{directory.name}.tmp-{socket.gethostname()}-"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True
