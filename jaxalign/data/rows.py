"""Rows of the tokenised cache and the index over them.

A row is one example of any schema: prompts, the responses to them, and what is known
about each response. The index holds everything about all rows but their tokens, which
is what planning the packing needs.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable, Sized
from typing import Any

import msgpack
import numpy as np

from jaxalign import batch as batch_lib


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One example: prompts, responses to them and what is known about each.

    Attributes:
      key: unique in the cache, for people and for joins, e.g. ``"train.jsonl:17"``.
      prompts: int32 token ids, EOS included; ``prompts[0]`` is the task's prompt.
      responses: int32 token ids, EOS included, never empty. There may be none.
      pairs: ``(chosen response, rejected response, margin)``.
      metadata: small JSON values passed through, e.g. the raw prompt.
      columns: what else is known, by the name of a ``batch.COLUMNS``: one value for
        each prompt, response or pair of the row, or for each token of each.
    """

    key: str
    prompts: list[np.ndarray]
    responses: list[np.ndarray]
    response_prompt: list[int]  # of each response, the index of its prompt
    response_kind: list[int]  # batch.ANSWER or RATIONALE
    response_reward: list[float]  # nan where there is none
    response_label: list[int]  # batch.DESIRABLE, UNDESIRABLE or NO_LABEL
    pairs: list[tuple[int, int, float]] = dataclasses.field(default_factory=list)
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    columns: dict[str, list[Any]] = dataclasses.field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The msgpack record of this row."""
        record = (
            self.key,
            [np.asarray(ids, "<i4").tobytes() for ids in self.prompts],
            [np.asarray(ids, "<i4").tobytes() for ids in self.responses],
            list(map(int, self.response_prompt)),
            list(map(int, self.response_kind)),
            list(map(float, self.response_reward)),
            list(map(int, self.response_label)),
            [(int(c), int(r), float(m)) for c, r, m in self.pairs],
            self.metadata,
        )
        # Rows without columns keep the bytes they had before there were any.
        return msgpack.packb((*record, self.columns) if self.columns else record)

    @classmethod
    def from_bytes(cls, record: bytes) -> Row:
        """The inverse of :meth:`to_bytes`; token arrays are read-only."""
        fields = msgpack.unpackb(record, strict_map_key=False)
        for i in (1, 2):  # prompts and responses
            fields[i] = [np.frombuffer(ids, "<i4") for ids in fields[i]]
        fields[7] = [tuple(pair) for pair in fields[7]]
        return cls(*fields)

    def places(self, column: str) -> list[Sized]:
        """What a column has one value for (or, of tokens, one list), in order."""
        owner = batch_lib.COLUMNS[column].owner
        if owner == "Q":
            return self.pairs
        return self.prompts if owner in "PE" else self.responses


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """Everything about the rows but their tokens, as numpy arrays.

    ``N`` rows, ``M`` prompts and ``T`` responses, each numbered over the whole cache:
    row ``i`` has responses ``response_offsets[i]:response_offsets[i + 1]``. That *flat
    response id* is the join key of every column added later, such as reference
    log-probs. ``DTYPES`` says what each array is of.
    """

    prompt_offsets: np.ndarray  # [N + 1]
    prompt_lengths: np.ndarray  # [M]
    prompt_hash: np.ndarray  # [N], of the tokens of prompts[0]
    response_offsets: np.ndarray  # [N + 1]
    response_lengths: np.ndarray  # [T]
    response_prompt: np.ndarray  # [T]
    response_kind: np.ndarray  # [T]
    response_reward: np.ndarray  # [T]
    response_label: np.ndarray  # [T]
    num_pairs: np.ndarray  # [N]

    @property
    def num_rows(self) -> int:
        """``N``."""
        return len(self.prompt_hash)

    @property
    def num_responses(self) -> int:
        """``T``."""
        return len(self.response_lengths)

    @functools.cached_property
    def _pair_offsets(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.num_pairs, dtype=np.int64)])

    def take(self, rows: np.ndarray) -> Index:
        """The index of some rows, in that order."""
        arrays = {}
        for name, lengths in (
            ("prompt", ("prompt_lengths",)),
            ("response", ("response_lengths", *_PER_RESPONSE)),
        ):
            offsets = getattr(self, f"{name}_offsets")
            counts = np.diff(offsets)[rows]
            starts = np.cumsum(counts) - counts
            places = np.repeat(offsets[rows] - starts, counts)
            places += np.arange(len(places))
            arrays |= {n: getattr(self, n)[places] for n in lengths}
            arrays[f"{name}_offsets"] = np.append(starts, counts.sum())
        arrays |= {n: getattr(self, n)[rows] for n in ("prompt_hash", "num_pairs")}
        return Index(**{n: arrays[n].astype(t, copy=False) for n, t in DTYPES.items()})

    def offsets(self, owner: str) -> np.ndarray:
        """Where each row's prompts, responses or pairs begin (``Column.owner``)."""
        if owner == "Q":
            return self._pair_offsets
        return self.prompt_offsets if owner in "PE" else self.response_offsets


# Of the arrays of an index.
DTYPES = {field.name: np.int32 for field in dataclasses.fields(Index)} | {
    "prompt_offsets": np.int64,
    "prompt_hash": np.uint64,
    "response_offsets": np.int64,
    "response_reward": np.float64,
}
_PER_RESPONSE = [f"response_{n}" for n in ("prompt", "kind", "reward", "label")]


def prompt_hash(ids: np.ndarray) -> int:
    """A 64-bit hash of a prompt's tokens, equal on every machine."""
    raw = np.asarray(ids, "<i4").tobytes()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def build_index(rows: Iterable[Row]) -> Index:
    """The index of rows held in memory."""
    columns = Columns()
    for row in rows:
        columns.add(row)
    return columns.index()


class Columns:
    """Collects the index while rows arrive."""

    def __init__(self) -> None:
        self.lists: dict[str, list[Any]] = {name: [] for name in DTYPES}
        self.lists |= {"prompt_offsets": [0], "response_offsets": [0]}

    def add(self, row: Row) -> None:
        """Takes in the next row."""
        lists = self.lists
        lists["prompt_lengths"] += map(len, row.prompts)
        lists["prompt_offsets"].append(len(lists["prompt_lengths"]))
        lists["prompt_hash"].append(prompt_hash(row.prompts[0]))
        lists["response_lengths"] += map(len, row.responses)
        lists["response_offsets"].append(len(lists["response_lengths"]))
        for name in _PER_RESPONSE:
            lists[name] += getattr(row, name)
        lists["num_pairs"].append(len(row.pairs))

    def index(self) -> Index:
        """The index of the rows so far."""
        return Index(**{k: np.array(self.lists[k], t) for k, t in DTYPES.items()})


def check_row(row: Row, vocab_size: int) -> None:
    """Raises a ValueError that says which field of which row breaks the schema."""

    def fail(what: str) -> None:
        raise ValueError(f"Row {row.key!r}: {what}")

    if not row.prompts:
        fail("needs at least one prompt.")
    for name in ("prompts", "responses"):
        for i, ids in enumerate(getattr(row, name)):
            ids = np.asarray(ids)
            if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
                fail(
                    f"{name}[{i}] must be a non-empty vector of integer token ids, "
                    f"got {ids.dtype} of shape {ids.shape}."
                )
            low, high = ids.min(), ids.max()
            if low < 0 or high >= vocab_size:
                fail(
                    f"{name}[{i}] has ids in [{low}, {high}], outside the vocabulary "
                    f"of {vocab_size}."
                )
    count = len(row.responses)
    for name, allowed in (
        ("response_prompt", range(len(row.prompts))),
        ("response_kind", (batch_lib.ANSWER, batch_lib.RATIONALE)),
        ("response_label", (0, 1, batch_lib.NO_LABEL)),
        ("response_reward", None),
    ):
        values = getattr(row, name)
        if len(values) != count:
            fail(f"{name} has {len(values)} entries for {count} responses.")
        for v in values:
            if allowed is None and math.isinf(v):
                fail(f"{name} must be finite, or nan for none; got {v}.")
            if allowed is not None and v not in allowed:
                fail(f"{name} must be one of {list(allowed)}, got {v}.")
    for chosen, rejected, margin in row.pairs:
        if not (0 <= chosen < count and 0 <= rejected < count and chosen != rejected):
            fail(
                f"pair ({chosen}, {rejected}) must name two of {count} responses, "
                "counted from 0."
            )
        if not math.isfinite(margin):
            fail(f"the margin of pair ({chosen}, {rejected}) is {margin}.")
    for name, values in row.columns.items():
        if name not in batch_lib.COLUMNS:
            fail(f"there is no column {name!r} (jaxalign.batch.add_column).")
        places = row.places(name)
        if len(values) != len(places):
            fail(f"column {name} has {len(values)} values for {len(places)} places.")
        if batch_lib.COLUMNS[name].owner in "ED":
            for value, ids in zip(values, places, strict=True):
                if len(value) != len(ids):
                    fail(f"column {name}: {len(value)} values for {len(ids)} tokens.")
