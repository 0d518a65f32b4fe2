"""JSON Lines, read strictly: one object a line, each key once, UTF-8, no cut tail."""

from __future__ import annotations

import collections
import gzip
import json
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from jaxalign import remote
from jaxalign.data.bad_rows import BadRow, FieldError, show


def dumps(value: Any, **settings: Any) -> str:
    """A value as JSON that every reader takes: a number that is not finite is null.

    >>> dumps({"logp": float("nan"), "text": "a"})
    '{"logp": null, "text": "a"}'
    """
    try:
        return json.dumps(value, **settings, allow_nan=False)
    except ValueError:  # rare, so only then is all of it looked at
        return json.dumps(_finite(value), **settings, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_jsonl(
    path: str | pathlib.PurePath,
) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Streams ``(line number, object or BadRow)`` from a JSON Lines file.

    ``.gz`` files are unpacked on the way. Blank lines at the end are no rows. A file in
    a bucket is copied here first.
    """
    local = remote.copy(path)
    opener = gzip.open if local.suffix == ".gz" else open
    with opener(local, "rb") as file:
        yield from parse_lines(str(path), enumerate(file, start=1))


def parse_lines(
    file: str, lines: Iterable[tuple[int, bytes]]
) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """``(line number, object or BadRow)`` of consecutive numbered lines of ``file``.

    A blank line is told when another line follows it; those at the end are no rows.
    """
    blank: list[int] = []
    for number, line in lines:
        if not line.strip():
            blank.append(number)
            continue
        for n in blank:
            yield (
                n,
                BadRow(file, n, "row", "empty", "a JSON object", "an empty line"),
            )
        blank.clear()
        try:
            yield number, parse_object(line, first=number == 1)
        except FieldError as error:
            yield number, error.at(file, number)


def parse_object(line: bytes, first: bool = False) -> dict[str, Any]:
    """Parses one line of JSON Lines.

    Args:
      line: bytes; without a final newline it is taken for the end of a file.
      first: whether a byte order mark may lead it.

    Raises:
      FieldError: for anything but one UTF-8 JSON object with distinct keys.
    """
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise FieldError(
            "row",
            "invalid UTF-8",
            "UTF-8 text",
            f"byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line",
        ) from None
    try:
        value = json.loads(text, object_pairs_hook=_distinct_keys)
    except json.JSONDecodeError as error:
        if not line.endswith(b"\n"):
            raise FieldError(
                "row",
                "truncated",
                "a complete JSON object",
                f"a truncated last line ({len(line)} bytes, no newline at the end)",
            ) from None
        raise FieldError(
            "row",
            "invalid JSON",
            "a JSON object",
            f"invalid JSON ({error.msg} at column {error.colno})",
        ) from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, FieldError):
            raise
        raise FieldError(
            "row", "invalid JSON", "a JSON object", f"invalid JSON ({error})"
        ) from None
    if not isinstance(value, dict):
        raise FieldError(
            "row", "not an object", "a JSON object (one a line)", show(value)
        )
    return value


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        key, times = counts.most_common(1)[0]
        raise FieldError(
            key, "duplicate key", "each key once in an object", f"it {times} times"
        )
    return found
