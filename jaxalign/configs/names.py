"""The configs' error type, and the nearest valid names for its texts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A mistake in a gin file or a ``--gin`` flag; the text says how to mend it."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like ``name``, best first; case does not count.

    >>> nearest("data", ["DATA", "BETA", "MODEL"], count=1)
    ['DATA']
    """
    by_lower = {candidate.lower(): candidate for candidate in sorted(set(known))}
    found = difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.5)
    return [by_lower[key] for key in found]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    found = nearest(name, known)
    return f" Nearest: {', '.join(found)}." if found else ""


def did_you_mean_or(name: str, known: Iterable[str], everything: str) -> str:
    """The nearest names; where none is near, ``everything`` and all of them.

    >>> did_you_mean_or("BETTA", ["BETA", "MODEL"], "Macros")
    ' Nearest: BETA.'
    >>> did_you_mean_or("xyzzy", ["BETA", "MODEL"], "Macros")
    ' Macros: BETA, MODEL.'
    """
    known = sorted(set(known))
    return did_you_mean(name, known) or f" {everything}: {', '.join(known) or 'none'}."
