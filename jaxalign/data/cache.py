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
import itertools
import json
import os
import pathlib
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from jaxalign import remote, vocabularies
from jaxalign.data.bad_rows import quoted
from jaxalign.data.rows import DTYPES, Index, Row
from jaxalign.files import file_sha256, json_sha256

FORMAT, VERSION = "jaxalign-tokenised-cache", 1
META, INDEX, META_DIGEST = "cache.json", "index.npz", "meta_sha256"


class TokenizedCache:
    """A cache opened for random access, safe to read from many threads.

    Attributes:
      index: the :class:`Index` of all rows.
      fingerprint: identity of what the rows were made from.
      content_fingerprint: SHA-256 over the rows themselves.
      summary: counts that the prepare half recorded.
      source: where the rows came from.

    Raises:
      FileNotFoundError: when there is no cache at ``path``.
      ValueError: when the folder is damaged or of another format; says how.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path).expanduser()
        meta = self._meta = _read_meta(self.path)
        try:
            shards = [(s["name"], s["rows"], s["bytes"]) for s in meta["shards"]]
            self._files = [remote.below(self.path, name) for name, _, _ in shards]
            self._starts = [0, *itertools.accumulate(rows for _, rows, _ in shards)]
        except (KeyError, TypeError, ValueError) as error:
            what = f"{META} names shards that no writer makes ({error})"
            raise _damaged(self.path, what) from error
        for file, (_, _, expected) in zip(self._files, shards, strict=True):
            size = file.stat().st_size if file.is_file() else "no"
            if size != expected:
                raise _damaged(self.path, f"{file.name} has {size} bytes of {expected}")
        index_file = self.path / INDEX
        if not index_file.is_file() or file_sha256(index_file) != meta["index_sha256"]:
            raise _damaged(self.path, f"{INDEX} is missing or changed")
        try:
            with np.load(index_file) as arrays:
                self.index = Index(**{name: arrays[name] for name in DTYPES})
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise _damaged(self.path, f"{INDEX} cannot be read ({error})") from error
        self.schema: str = meta["schema"]
        self.fingerprint: str = meta["fingerprint"]
        self.content_fingerprint: str = meta["content_fingerprint"]
        self.vocabulary_fingerprint: str = meta["vocabulary_fingerprint"]
        self.summary: dict[str, Any] = meta["summary"]
        self.source: Any = meta.get("source")
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
        file = self._files[shard]
        try:
            # Two threads may both open a shard; one reader is dropped and no harm done.
            if shard not in self._readers:
                # Reads are random: what an open file would read ahead is wasted.
                self._readers[shard] = ArrayRecordReader(
                    str(file), "readahead_buffer_size:0"
                )
            # A range: reading a list of positions costs time in proportion to the file.
            (record,) = self._readers[shard].read(position, position + 1)
            return Row.from_bytes(record)
        except (RuntimeError, ValueError, LookupError, TypeError) as error:
            raise _damaged(
                self.path, f"{file.name}, row {position}: {error}"
            ) from error

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    @functools.cached_property
    def vocabulary(self) -> Any:
        """The vocabulary that made the ids (:mod:`jaxalign.vocabularies`)."""
        try:
            return vocabularies.from_json(self._meta["vocabulary"], self.path)
        except (KeyError, TypeError) as error:
            raise _damaged(self.path, f"{META} has no vocabulary ({error})") from error

    def reward_stats(self) -> tuple[float, float]:
        """Mean and population standard deviation of all rewards, in float64.

        The deviation is 1 where all are equal, so that standardising gives zeros.

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
    file = path / META
    if not file.is_file():
        found = sorted(p.name for p in path.iterdir())[:5] if path.is_dir() else None
        holds = "does not exist" if found is None else f"holds {found}"
        raise FileNotFoundError(
            f"No tokenised cache at {path}: expected {META} there; the folder {holds}."
        )
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"{META} is no JSON ({error})") from error
    found = meta.get("format") if isinstance(meta, dict) else type(meta).__name__
    if found != FORMAT:
        raise ValueError(
            f"{file} has format {quoted(repr(found))}, expected {FORMAT!r}."
        )
    if meta.get("version") != VERSION:
        raise ValueError(
            f"{path} has cache version {quoted(repr(meta.get('version')))}, this "
            f"release reads {VERSION}: prepare the data again."
        )
    # Caches of earlier releases have no digest of their own.
    if META_DIGEST in meta and meta[META_DIGEST] != meta_digest(meta):
        raise _damaged(path, f"{META} was changed")
    lacking = sorted(_ENTRIES - meta.keys())
    if lacking:
        raise _damaged(path, f"{META} has no {lacking[0]!r}")
    return meta


_ENTRIES = {"schema", "fingerprint", "content_fingerprint", "shards", "index_sha256"}
_ENTRIES |= {"vocabulary", "vocabulary_fingerprint", "summary"}


def meta_digest(meta: Mapping[str, Any]) -> str:
    """SHA-256 of ``cache.json``, its own digest apart."""
    return json_sha256({k: v for k, v in meta.items() if k != META_DIGEST})


def _damaged(path: pathlib.Path, what: str) -> ValueError:
    return ValueError(
        f"The tokenised cache at {path} is damaged: {what}. Remove the folder and "
        "prepare the data again."
    )
