"""Python's regular expressions, spelt for Rust's engine from Python's own parse tree.

The two languages agree on simple patterns and differ in many places (spaces in
braces, ``&&`` and ``--`` in classes, what ``\\d`` holds ...). So no pattern is handed
over as it was written: Python's parser says what it means, and that is written down
with the few constructs that mean the same on both sides. What has no such spelling is
refused.
"""

from __future__ import annotations

import re
import warnings

# What `re.compile` itself parses with; there is no public door to it.
from re import _constants as codes
from re import _parser as parser
from typing import Any

_LAST = 0x10FFFF
_ABSENT = [(0, 0), (0xD800, 0xDFFF)]  # texts hold neither NUL nor surrogates
_FLAGS = re.ASCII | re.DOTALL | re.VERBOSE  # the others change what is matched

Intervals = list[tuple[int, int]]  # of code points, both ends in them


# First and last of their stretches, one behind the other; \t to \r are neighbours.
_CATEGORIES = {"DIGIT": "09", "WORD": "09AZaz__", "SPACE": "  \t\r"}
_BOUNDARIES = {
    codes.AT_BEGINNING_STRING: "\\A",
    codes.AT_BOUNDARY: "\\b",
    codes.AT_NON_BOUNDARY: "\\B",
    codes.AT_END_STRING: "\\Z",
}


def for_rust(pattern: str) -> str:
    """The same language in the syntax of Rust's ``regex`` crate.

    Args:
      pattern: read as ``re.compile(pattern, re.ASCII)`` reads it.

    Raises:
      ValueError: for what is no regular expression, or cannot be expressed.

    >>> for_rust("[+--]x{ 2}")
    '[\\\\x{2b}-\\\\x{2d}]x\\\\x{7b}\\\\x{20}2\\\\x{7d}'
    """
    if not isinstance(pattern, str):
        raise ValueError(f"A regular expression must be text, got {pattern!r}.")
    try:
        with warnings.catch_warnings():
            # Of members of a class that might mean more one day.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            tree = parser.parse(pattern, re.ASCII)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}.") from error
    flags = tree.state.flags
    try:
        _check(flags)
        return _sequence(tree, flags)
    except _Unsupported as error:
        raise ValueError(f"{pattern!r}: {error}") from None
    except RecursionError:
        raise ValueError(f"{pattern[:40]!r}... is nested too deeply.") from None


class _Unsupported(Exception):
    pass


def _check(flags: int) -> None:
    extra = re.RegexFlag(flags & ~_FLAGS.value)
    if extra:
        raise _Unsupported(
            f"the flag {extra!r} is not supported; groups may be (...), (?:...), "
            "(?s:...), (?a:...), (?x:...) and (?P<name>...)."
        )


def _sequence(items: Any, flags: int) -> str:
    return "".join(_one(kind, value, flags) for kind, value in items)


def _one(kind: Any, value: Any, flags: int) -> str:
    """One node of the parse tree."""
    if kind is codes.LITERAL:
        return _class([(value, value)])
    if kind is codes.NOT_LITERAL:
        return _class(_complement([(value, value)]))
    if kind is codes.ANY:
        newline = [] if flags & re.DOTALL else [(10, 10)]
        return _class(_complement(newline))
    if kind is codes.IN:
        return _class(_members(value))
    if kind is codes.BRANCH:
        return f"(?:{'|'.join(_sequence(branch, flags) for branch in value[1])})"
    if kind is codes.SUBPATTERN:
        _, more, less, inner = value
        _check(more)
        return f"(?:{_sequence(inner, (flags | more) & ~less)})"
    if kind in (codes.MAX_REPEAT, codes.MIN_REPEAT):
        # Greedy or lazy is one language where the whole text has to match.
        low, high, inner = value
        most = "" if high is codes.MAXREPEAT else int(high)
        return f"(?:{_sequence(inner, flags)}){{{int(low)},{most}}}"
    raise _Unsupported(_why_not(kind, value))


def _why_not(kind: Any, value: Any) -> str:
    if kind is codes.AT and value in _BOUNDARIES:
        name = _BOUNDARIES[value]
        return f"{name} is not supported; expected plain regular operators."
    if kind is codes.AT:
        return (
            "anchors are not supported; the whole text has to match anyway. Remove "
            "the ^ or $, or write \\^ or \\$."
        )
    if kind is codes.GROUPREF:
        return f"\\{value} is not supported; expected plain regular operators."
    if kind in (codes.POSSESSIVE_REPEAT, codes.ATOMIC_GROUP):
        return "possessive quantifiers and atomic groups are not supported."
    return (
        f"look-around or a conditional ({kind}) is not supported; groups may be (...), "
        "(?:...), (?s:...) and (?P<name>...)."
    )


def _members(items: Any) -> Intervals:
    """The code points of a class."""
    found: Intervals = []
    negated = False
    for kind, value in items:
        if kind is codes.NEGATE:
            negated = True
        elif kind is codes.LITERAL:
            found.append((value, value))
        elif kind is codes.RANGE:
            found.append(tuple(value))
        else:  # such as CATEGORY_NOT_DIGIT
            *_, no, name = value.name.split("_")
            ends = map(ord, _CATEGORIES[name])
            own = list(zip(ends, ends, strict=True))
            found += _complement(own) if no == "NOT" else own
    return _complement(found) if negated else found


def _complement(intervals: Intervals) -> Intervals:
    """All code points that are in none of the intervals."""
    found, at = [], 0
    for low, high in sorted(intervals):
        if low > at:
            found.append((at, low - 1))
        at = max(at, high + 1)
    return found + [(at, _LAST)] * (at <= _LAST)


def _class(intervals: Intervals) -> str:
    """A class in hexadecimal, in which nothing has a meaning of its own."""
    left = _complement(_complement(intervals) + _ABSENT)
    if not left:
        return r"[^\x{0}-\x{10ffff}]"
    (low, high), *more = left
    if low == high and not more:
        alone = chr(low)
        return alone if alone.isascii() and alone.isalnum() else _hex(low)
    spelt = (_hex(a) if a == b else f"{_hex(a)}-{_hex(b)}" for a, b in left)
    return f"[{''.join(spelt)}]"


def _hex(point: int) -> str:
    return f"\\x{{{point:x}}}"
