"""What becomes of prompts and responses longer than TASK_FEATURE_LENGTHS.

They are cut, on the side that TRUNCATE names, or their row is left out, or none is
allowed (ON_TOO_LONG). A row is one example: all of a pair goes, never a side of it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

import numpy as np

from jaxalign.data.bad_rows import SHOWN_BAD_ROWS, nearest, quoted
from jaxalign.data.cache import TokenizedCache
from jaxalign.data.conversations import CHAT
from jaxalign.data.cuts import Sides
from jaxalign.data.rows import Index

_log = logging.getLogger(__name__)

ON_TOO_LONG = ("truncate", "skip", "error")
_SIDES = ("start", "end")
Truncate = str | Mapping[str, str] | None


def check(truncate: Truncate, on_too_long: str) -> None:
    """Raises a ValueError for settings that have no meaning."""
    if on_too_long not in ON_TOO_LONG:
        raise ValueError(
            f"ON_TOO_LONG must be one of {ON_TOO_LONG}, got {on_too_long!r}"
            f"{nearest(str(on_too_long), ON_TOO_LONG)}."
        )
    if truncate is None:
        return
    given = truncate if isinstance(truncate, Mapping) else {"inputs": truncate}
    wrong = [v for v in given.values() if v not in _SIDES]
    if wrong or not set(given) <= {"inputs", "targets"}:
        raise ValueError(
            "TRUNCATE says which side of a text that is too long is cut off: 'start', "
            "'end', or one for each, {'inputs': 'start', 'targets': 'end'}; got "
            f"{truncate!r}."
        )


def sides(truncate: Truncate, cache: TokenizedCache) -> Sides:
    """On which side the texts of a cache are cut off.

    Args:
      truncate: a side for both features or ``{feature: side}``. A feature that is not
        named loses its end, but prompts of dialogues their start: the last message is
        what is to be answered.
    """
    if isinstance(truncate, str):
        return Sides(truncate, truncate)
    default = Sides("start" if is_chat(cache) else "end")
    return dataclasses.replace(default, **dict(truncate or {}))


def is_chat(cache: TokenizedCache) -> bool:
    """Whether most rows of a cache were chat messages."""
    # Rows that are made on the fly have no summary.
    source = (getattr(cache, "summary", None) or {}).get("source", {})
    return 2 * source.get("read_as", {}).get(CHAT, 0) > source.get("rows_kept", 0)


def longer(index: Index, inputs: int, targets: int) -> np.ndarray:
    """``[N]`` bool: rows with a prompt or a response of more tokens than these."""
    found = np.zeros(index.num_rows, bool)
    for offsets, lengths, most in (
        (index.prompt_offsets, index.prompt_lengths, inputs),
        (index.response_offsets, index.response_lengths, targets),
    ):
        over = np.flatnonzero(lengths > most)
        found[np.searchsorted(offsets, over, side="right") - 1] = True
    return found


def keep(
    cache: TokenizedCache, *, inputs: int, targets: int, on_too_long: str
) -> np.ndarray | None:
    """``[N]``, the rows to train on; None: all.

    Raises:
      ValueError: listing the rows that are too long, where none is allowed, or where
        none is left.
    """
    if on_too_long == "truncate":
        return None
    over = longer(cache.index, inputs, targets)
    count = int(over.sum())
    if not count:
        return None
    what = (
        f"{count} of {len(over)} rows of {cache.path} are longer than "
        f"TASK_FEATURE_LENGTHS ({inputs} tokens of a prompt, {targets} of a response)"
    )
    rows = np.flatnonzero(over)
    shown = [_described(cache, i, inputs, targets) for i in rows[:SHOWN_BAD_ROWS]]
    if count > len(shown):
        shown.append(f"... and {count - len(shown)} more")
    listing = "\n".join(shown)
    if on_too_long == "error":
        raise ValueError(
            f"{what}:\n{listing}\nRaise TASK_FEATURE_LENGTHS, or leave them out with "
            "ON_TOO_LONG='skip', or cut them with ON_TOO_LONG='truncate'."
        )
    if count == len(over):
        raise ValueError(
            f"{what}, and with ON_TOO_LONG='skip' none is left:\n{listing}"
        )
    _log.warning("%s and are left out (ON_TOO_LONG='skip'):\n%s", what, listing)
    return ~over


def _described(cache: TokenizedCache, row: int, inputs: int, targets: int) -> str:
    """A row by its key, with what of it is too long."""
    index = cache.index
    found = []
    for name, offsets, lengths, most in (
        ("prompt", index.prompt_offsets, index.prompt_lengths, inputs),
        ("response", index.response_offsets, index.response_lengths, targets),
    ):
        longest = int(lengths[offsets[row] : offsets[row + 1]].max(initial=0))
        if longest > most:
            found.append(f"a {name} of {longest} tokens")
    return f"{quoted(cache[int(row)].key)}: {' and '.join(found)}"
