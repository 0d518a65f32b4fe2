"""What is wrong with a row, said so that its owner can find and mend it."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

SHOWN_BAD_ROWS = 20


@dataclasses.dataclass(frozen=True)
class BadRow:
    """One rejected row.

    Attributes:
      file: the file, or the name of the data set.
      line: 1-based line (or row) number.
      field: the field at fault; ``row`` when the row as a whole is.
      problem: a short name to count by, such as ``missing`` or ``truncated``.
      expected: what should have been there.
      got: what was.
    """

    file: str
    line: int
    field: str
    problem: str
    expected: str
    got: str

    def __str__(self) -> str:
        return (
            f"{self.file}:{self.line}: {self.field}: expected {self.expected}, "
            f"got {self.got}"
        )


class FieldError(ValueError):
    """What is wrong with one field of one row; readers add file and line."""

    def __init__(self, field: str, problem: str, expected: str, got: str):
        super().__init__(f"{field}: expected {expected}, got {got}")
        self.field, self.problem, self.expected, self.got = (
            field,
            problem,
            expected,
            got,
        )

    def at(self, file: str, line: int) -> BadRow:
        """The bad row at ``file:line``."""
        return BadRow(file, line, self.field, self.problem, self.expected, self.got)


class OptionError(ValueError):
    """A data set's option has a value that makes no sense; no row is to blame."""


class DataError(ValueError):
    """Rows that cannot be used; the message lists the first 20 and counts the rest."""

    def __init__(self, bad_rows: BadRows):
        self.bad_rows = bad_rows
        super().__init__(
            f"{bad_rows.total} bad row{'s' if bad_rows.total > 1 else ''}:\n"
            f"{bad_rows}\nCorrect them, map other field names with FIELD_MAP, or leave "
            "them out with ON_BAD_ROW='skip' (--gin.ON_BAD_ROW=\"'skip'\")."
        )


class BadRows:
    """The rejected rows of a source: the first 20 in full, all of them counted."""

    def __init__(self) -> None:
        self.first: list[BadRow] = []
        self.by_problem: collections.Counter[str] = collections.Counter()

    def add(self, bad: BadRow) -> None:
        """Counts one bad row."""
        if len(self.first) < SHOWN_BAD_ROWS:
            self.first.append(bad)
        self.by_problem[f"{bad.field}: {bad.problem}"] += 1

    @property
    def total(self) -> int:
        """How many rows were rejected."""
        return sum(self.by_problem.values())

    def __str__(self) -> str:
        lines = [str(bad) for bad in self.first]
        if self.total > len(lines):
            lines.append(f"... and {self.total - len(lines)} more")
        return "\n".join(lines)


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest known name, or nothing."""
    close = difflib.get_close_matches(name, [str(k) for k in known], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def show(value: Any) -> str:
    """A value in words, cut short, for messages."""
    names = {dict: "an object", list: "a list", type(None): "null", bool: "a boolean"}
    if type(value) in names:
        detail = f" ({json.dumps(value)})" if isinstance(value, bool) else ""
        return names[type(value)] + detail
    if isinstance(value, str):
        cut = value if len(value) <= 40 else value[:40] + "..."
        return f"the text {cut!r}" if value else "an empty text"
    return f"the {type(value).__name__} {value!r}"


def missing(field: str, name: str, path: str, raw: Mapping[str, Any]) -> FieldError:
    where = "" if path == name else f" on {path!r}"
    return FieldError(
        field,
        "missing",
        f"a field {name!r}{where}",
        f"fields {sorted(raw)}{nearest(name, raw)}",
    )
