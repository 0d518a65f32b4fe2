"""A folder that is there when it is whole, and not before."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxalign import remote

_PARTIAL = ".partial"
_log = logging.getLogger(__name__)


@contextmanager
def new_folder(path: str | os.PathLike[str], *last: str) -> Iterator[Path]:
    """A local folder to write into, which gets its name when all went well.

    Args:
      path: that does not exist or is an empty folder; it may be in a bucket, which gets
        the files at the end.
      last: files that come last to a bucket, without which the folder is none.

    Raises:
      FileExistsError: where something is there already.
      OSError: where the folder cannot be made.
    """
    if remote.is_remote(path):
        url = os.fspath(path).rstrip("/")
        if remote.listing(url):
            raise FileExistsError(f"{url} is not empty; give another name.")
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
            found = sorted(p for p in Path(name).rglob("*") if p.is_file())
            files = {p.relative_to(name).as_posix(): p for p in found}
            ends = {f"{url}/{name}": files.pop(name) for name in last if name in files}
            remote.upload({f"{url}/{name}": file for name, file in files.items()})
            remote.upload(ends)
        return
    target = Path(path).expanduser().absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} is there already; give another name.")
    if target.suffix == _PARTIAL:  # of a caller, who gives it its name
        yield target
        return
    killed = sorted(target.parent.glob(f".{target.name}.*{_PARTIAL}"))
    if killed:
        _log.warning("Unless it is being written, remove what a kill left: %s", killed)
    partial = target.with_name(f".{target.name}.{os.getpid()}{_PARTIAL}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise type(error)(
            error.errno, f"{target} cannot be written: {error.strerror}"
        ) from error
    try:
        yield partial
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
