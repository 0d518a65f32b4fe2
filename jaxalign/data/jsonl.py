"""JSON Lines: read strictly, and written so that every JSON reader takes them.

Reading asks for one object a line, each key once, UTF-8 and no cut tail. All files of
rows are written by :func:`json_line`.
"""

from __future__ import annotations

import collections
import gzip
import json
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from jaxalign import remote
from jaxalign.data.bad_rows import BadRow, FieldError, show
from jaxalign.files import write_atomically


def read_jsonl(
    path: str | pathlib.PurePath,
) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Streams ``(line number, object or BadRow)`` from a JSON Lines file.

    ``.gz`` files are unpacked on the way. Blank lines at the end are no rows. A file in
    a bucket is copied here first.
    """
    check_format(path)
    local = remote.copy(path)
    if local.suffix == ".gz":
        lines = _unpacked_lines(str(path), local)
        yield from parse_lines(str(path), lines)
        return
    with open(local, "rb") as file:
        yield from parse_lines(str(path), enumerate(file, start=1))


def check_format(path: str | pathlib.PurePath) -> None:
    """Refuses what is not JSON Lines, before a complaint about every line of it.

    Raises:
      ValueError: for a folder, a table, or JSON that is not one object a line.
    """
    name = pathlib.PurePath(str(path).removesuffix(".gz"))
    if name.suffix.lower() in TABLES:
        raise ValueError(
            f"{path} is {TABLES[name.suffix.lower()]}, which is not read: convert it "
            "to JSON Lines, one object a line, with pandas.read_csv(...)"
            ".to_json(FILE, orient='records', lines=True)."
        )
    local = remote.copy(path)
    if local.is_dir():
        raise ValueError(
            f"{path} is a folder: name a data file in it, or where DATA is asked for "
            f"all of them with a glob, '{path}/*.jsonl'."
        )
    if not local.is_file():
        return
    opener = gzip.open if local.suffix == ".gz" else open
    try:
        with opener(local, "rb") as file:
            line = file.readline(_FIRST_LINE)
    except (OSError, EOFError, zlib.error):
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
TABLES = {".csv": "CSV", ".tsv": "TSV", ".xlsx": "a spreadsheet"}
_FIRST_LINE = 2**16


def _unpacked_lines(name: str, local: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a gzip file."""
    number = 0
    try:
        with gzip.open(local, "rb") as file:
            for line in file:
                number += 1
                yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        what = f"the gzip data is cut or damaged ({error}): copy or pack it again"
        if local.read_bytes()[:2] != b"\x1f\x8b":
            what = "this is no gzip file: take .gz off its name, or pack it"
        raise ValueError(f"{name}:{number + 1}: {what}.") from None


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
    except FieldError:
        raise
    except (RecursionError, ValueError) as error:
        if isinstance(error, json.JSONDecodeError) and not line.endswith(b"\n"):
            raise FieldError(
                "row",
                "truncated",
                "a complete JSON object",
                f"a truncated last line ({len(line)} bytes, no newline at the end)",
            ) from None
        what = str(error)
        if isinstance(error, json.JSONDecodeError):
            what = f"{error.msg} at column {error.colno}"
        raise FieldError(
            "row", "invalid JSON", "a JSON object", f"invalid JSON ({what})"
        ) from None
    if not isinstance(value, dict):
        raise FieldError(
            "row", "not an object", "a JSON object (one a line)", show(value)
        )
    return value


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
    """The JSON value in a file.

    Raises:
      ValueError: naming the file, when it holds something else.
    """
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
