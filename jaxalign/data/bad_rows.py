"""What is wrong with a row, said so that its owner can find and mend it."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

SHOWN_BAD_ROWS = 20
_NAME_LENGTH, _TEXT_LENGTH, _SHOWN_NAMES = 60, 400, 20


def quoted(text: str, length: int = _TEXT_LENGTH) -> str:
    """Text of the data, fit for a terminal: on one line, cut, nothing unprintable.

    Escape sequences, line breaks, surrogates and marks that change the direction of
    writing are shown as Python escapes. Quoting twice changes nothing.

    >>> print(quoted("a\\x1b[31m\\nb"))
    a\\x1b[31m\\nb
    """
    cut = "... (cut)"
    if len(text) > length + len(cut):
        text = text[:length] + cut
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def listed(names: Iterable[Any]) -> str:
    """Field names for a message: sorted, quoted, each cut, the first of many.

    >>> listed(["b", "a"])
    "['a', 'b']"
    """
    found = sorted(map(str, names))
    cut = [n[:_NAME_LENGTH] + "..." * (len(n) > _NAME_LENGTH) for n in found]
    shown = ", ".join(quoted(repr(name)) for name in cut[:_SHOWN_NAMES])
    more = len(found) - _SHOWN_NAMES
    return f"[{shown}]" + (f" and {more} more" if more > 0 else "")


@dataclasses.dataclass(frozen=True)
class BadRow:
    """One rejected row."""

    file: str  # or the name of the data set
    line: int  # of the file, or row of the data set, from 1
    field: str  # ``row`` when the row as a whole is at fault
    problem: str  # a short name to count by, such as ``missing`` or ``truncated``
    expected: str
    got: str

    def __post_init__(self) -> None:
        # Whoever wrote the data chose these texts, not whoever reads the message.
        object.__setattr__(self, "field", quoted(self.field, _NAME_LENGTH))
        for name in ("problem", "expected", "got"):
            object.__setattr__(self, name, quoted(getattr(self, name)))

    def __str__(self) -> str:
        return (
            f"{quoted(self.file)}:{self.line}: {self.field}: expected "
            f"{self.expected}, got {self.got}"
        )


class FieldError(ValueError):
    """What is wrong with one field of one row; readers add file and line."""

    def __init__(self, field: str, problem: str, expected: str, got: str):
        super().__init__(
            f"{quoted(field, _NAME_LENGTH)}: expected {quoted(expected)}, got "
            f"{quoted(got)}"
        )
        self.field, self.problem = field, problem
        self.expected, self.got = expected, got

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
            "them out with ON_BAD_ROW='skip' (--gin.ON_BAD_ROW=skip)."
        )


class BadRows:
    """The rejected rows of a source: the first 20 in full, all of them counted.

    Args:
      listing: a JSON Lines file that gets all of them, one object of :class:`BadRow`'s
        attributes a line; made at the first one. None lists them nowhere.

    Attributes:
      kept: how many rows were good; whoever reads the rows counts them.
    """

    def __init__(self, listing: pathlib.Path | None = None) -> None:
        self.first: list[BadRow] = []
        self.by_problem: collections.Counter[str] = collections.Counter()
        self.kept = 0
        self.listing = listing
        self._missing: dict[str, BadRow] = {}
        self._others: list[BadRow] = []
        self._file: TextIO | None = None

    def add(self, bad: BadRow) -> None:
        """Counts one bad row."""
        problem = f"{bad.field}: {bad.problem}"
        self.by_problem[problem] += 1
        if bad.problem == "missing":
            self._missing.setdefault(problem, bad)
        elif len(self._others) < SHOWN_BAD_ROWS:
            self._others.append(bad)
        if len(self.first) < SHOWN_BAD_ROWS:
            self.first.append(bad)
        if self.listing is not None:
            if self._file is None:
                self.listing.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.listing.open("w", encoding="ascii")
            # In ASCII: a file's name may hold what UTF-8 cannot.
            self._file.write(json.dumps(dataclasses.asdict(bad)) + "\n")

    def close(self) -> None:
        """Completes the listing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def total(self) -> int:
        """How many rows were rejected."""
        return sum(self.by_problem.values())

    def __str__(self) -> str:
        self.close()
        everywhere = {}
        if not self.kept:
            # A field that no row has: one line says as much as a line for every row.
            of_rows = sum(n for p, n in self.by_problem.items() if p.startswith("row:"))
            rows = self.total - of_rows
            everywhere = {
                problem: bad
                for problem, bad in self._missing.items()
                if self.by_problem[problem] == rows > 1
            }
        lines = [
            f"{bad}; no row has it: the same in {self.by_problem[problem]:,} rows"
            for problem, bad in everywhere.items()
        ]
        singly = self._others if everywhere else self.first
        lines += map(str, singly)
        told = len(singly) + sum(self.by_problem[problem] for problem in everywhere)
        if self.total > told:
            lines.append(f"... and {self.total - told} more")
        if self.listing is not None and self.total > len(lines):
            lines.append(f"All of them are listed in {self.listing}")
        return "\n".join(lines)


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest known name, or nothing."""
    # Long names are text of the data, and no typing mistake of this one.
    short = [str(k) for k in known if len(str(k)) <= 2 * _NAME_LENGTH]
    close = difflib.get_close_matches(name, short, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def show(value: Any) -> str:
    """A value in words, cut short, for messages."""
    names = {dict: "an object", list: "a list", type(None): "null"}
    if type(value) in names:
        return names[type(value)]
    if isinstance(value, bool):
        return f"a boolean ({json.dumps(value)})"
    if isinstance(value, str):
        cut = value if len(value) <= 40 else value[:40] + "..."
        return f"the text {cut!r}" if value else "an empty text"
    try:
        shown = quoted(repr(value), _NAME_LENGTH)
    except ValueError:  # Python writes no integer of more than 4300 digits
        shown = f"of {value.bit_length()} bits"
    return f"the {type(value).__name__} {shown}"


def missing(field: str, name: str, path: str, raw: Mapping[str, Any]) -> FieldError:
    where = "" if path == name else f" on {path!r}"
    got = f"fields {listed(raw)}{nearest(name, raw)}"
    return FieldError(field, "missing", f"a field {name!r}{where}", got)
