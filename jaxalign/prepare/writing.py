"""Writes the splits of one source in a single pass over its rows."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tqdm import tqdm

from jaxalign.data.bad_rows import BadRow, BadRows, DataError
from jaxalign.data.cache_writer import CacheWriter
from jaxalign.data.records import Example
from jaxalign.data.rows import Row, prompt_hash
from jaxalign.prepare.rows import Encoded
from jaxalign.prepare.summary import Tally, source_counts

Item = Example | Encoded | list[Row] | BadRow


@dataclasses.dataclass
class _EmptySplit(Exception):
    """Leaves the writers without a trace when one side of a split got no row."""

    lowest: float
    highest: float


def write_splits(
    make_items: Callable[[], Iterable[Item]],
    build: Callable[[Example], list[Row]] | None,
    targets: Mapping[str, pathlib.Path],
    *,
    cache: Mapping[str, Any],
    on_bad_row: str = "error",
    eval_fraction: float = 0.0,
    seed: int = 0,
    max_rows: int | None = None,
    listing: pathlib.Path | None = None,
) -> None:
    """Writes a cache for each split, all or none.

    Args:
      make_items: a fresh iterator over examples, tokenised or not, ready rows, and
        bad rows.
      build: turns an example into rows; None when items are rows.
      targets: split name to folder: ``train``, and ``validation`` if wanted.
      cache: what `CacheWriter` is told of all splits.
      eval_fraction: share of prompts for ``validation``. Of a source so small that
        chance gives one side nothing, that side gets one prompt.
      seed: of the split.
      max_rows: reads only the first so many rows.
      listing: a JSON Lines file for all bad rows, if there are any.

    Raises:
      DataError: when there are bad rows and they are not to be skipped.
      ValueError: when no row is left.
    """

    def attempt(cut: float) -> None:
        bad = BadRows(listing)
        tallies = {name: Tally() for name in targets}
        read = kept = left_out = responses_left_out = 0
        lowest, highest = 1.0, 0.0
        with contextlib.ExitStack() as stack:
            stack.callback(bad.close)
            writers = {
                name: stack.enter_context(CacheWriter(path, **cache))
                for name, path in targets.items()
            }
            # disable=None: a progress bar on a terminal, silence elsewhere.
            bar = tqdm(make_items(), desc="preparing", unit=" rows", disable=None)
            for item in bar:
                if max_rows is not None and read >= max_rows:
                    break
                read += 1
                if isinstance(item, BadRow):
                    bad.add(item)
                    continue
                bad.kept += 1
                if bad.total and on_bad_row == "error":
                    continue  # nothing will be written: only the report goes on
                if isinstance(item, Encoded):
                    rows = item.rows
                else:
                    rows = item if build is None else build(item)
                kept += bool(rows)
                left_out += not rows
                if rows and isinstance(item, Example | Encoded):
                    responses_left_out += item.left_out
                for row in rows:
                    fraction = prompt_fraction(row, seed)
                    lowest, highest = min(lowest, fraction), max(highest, fraction)
                    name = "validation" if fraction < cut else "train"
                    writers[name].write(row)
                    tallies[name].add(row)
            if bad.total and on_bad_row == "error":
                raise DataError(bad)
            if not kept:
                raise ValueError(_nothing_left(cache["source"], read, left_out, bad))
            if not all(tally.rows for tally in tallies.values()):
                raise _EmptySplit(lowest, highest)
            counts = source_counts(read, kept, left_out, responses_left_out, bad)
            for name, writer in writers.items():
                writer.summary = tallies[name].summary(counts)

    try:
        attempt(eval_fraction)
    except _EmptySplit as empty:
        if empty.lowest == empty.highest:
            data = cache["source"].get("data")
            raise ValueError(
                f"EVAL_FRACTION={eval_fraction} needs two distinct prompts, and {data} "
                "has one: add rows, or set EVAL_FRACTION=0."
            ) from None
        too_low = empty.lowest >= eval_fraction
        just_above = empty.lowest + 2.0**-49
        attempt(just_above if too_low else empty.highest)


def prompt_fraction(row: Row, seed: int) -> float:
    """A number in [0, 1) that depends on the row's prompt and the seed alone."""
    text = f"{seed}:{prompt_hash(row.prompts[0])}".encode()
    head = hashlib.sha256(text).digest()[:6]
    return int.from_bytes(head, "big") / 2**48


def _nothing_left(
    source: Mapping[str, Any], read: int, left_out: int, bad: BadRows
) -> str:
    counts = f"{read} read, {bad.total} rejected, {left_out} left out by the task"
    listed = f"\n{bad}" if bad.total else ""
    return f"No row of {source.get('data')} is left to use ({counts}).{listed}"
