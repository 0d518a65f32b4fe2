"""Writes a tokenised cache (`jaxalign.data.cache`), whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from jaxalign import remote
from jaxalign.data.cache import FORMAT, INDEX, META, META_DIGEST, VERSION, meta_digest
from jaxalign.data.rows import DTYPES, Columns, Index, Row, check_row
from jaxalign.files import file_sha256

_SHARD_BYTES = 256 * 2**20
_STALE_SECONDS = 24 * 3600


class CacheWriter:
    """Writes a cache into a temporary sibling and renames it when complete.

    A killed writer leaves nothing that looks like a cache; the next one removes what
    it left. An older cache at the same place is replaced at the last moment, and
    readers that hold it open are not disturbed.

    Args:
      directory: where the cache appears; anything there but a cache or an empty
        folder is refused.
      fingerprint: identity of what the rows are made from.
      summary: JSON-ready counts; ``writer.summary`` may change until the end.

    Example::

        with CacheWriter(path, schema="supervised", vocabulary=ByteVocabulary(),
                         fingerprint=digest) as writer:
            writer.write(row)
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        schema: str,
        vocabulary: Any,
        fingerprint: str,
        summary: dict[str, Any] | None = None,
        source: Any = None,
    ):
        # Renames there are atomic, and rows are read in any order.
        self.directory = remote.local_only(directory, "A tokenised cache").absolute()
        self.summary = dict(summary or {})
        self._schema, self._vocabulary = schema, vocabulary
        self._fingerprint, self._source = fingerprint, source
        self._temporary = temporary_folder(self.directory)

    def __enter__(self) -> CacheWriter:
        target = self.directory
        occupied = target.exists() and not (target / META).is_file()
        if occupied and not (target.is_dir() and not any(target.iterdir())):
            raise FileExistsError(
                f"{target} exists and is not a cache (no {META}); give another "
                "folder or remove it."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        self._found = _version(target / META)
        remove_stale(target)
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir()
        self._columns = Columns()
        self._keys: set[str] = set()
        self._digest = hashlib.sha256()
        self._shard_rows: list[int] = []
        self._shard_bytes = 0
        self._writer: ArrayRecordWriter | None = None
        return self

    def write(self, row: Row) -> None:
        """Appends a row; a ValueError names the field that breaks the schema."""
        check_row(row, self._vocabulary.vocab_size)
        if row.key in self._keys:
            raise ValueError(f"Row {row.key!r}: the key was written before.")
        try:
            record = row.to_bytes()
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"Row {row.key!r}: key and metadata must be JSON values ({error})."
            ) from error
        with self._telling_disk_errors():
            if self._writer is None or self._shard_bytes > _SHARD_BYTES:
                self._close_shard()
                shard = self._temporary / f"{len(self._shard_rows)}"
                self._writer = ArrayRecordWriter(str(shard), "group_size:1")
                self._shard_rows.append(0)
                self._shard_bytes = 0
            self._writer.write(record)
        self._keys.add(row.key)
        self._columns.add(row)
        self._digest.update(len(record).to_bytes(8, "little") + record)
        self._shard_rows[-1] += 1
        self._shard_bytes += len(record)

    def index(self) -> Index:
        """The index of the rows so far."""
        return self._columns.index()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            if kind is None:
                with self._telling_disk_errors():
                    self._close_shard()
                    self._finish()
            else:
                with contextlib.suppress(RuntimeError):  # the first error is told
                    self._close_shard()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _close_shard(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    @contextlib.contextmanager
    def _telling_disk_errors(self) -> Iterator[None]:
        """ArrayRecord's RuntimeError, and errors without a path, as what they are."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            free = shutil.disk_usage(self.directory.parent).free
            full = getattr(error, "errno", None) == errno.ENOSPC or free < 2**20
            advice = "The disk is full: make room, or give another CACHE_DIR."
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise OSError(
                f"Writing the tokenised cache {self.directory} failed, and nothing is "
                f"left of it: {reason}. {advice if full else ''}".rstrip()
            ) from error

    def _finish(self) -> None:
        if not self._shard_rows:
            raise ValueError(f"No rows were written for {self.directory}.")
        shards = []
        for i, rows in enumerate(self._shard_rows):
            name = f"rows-{i:05d}-of-{len(self._shard_rows):05d}.array_record"
            path = (self._temporary / f"{i}").rename(self._temporary / name)
            shards.append({"name": name, "rows": rows, "bytes": path.stat().st_size})
        index = self.index()
        np.savez(
            self._temporary / INDEX, **{name: getattr(index, name) for name in DTYPES}
        )
        self._vocabulary.save(self._temporary)
        meta = {
            "format": FORMAT,
            "version": VERSION,
            "schema": self._schema,
            "fingerprint": self._fingerprint,
            "content_fingerprint": self._digest.hexdigest(),
            "num_rows": index.num_rows,
            "num_responses": index.num_responses,
            "shards": shards,
            "index_sha256": file_sha256(self._temporary / INDEX),
            "vocabulary": self._vocabulary.to_json(),
            "vocabulary_fingerprint": self._vocabulary.fingerprint,
            "summary": self.summary,
            "source": self._source,
        }
        meta = json.loads(json.dumps(meta))  # as it is read back: every key is a text
        meta[META_DIGEST] = meta_digest(meta)
        (self._temporary / META).write_text(json.dumps(meta, indent=1))
        for path in (*self._temporary.iterdir(), self._temporary):
            _sync(path)
        if _version(self.directory / META) != self._found:
            return  # another process made it meanwhile, and may be reading it
        if (self.directory / META).is_file():
            # A folder cannot be renamed over a full one. Between these two renames
            # there is no cache, and a reader that comes then prepares its own.
            old = self._temporary.with_name(self._temporary.name + "-old")
            shutil.rmtree(old, ignore_errors=True)
            self.directory.rename(old)
            self._temporary.rename(self.directory)
            shutil.rmtree(old, ignore_errors=True)
        else:
            try:
                self._temporary.rename(self.directory)
            except OSError:  # as above, within the last moment
                if not (self.directory / META).is_file():
                    raise
        _sync(self.directory.parent)


def _version(path: pathlib.Path) -> tuple[int, int] | None:
    """Tells one file at a path from another that takes its place; None: no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
