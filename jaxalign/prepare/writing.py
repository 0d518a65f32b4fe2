"""Writes the splits of one source in a single pass over its rows."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import logging
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tqdm import tqdm

from jaxalign.data.bad_rows import BadRow, BadRows, DataError
from jaxalign.data.cache_writer import CacheWriter
from jaxalign.data.conversations import CHAT, DIALOGUE, IMPLICIT
from jaxalign.data.records import Example
from jaxalign.data.rows import Row, prompt_hash
from jaxalign.prepare.rows import Encoded
from jaxalign.prepare.summary import summarise, unknown_tokens

_log = logging.getLogger(__name__)

Item = Example | Encoded | BadRow


class _EmptySplit(Exception):
    """Leaves the writers without a trace when one side of a split got no row."""


def write_splits(
    make_items: Callable[[], Iterable[Item]],
    build: Callable[[Example], list[Row]],
    targets: Mapping[str, pathlib.Path],
    *,
    cache: Mapping[str, Any],
    on_bad_row: str,
    eval_fraction: float,
    seed: int,
    max_rows: int | None,
    listing: pathlib.Path,
) -> None:
    """Writes a cache for each split, all or none.

    Of a source so small that chance gives one side of a split nothing, that side gets
    one prompt.

    Args:
      make_items: a fresh iterator over examples, tokenised or not, and bad rows.
      build: tokenises an example.
      targets: split name to folder: ``train``, and ``validation`` if wanted.
      cache: what `CacheWriter` is told of all splits.
      listing: a JSON Lines file for all bad rows, if there are any.
    """

    def attempt(cut: float) -> None:
        bad = BadRows(listing)
        unknown = {name: collections.Counter() for name in targets}
        read = kept = left_out = responses_left_out = 0
        how: collections.Counter[str] = collections.Counter()
        lowest, highest = 1.0, 0.0
        with contextlib.ExitStack() as stack:
            stack.callback(bad.close)
            writers = {
                name: stack.enter_context(CacheWriter(path, **cache))
                for name, path in targets.items()
            }
            items = itertools.islice(make_items(), max_rows)
            # disable=None: a progress bar on a terminal, silence elsewhere.
            for item in tqdm(items, desc="preparing", unit=" rows", disable=None):
                read += 1
                if isinstance(item, BadRow):
                    bad.add(item)
                    continue
                bad.kept += 1
                if bad.total and on_bad_row == "error":
                    continue  # nothing will be written: only the report goes on
                rows = item.rows if isinstance(item, Encoded) else build(item)
                if rows:
                    kept += 1
                    how.update(_counted(item.how))
                    responses_left_out += item.left_out
                else:
                    left_out += 1
                # The answers of a dialogue share prompts in part: by its first one
                # all of it goes to one side.
                together = DIALOGUE in item.how
                for row in rows:
                    fraction = prompt_fraction(rows[0] if together else row, seed)
                    lowest, highest = min(lowest, fraction), max(highest, fraction)
                    name = "validation" if fraction < cut else "train"
                    writers[name].write(row)
                    unknown[name].update(unknown_tokens(row))
            if bad.total and on_bad_row == "error":
                raise DataError(bad)
            if not kept:
                raise ValueError(
                    f"No row of {cache['source'].get('data')} is left to use ({read} "
                    f"read, {bad.total} rejected, {left_out} left out by the task)."
                    + (f"\n{bad}" if bad.total else "")
                )
            indices = {name: writer.index() for name, writer in writers.items()}
            if not all(index.num_rows for index in indices.values()):
                raise _EmptySplit(lowest, highest)
            counts = {
                "rows_read": read,
                "rows_kept": kept,
                "rows_left_out": left_out,
                "rows_rejected": bad.total,
                "responses_left_out": responses_left_out,
                "rejected_by_problem": dict(bad.by_problem),
                "first_rejected": [str(row) for row in bad.first],
                "rejected_rows": listing.name if bad.total else None,
            }
            if how:
                counts["read_as"] = dict(how)
                _tell_implicit(how, cache["source"].get("data"))
            for name, index in indices.items():
                writers[name].summary = summarise(index, unknown[name], counts)

    try:
        attempt(eval_fraction)
    except _EmptySplit as empty:
        lowest, highest = empty.args
        if lowest == highest:
            data = cache["source"].get("data")
            raise ValueError(
                f"EVAL_FRACTION={eval_fraction} needs two distinct prompts, and {data} "
                "has one: add rows, or set EVAL_FRACTION=0."
            ) from None
        just_above = lowest + 2.0**-49
        attempt(just_above if lowest >= eval_fraction else highest)


def prompt_fraction(row: Row, seed: int) -> float:
    """A number in [0, 1) that depends on the row's prompt and the seed alone."""
    text = f"{seed}:{prompt_hash(row.prompts[0])}".encode()
    head = hashlib.sha256(text).digest()[:6]
    return int.from_bytes(head, "big") / 2**48


def _counted(how: frozenset[str]) -> list[str]:
    """What to count of how a row was read: prompts taken out of texts apart."""
    return [name for name in how if name != IMPLICIT or CHAT not in how]


def _tell_implicit(how: Mapping[str, int], data: Any) -> None:
    if count := how.get(IMPLICIT):
        _log.warning(
            "%d rows of %s have no 'prompt': what their 'chosen' and 'rejected' share "
            "at the beginning is taken for it. If the prompt is another field, name it "
            "in FIELD_MAP.",
            count,
            data,
        )
