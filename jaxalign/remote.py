"""Files in buckets: what is read is copied to this machine first, checked and kept.

Every other module works on local files. Where a user may name a bucket (``gs://``,
``s3://`` or any other address that fsspec knows), the address goes through here and a
local path comes out. fsspec is used as it is, not through ``etils.epath``: that takes
TensorFlow's file system for every address wherever TensorFlow is installed, and
TensorFlow's has no ``s3://``.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

# Where copies live; on a disk that all processes of a job share, if there are several.
FOLDER_VARIABLE = "JAXALIGN_REMOTE_DIR"


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path names something that is not on this machine's file system.

    >>> is_remote("gs://bucket/run"), is_remote("runs/dpo")
    (True, False)
    """
    return "://" in os.fspath(path)


def local_only(path: str | os.PathLike[str], what: str) -> pathlib.Path:
    """The path, refused if it is remote; ``what`` it is for, the message says.

    >>> local_only("/tmp/cache", "CACHE_DIR")
    PosixPath('/tmp/cache')
    """
    if is_remote(path):
        raise ValueError(
            f"{what} needs a local path, got {path}. Write on this machine and copy "
            "what is finished, or mount the bucket and name the mounted path."
        )
    return pathlib.Path(path).expanduser()


def home() -> pathlib.Path:
    """The folder of all copies: ``JAXALIGN_REMOTE_DIR``, or one in ``~/.cache``."""
    given = os.environ.get(FOLDER_VARIABLE, "~/.cache/jaxalign/remote")
    return pathlib.Path(given).expanduser().absolute()


def below(folder: str | os.PathLike[str], name: Any) -> pathlib.Path:
    """The path in a folder that a name from outside stands for.

    A name that was read (in a bucket's listing, an index, a manifest, an answer) comes
    from whoever wrote it. Every such name becomes a path here, so that none leads out
    of the folder. ``/`` parts folders.

    Raises:
      ValueError: for what names nothing below the folder: an absolute path, ``..``,
        ``.``, an empty part, a NUL, what is no text.

    >>> below("copy", "policy/a")
    PosixPath('copy/policy/a')
    >>> below("copy", "policy/../../home")
    Traceback (most recent call last):
    ...
    ValueError: Expected the name of a file below copy, got 'policy/../../home'.
    """
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        shown = repr(name)[:200] + "..." * (len(repr(name)) > 200)
        raise ValueError(f"Expected the name of a file below {folder}, got {shown}.")
    return pathlib.Path(folder, *parts)


def copy_path(url: str, kind: str = "files") -> pathlib.Path:
    """Where the copy of an address lies; messages that name it still show the address.

    >>> copy_path("s3://bucket/run/a.jsonl").parts[-5:]
    ('files', 's3', 'bucket', 'run', 'a.jsonl')
    """
    scheme, _, rest = url.partition("://")
    parts = [scheme, *(part for part in rest.split("/") if part)]
    if ".." in parts:
        raise ValueError(f"{url}: '..' has no meaning in a bucket; write it out.")
    return below(home() / kind, "/".join(parts))


def connect(url: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path in it."""
    import fsspec

    try:
        # What is listed changes under us: other machines write to the same bucket.
        return fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise ImportError(
            f"{url} needs a package that is not installed: "
            f"pip install 'jaxalign[remote]'. ({error})"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{url}: {error}. Known are local paths, gs://, s3:// and what else fsspec "
            "reads."
        ) from error


@contextlib.contextmanager
def reporting(url: str) -> Iterator[None]:
    """Turns what a client raises into an OSError that names the address.

    Clients have exceptions of their own for missing credentials and servers that do not
    answer; the command line shows an OSError as one message.
    """
    try:
        yield
    except Exception as error:
        known = (FileNotFoundError, PermissionError)
        kind = next((kind for kind in known if isinstance(error, kind)), OSError)
        detail = (str(error).splitlines() or [""])[0].rstrip(".")
        raise kind(
            f"{url}: {type(error).__name__}: {detail}. Check the address, and that "
            "this machine's credentials reach it."
        ) from error


def expand(pattern: str) -> list[str]:
    """The addresses of the files that an address or a glob of them names, sorted."""
    fs, path = connect(pattern)
    with reporting(pattern):
        if fs.isfile(path):
            return [pattern]
        found = fs.glob(path, detail=True) if any(c in path for c in "*?[") else {}
        files = [name for name, info in found.items() if info["type"] == "file"]
        return sorted(fs.unstrip_protocol(name) for name in files)


def copy(path: str | os.PathLike[str]) -> pathlib.Path:
    """A local file with the content of a path: itself, or the copy of a remote file.

    A copy is taken again when the remote file has changed.
    """
    if not is_remote(path):
        return pathlib.Path(path)
    url = os.fspath(path)
    fs, inside = connect(url)
    target = copy_path(url)
    mark = target.with_name(f".{target.name}.version")
    with reporting(url):
        version = fs.ukey(inside)
        known = mark.read_text() if mark.is_file() else None
        if not (target.is_file() and known == version):
            target.parent.mkdir(parents=True, exist_ok=True)
            mark.unlink(missing_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                got = os.path.join(folder, "file")
                fs.get_file(inside, got)
                os.replace(got, target)
            mark.write_text(version)
    return target


def copy_folder(
    path: str | os.PathLike[str], wanted: Callable[[str], bool] = lambda name: True
) -> pathlib.Path:
    """A local folder with the content of a path: itself, or the copy of a remote one.

    Args:
      wanted: which of a remote folder's files to copy, by their path in it. What the
        remote folder no longer has is removed from the copy.

    Raises:
      FileNotFoundError: when a remote folder has none of the files.
      ValueError: when it lists a name that leads out of it.
    """
    if not is_remote(path):
        return pathlib.Path(path)
    url = os.fspath(path).rstrip("/")
    names = [name for name in listing(url) if wanted(name)]
    if not names:
        raise FileNotFoundError(f"{url}: expected a folder, found none of its files.")
    target = copy_path(url)
    for name in names:
        below(target, name)
    copies = {copy(f"{url}/{name}") for name in names}
    for old in target.rglob("*"):
        mine = old.is_file() and not old.name.startswith(".")
        if mine and old not in copies and wanted(old.relative_to(target).as_posix()):
            old.unlink()
    return target


def holds(url: str, *names: str) -> bool:
    """Whether a remote folder has one of some files, given by their path from it."""
    fs, path = connect(url)
    with reporting(url):
        return any(fs.exists(f"{path.rstrip('/')}/{name}") for name in names)


def listing(url: str) -> list[str]:
    """The files below an address, by their path from there; empty if there are none."""
    fs, path = connect(url)
    with reporting(url):
        found = fs.find(path)
    return sorted(name[len(path.rstrip("/")) + 1 :] for name in found)


def upload(files: dict[str, pathlib.Path]) -> None:
    """Writes local files to remote addresses, each whole or not at all."""
    if not files:
        return
    where = next(iter(files))
    fs, _ = connect(where)
    with reporting(where):
        paths = [fs._strip_protocol(url) for url in files]
        fs.put([str(file) for file in files.values()], paths)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A local path to write a file to; a remote one is uploaded when all went well."""
    if not is_remote(path):
        yield pathlib.Path(path)
        return
    url = os.fspath(path)
    connect(url)  # a missing package is not found out after the work
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / url.rsplit("/", 1)[-1]
        yield file
        upload({url: file})
