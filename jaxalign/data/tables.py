"""CSV and TSV: one row a record, under the names of the first line, read strictly.

Cells may hold line breaks in quotes. A cell is text, and where a number, a truth value
or an object is asked for, what that text spells (:class:`Cell`). An empty one is null.
"""

from __future__ import annotations

import csv
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from jaxalign.data import packed
from jaxalign.data.bad_rows import BadRow, listed, quoted

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_LONGEST_CELL = 2**27  # characters; Python's own limit, 2**17, is less than some texts
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


class Cell(str):
    """The text of a cell, with what else it may stand for.

    >>> Cell("0.5").number(), Cell("True").number(), Cell('{"a": 1}').json()
    (0.5, True, {'a': 1})
    >>> Cell("none").number()
    'none'
    """

    def number(self) -> Any:
        """A number or a truth value; itself where it spells neither."""
        text = self.strip()
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        try:
            # Python also reads 1_000, which nobody writes into a table.
            return self if "_" in text else float(text)
        except ValueError:
            return self

    def json(self) -> Any:
        """A JSON object or list; itself where it spells neither."""
        try:
            value = json.loads(self) if self.lstrip()[:1] in ("{", "[") else self
        except (ValueError, RecursionError):
            return self
        return value if isinstance(value, dict | list) else self


def read_table(
    path: str | pathlib.PurePath,
) -> Iterator[tuple[int, dict[str, Cell | None] | BadRow]]:
    """Streams ``(line number, row or BadRow)`` from a CSV or TSV file.

    A row's number is that of its first line. ``.gz`` and ``.zst`` are unpacked on the
    way.

    Raises:
      ValueError: when the header cannot be used, or a quote is never closed.
    """
    local = packed.check(path)
    delimiter = DELIMITERS[packed.kind(path).lower()]
    yield from parse_table(str(path), packed.lines(str(path), local), delimiter)


def parse_table(
    file: str, lines: Iterable[tuple[int, bytes]], delimiter: str
) -> Iterator[tuple[int, dict[str, Cell | None] | BadRow]]:
    """``(line number, row or BadRow)`` of the numbered lines of ``file``."""
    last = 0  # line that the reader has taken

    def texts() -> Iterator[str]:
        nonlocal last
        for last, line in lines:
            if last == 1 and line.startswith(_UTF_16):
                raise ValueError(f"{file} is UTF-16: save it as UTF-8.")
            # Bytes that are no UTF-8 become lone surrogates, and their row a bad one.
            coding = "utf-8-sig" if last == 1 else "utf-8"
            yield line.decode(coding, "surrogateescape")

    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    names: list[str] = []
    blank: list[int] = []
    while True:
        first = last + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error) and last > first:
                raise ValueError(
                    f"{file}:{first}: a quote is opened here or below and never closed "
                    f"up to the end of the file, line {last}: nothing says where this "
                    "row ends."
                ) from None
            if not names:
                raise ValueError(
                    f"{file}:{first}: the header is no CSV ({error})."
                ) from None
            expected = "cells as CSV quotes them"
            yield first, BadRow(file, first, "row", "invalid CSV", expected, str(error))
            continue
        if not cells:
            blank.append(first)
            continue
        if not names:
            names, blank = cells, []
            _check_names(file, names, delimiter)
            continue
        for n in blank:  # those at the end are no rows
            yield n, BadRow(file, n, "row", "empty", "a row", "an empty line")
        blank.clear()
        yield first, _row(file, first, names, cells)


def _check_names(file: str, names: list[str], delimiter: str) -> None:
    """Refuses a header under which no row could be read."""
    wrong = ""
    if len(names) == 1:
        others = [d for d in _NAMES if d != delimiter and d in names[0]]
        if others:
            wrong = (
                f"one column {quoted(names[0], 60)!r}: it seems to be separated by "
                f"{_NAMES[others[0]]}, expected {_NAMES[delimiter]}"
            )
    if not all(name.strip() for name in names):
        wrong = f"a column without a name: {listed(names)}"
    elif len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        wrong = f"the column {quoted(twice, 60)!r} {names.count(twice)} times"
    if wrong:
        raise ValueError(f"The header of {file} has {wrong}.")


def _row(
    file: str, line: int, names: list[str], cells: list[str]
) -> dict[str, Cell | None] | BadRow:
    if len(cells) != len(names):
        expected = f"{len(names)} cells, as the header has"
        return BadRow(file, line, "row", "cells", expected, f"{len(cells)}")
    for name, text in zip(names, cells, strict=True):
        at = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
        if at is not None:
            got = f"byte 0x{ord(text[at]) & 0xFF:02x} after {at} characters"
            return BadRow(file, line, name, "invalid UTF-8", "UTF-8 text", got)
    row = zip(names, cells, strict=True)
    return {name: Cell(text) if text else None for name, text in row}
