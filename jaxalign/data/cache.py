"""The tokenised cache: prompts, the responses to them, a number per response.

Written once by the prepare half, read by the feed on machines without TensorFlow::

    DIR/cache.json                           what it is, with fingerprints
        rows-00000-of-0000N.array_record     one msgpack record a row
        index.npz                            lengths, hashes and numbers of all rows
        vocabulary.model                     where the vocabulary has a model file

Rows hold untruncated token ids, so one cache serves every ``TASK_FEATURE_LENGTHS``.
The index alone is enough to plan packing: nothing else is read before training.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import socket
import tempfile
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from array_record.python.array_record_module import (
    ArrayRecordReader,
    ArrayRecordWriter,
)

from jaxalign import remote
from jaxalign.data.rows import DTYPES, Columns, Index, Row, build_index, check_row

FORMAT, VERSION = "jaxalign-tokenised-cache", 1
_META, _INDEX = "cache.json", "index.npz"
_SHARD_BYTES = 256 * 2**20
_STALE_SECONDS = 24 * 3600

__all__ = [
    "CacheWriter",
    "Index",
    "Row",
    "TokenizedCache",
    "build_index",
    "remove_stale",
]


class CacheWriter:
    """Writes a cache into a temporary sibling and renames it when complete.

    A killed writer leaves nothing that looks like a cache; the next one removes what
    it left. An older cache at the same place is replaced at the last moment, and
    readers that hold it open are not disturbed.

    Args:
      directory: where the cache appears; anything there but a cache or an empty
        folder is refused.
      schema: "supervised", "trajectory", "preference" or "rationale".
      vocabulary: of :mod:`jaxalign.vocabularies`.
      fingerprint: identity of what the rows are made from (source, field map,
        vocabulary, preprocessing).
      summary: JSON-ready counts; ``writer.summary`` may change until the end.
      source: JSON-ready description of where rows came from.

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
        occupied = target.exists() and not (target / _META).is_file()
        if occupied and not (target.is_dir() and not any(target.iterdir())):
            raise FileExistsError(
                f"{target} exists and is not a cache (no {_META}); give another "
                "folder or remove it."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        self._found = _version(target / _META)
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
        """Appends a row.

        Raises:
          ValueError: naming the key and the field that breaks the schema.
        """
        check_row(row, self._vocabulary.vocab_size)
        if row.key in self._keys:
            raise ValueError(f"Row {row.key!r}: the key was written before.")
        try:
            record = row.to_bytes()
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"Row {row.key!r}: key and metadata must be JSON values ({error})."
            ) from error
        if self._writer is None or self._shard_bytes > _SHARD_BYTES:
            self._close_shard()
            self._writer = ArrayRecordWriter(
                str(self._temporary / f"{len(self._shard_rows)}"), "group_size:1"
            )
            self._shard_rows.append(0)
            self._shard_bytes = 0
        self._writer.write(record)
        self._keys.add(row.key)
        self._columns.add(row)
        self._digest.update(len(record).to_bytes(8, "little") + record)
        self._shard_rows[-1] += 1
        self._shard_bytes += len(record)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            self._close_shard()
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _finish(self) -> None:
        if not self._shard_rows:
            raise ValueError(f"No rows were written for {self.directory}.")
        shards = []
        for i, rows in enumerate(self._shard_rows):
            name = f"rows-{i:05d}-of-{len(self._shard_rows):05d}.array_record"
            path = (self._temporary / f"{i}").rename(self._temporary / name)
            shards.append({"name": name, "rows": rows, "bytes": path.stat().st_size})
        index = self._columns.index()
        np.savez(
            self._temporary / _INDEX,
            **{name: getattr(index, name) for name in DTYPES},
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
            "index_sha256": file_sha256(self._temporary / _INDEX),
            "vocabulary": self._vocabulary.to_json(),
            "vocabulary_fingerprint": self._vocabulary.fingerprint,
            "summary": self.summary,
            "source": self._source,
        }
        (self._temporary / _META).write_text(json.dumps(meta, indent=1))
        for path in (*self._temporary.iterdir(), self._temporary):
            _sync(path)
        if _version(self.directory / _META) != self._found:
            return  # another process made it meanwhile, and may be reading it
        if (self.directory / _META).is_file():
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
                if not (self.directory / _META).is_file():
                    raise
        _sync(self.directory.parent)


def _version(path: pathlib.Path) -> tuple[int, int] | None:
    """Tells one file at a path from another that takes its place; None: no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def temporary_folder(directory: pathlib.Path) -> pathlib.Path:
    """Where this process prepares a cache; `remove_stale` finds it after a kill."""
    return directory.with_name(f"{_mark(directory)}{os.getpid()}")


def _mark(directory: pathlib.Path) -> str:
    return f".{directory.name}.tmp-{socket.gethostname()}-"


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
        pid = path.name.removeprefix(here).removesuffix("-old")
        if path.name.startswith(here) and pid.isdigit():
            dead = int(pid) != os.getpid() and not _alive(int(pid))
        else:
            files = list(path.iterdir()) or [path]
            newest = max(p.stat().st_mtime for p in files)
            dead = now - newest > _STALE_SECONDS
        if dead:
            shutil.rmtree(path, ignore_errors=True)


class TokenizedCache:
    """A cache opened for random access, safe to read from many threads.

    Args:
      path: a folder that :class:`CacheWriter` made.

    Attributes:
      path: that folder.
      index: the :class:`Index` of all rows.
      schema: the schema's name.
      fingerprint: identity of what the rows were made from.
      content_fingerprint: SHA-256 over the rows themselves.
      vocabulary_fingerprint: identity of the vocabulary.
      summary: counts that the prepare half recorded.
      source: where the rows came from.

    Raises:
      FileNotFoundError: when there is no cache at ``path``.
      ValueError: when the folder is damaged or of another format; says how.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path).expanduser()
        meta = self._meta = _read_meta(self.path)
        for shard in meta["shards"]:
            file = self.path / shard["name"]
            size = file.stat().st_size if file.is_file() else "no"
            if size != shard["bytes"]:
                raise _damaged(
                    self.path, f"{file.name} has {size} bytes of {shard['bytes']}"
                )
        index_file = self.path / _INDEX
        if not index_file.is_file() or file_sha256(index_file) != meta["index_sha256"]:
            raise _damaged(self.path, f"{_INDEX} is missing or changed")
        try:
            with np.load(index_file) as arrays:
                self.index = Index(**{name: arrays[name] for name in DTYPES})
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise _damaged(self.path, f"{_INDEX} cannot be read ({error})") from error
        self.schema: str = meta["schema"]
        self.fingerprint: str = meta["fingerprint"]
        self.content_fingerprint: str = meta["content_fingerprint"]
        self.vocabulary_fingerprint: str = meta["vocabulary_fingerprint"]
        self.summary: dict[str, Any] = meta["summary"]
        self.source: Any = meta["source"]
        rows = [shard["rows"] for shard in meta["shards"]]
        self._starts = [0, *itertools.accumulate(rows)][:-1]
        self._readers: dict[int, ArrayRecordReader] = {}

    def __repr__(self) -> str:
        return f"TokenizedCache({str(self.path)!r}, {self.schema}, {len(self)} rows)"

    def __len__(self) -> int:
        return self.index.num_rows

    def __getitem__(self, i: int) -> Row:
        if not 0 <= i < self.index.num_rows:
            raise IndexError(f"Row {i} of a cache of {len(self)} rows.")
        shard = bisect.bisect_right(self._starts, i) - 1
        position = int(i) - self._starts[shard]
        try:
            # A range: reading a list of positions costs time in proportion to the file.
            (record,) = self._reader(shard).read(position, position + 1)
            return Row.from_bytes(record)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            name = self._meta["shards"][shard]["name"]
            raise _damaged(self.path, f"{name}, row {position}: {error}") from error

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def _reader(self, shard: int) -> ArrayRecordReader:
        # Two threads may both open a shard; one reader is dropped and no harm done.
        if shard not in self._readers:
            path = self.path / self._meta["shards"][shard]["name"]
            # Reads are random: what an open file would read ahead is wasted.
            self._readers[shard] = ArrayRecordReader(
                str(path), "readahead_buffer_size:0"
            )
        return self._readers[shard]

    @functools.cached_property
    def vocabulary(self) -> Any:
        """The vocabulary that made the ids (:mod:`jaxalign.vocabularies`)."""
        from jaxalign import vocabularies

        return vocabularies.from_json(self._meta["vocabulary"], self.path)

    def reward_stats(self) -> tuple[float, float]:
        """Mean and population standard deviation of all rewards, in float64.

        The deviation is 1 where all rewards are equal, so that standardising gives
        zeros.

        Raises:
          ValueError: when no response has a reward.
        """
        rewards = self.index.response_reward
        rewards = rewards[~np.isnan(rewards)]
        if not len(rewards):
            raise ValueError(
                f"{self!r} has no rewards: expected the 'trajectory' schema with a "
                "'reward' field."
            )
        return float(rewards.mean()), float(rewards.std()) or 1.0


def _read_meta(path: pathlib.Path) -> dict[str, Any]:
    file = path / _META
    if not file.is_file():
        found = sorted(p.name for p in path.iterdir())[:5] if path.is_dir() else None
        holds = "does not exist" if found is None else f"holds {found}"
        raise FileNotFoundError(
            f"No tokenised cache at {path}: expected {_META} there; the folder {holds}."
        )
    try:
        meta = json.loads(file.read_text())
    except ValueError as error:
        raise _damaged(path, f"{_META} is no JSON ({error})") from error
    found = meta.get("format") if isinstance(meta, dict) else type(meta).__name__
    if found != FORMAT:
        raise ValueError(f"{file} has format {found!r}, expected {FORMAT!r}.")
    if meta["version"] != VERSION:
        raise ValueError(
            f"{path} has cache version {meta['version']}, this release reads "
            f"{VERSION}: prepare the data again."
        )
    return meta


def _damaged(path: pathlib.Path, what: str) -> ValueError:
    return ValueError(
        f"The tokenised cache at {path} is damaged: {what}. Remove the folder and "
        "prepare the data again."
    )


def file_sha256(path: pathlib.Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
