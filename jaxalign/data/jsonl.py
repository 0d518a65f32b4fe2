"""JSON Lines: read strictly, and written so that every JSON reader takes them.

Reading asks for one object a line, each key once, UTF-8 and no cut tail. All files of
rows are written by :func:`json_line`.
"""

from __future__ import annotations

import collections
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from jaxalign import remote
from jaxalign.data import packed
from jaxalign.data.bad_rows import BadRow, FieldError, show
from jaxalign.files import write_atomically


def read_jsonl(
    path: str | pathlib.PurePath,
) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Streams ``(line number, object or BadRow)`` from a JSON Lines file.

    ``.gz`` and ``.zst`` files are unpacked on the way. Blank lines at the end are no
    rows. A file in a bucket is copied here first.
    """
    check_format(path)
    lines = packed.lines(str(path), remote.copy(path))
    yield from parse_lines(str(path), lines)


def check_format(path: str | pathlib.PurePath) -> None:
    """Refuses folders, tables and other JSON, before a complaint about every line."""
    suffix = packed.kind(path).lower()
    if suffix in TABLES:
        raise ValueError(
            f"{path} is {TABLES[suffix]}, which is not read: convert it to JSON Lines, "
            "one object a line, with pandas.read_excel(...).to_json(FILE, "
            "orient='records', lines=True)."
        )
    local = packed.check(path)
    if not local.is_file():
        return
    try:
        with packed.opened(local) as file:
            line = file.readline(_FIRST_LINE)
    except (OSError, *packed.DAMAGE):
        return  # told with its line number when the rows are read
    first = line.decode("utf-8-sig", "replace").strip()
    kind = None
    if first == "[" or first.startswith("[") and first[1:].lstrip().startswith("{"):
        kind = "one JSON array"
    elif first == "{":
        kind = "JSON with an object over several lines"
    if kind:
        raise ValueError(
            f"{path} holds {kind}; expected JSON Lines, one object a line. Convert it "
            "with: jq -c 'if type == \"array\" then .[] else . end' FILE > rows.jsonl"
        )


# Files of rows that are another format, by what their names end in.
TABLES = {".xlsx": "a spreadsheet", ".xls": "a spreadsheet"}
_FIRST_LINE = 2**16


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
            yield (n, BadRow(file, n, "row", "empty", "a JSON object", "an empty line"))
        blank.clear()
        try:
            yield number, parse_object(line, first=number == 1)
        except FieldError as error:
            yield number, error.at(file, number)


def parse_object(line: bytes, first: bool = False) -> dict[str, Any]:
    """One UTF-8 JSON object with distinct keys; a FieldError says what else it is.

    Without a final newline a line is taken for the end of a file; a byte order mark may
    lead the first.
    """
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        got = f"byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
        raise FieldError("row", "invalid UTF-8", "UTF-8 text", got) from None
    try:
        value = json.loads(text, object_pairs_hook=_distinct_keys)
    except FieldError:
        raise
    except json.JSONDecodeError as error:
        if line.endswith(b"\n"):
            what = f"{error.msg} at column {error.colno}"
        else:
            got = f"a truncated last line ({len(line)} bytes, no newline at the end)"
            raise FieldError(
                "row", "truncated", "a complete JSON object", got
            ) from None
    except (RecursionError, ValueError) as error:
        what = str(error)
    else:
        if isinstance(value, dict):
            return value
        expected = "a JSON object (one a line)"
        raise FieldError("row", "not an object", expected, show(value))
    got = f"invalid JSON ({what})"
    raise FieldError("row", "invalid JSON", "a JSON object", got)


def json_line(row: Any) -> str:
    """A row as one line of JSON, newline included, that every reader takes.

    Text stays as it is, but for lone surrogates, which no UTF-8 file can hold: their
    line is written in ASCII, where they are escapes, and read back as they were.
    Numbers that are not finite, for which JSON has no word, are written ``null``.

    >>> json_line({"text": "é", "cut": "\\ud83d"})
    '{"text": "\\\\u00e9", "cut": "\\\\ud83d"}\\n'
    >>> json_line({"text": "é", "logp": float("nan")})
    '{"text": "é", "logp": null}\\n'
    """
    text = dumps(row, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = dumps(row)
    return text + "\n"


def write_rows(path: str | pathlib.Path, rows: Iterable[Any]) -> None:
    """Writes a JSON Lines file whole or not at all."""
    write_atomically(path, "".join(map(json_line, rows)))


def read_rows(path: str | pathlib.Path) -> list[Any]:
    """The rows of a JSON Lines file that this program wrote."""
    with open(path, "rb") as file:
        return [json.loads(line) for line in file]


def dumps(value: Any, **settings: Any) -> str:
    """A value as JSON that every reader takes: a number that is not finite is null.

    >>> dumps({"logp": float("nan"), "text": "a"})
    '{"logp": null, "text": "a"}'
    """
    try:
        return json.dumps(value, **settings, allow_nan=False)
    except ValueError:  # rare, so only then is all of it looked at
        return json.dumps(nulled(value), **settings, allow_nan=False)


def nulled(value: Any) -> Any:
    """A JSON value with None for every number that is not finite.

    >>> nulled({"a": [float("inf"), 1.5]})
    {'a': [None, 1.5]}
    """
    # By way of JSON text, whose reader asks what such a number is to be; a function
    # that calls itself would give up sooner on nested values.
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def read_json(path: str | pathlib.Path) -> Any:
    """The JSON value in a file; a ValueError names a file that holds something else."""
    path = pathlib.Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is no JSON ({error}).") from None


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        key, times = counts.most_common(1)[0]
        raise FieldError(
            key, "duplicate key", "each key once in an object", f"it {times} times"
        )
    return found
