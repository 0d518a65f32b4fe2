"""Which file wins: what the package says is a default, what a user writes is not.

Two rules, whatever the order in which files are named or included:

* the packaged files, and what they include, are read first, then all others, so that
  a user's line is never taken back by a packaged one;
* the network that a packaged file includes is a default: it is left out as soon as
  another one is named. Two networks that are both named are a mistake.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxalign.configs.names import ConfigError
from jaxalign.configs.scan import Scanned, package, short

_MODEL, _OBJECTIVE = "MODEL", "OBJECTIVE"


class Network(NamedTuple):
    """The file that describes the network, and whether nobody asked for it."""

    file: Scanned
    is_default: bool


def packaged(file: Scanned) -> bool:
    """Whether a file is one of the package's, rather than a user's."""
    return file.path.resolve().is_relative_to(package().resolve())


def in_order(files: Sequence[Scanned]) -> list[Scanned]:
    """All files that were settled, those that win last."""
    # Of files that include each other the including one speaks last, by convention.
    every = [f for root in files for f in reversed([*root.walk()])]
    return sorted(every, key=lambda file: not file.is_default)


def settle(files: Sequence[Scanned]) -> Network | None:
    """Finds the one network, and takes default ones out of the includes.

    Args:
      files: those named on the command line, in order; changed in place.

    Raises:
      ConfigError: for two networks, or two objectives, that are both named.
    """
    for file in files:
        _mark(file, False)
    _check_objective(files)
    found = [pair for file in files for pair in _networks(file, None)]
    named = _distinct([f for f, above in found if not (above and above.is_default)])
    if len(named) > 1:
        raise ConfigError(
            f"Two networks are named, {short(named[0].path)} and "
            f"{short(named[1].path)}: each sets {_MODEL}. Name one of them; a file "
            "that changes a network includes it."
        )
    defaults = [f for f, above in found if above and above.is_default]
    if not named:
        return Network(defaults[-1], True) if defaults else None
    out = {id(f) for f in defaults}
    for file in (f for root in files for f in root.walk()):
        file.left_out = [line for line, f in file.includes if id(f) in out]
        file.includes = [(n, f) for n, f in file.includes if id(f) not in out]
    return Network(named[0], False)


def _mark(file: Scanned, included_by_default: bool) -> None:
    """Says of a tree of files which are defaults: all that a packaged file includes."""
    file.is_default = included_by_default or packaged(file)
    for _, included in file.includes:
        _mark(included, file.is_default)


def _networks(
    file: Scanned, above: Scanned | None
) -> Iterator[tuple[Scanned, Scanned | None]]:
    """``(file of a network, file that includes it or None)`` in a tree of files."""
    tree = [*file.walk()]
    if not any(_MODEL in f.macros for f in tree):
        return
    # A run reads the macro; a file of a network, and what it includes, only sets it.
    if _MODEL in file.macros or not any(_MODEL in f.reads for f in tree):
        yield file, above
        return
    for _, included in file.includes:
        yield from _networks(included, file)


def _distinct(files: Sequence[Scanned]) -> list[Scanned]:
    """Each file once, without those that a user's file among them includes."""
    by_path = {file.path.resolve(): file for file in files}
    inner = {f.path.resolve() for file in by_path.values() for f in _written_in(file)}
    return [file for path, file in by_path.items() if path not in inner]


def _written_in(file: Scanned) -> Iterator[Scanned]:
    """The files that a user's file, or a user's file in it, includes by name."""
    for _, included in file.includes if not packaged(file) else ():
        yield included
        yield from _written_in(included)


def _check_objective(files: Sequence[Scanned]) -> None:
    """Refuses a run that would have no effect beside another one."""
    trees = ((i, f) for i, root in enumerate(files) for f in root.walk())
    runs = [(i, f) for i, f in trees if _OBJECTIVE in f.macros]
    package_runs = _distinct([f for _, f in runs if packaged(f)])
    if len(package_runs) > 1:
        first, second = (short(f.path) for f in package_runs[:2])
        raise ConfigError(
            f"Two runs are named, {first} and {second}: each sets {_OBJECTIVE}. Name "
            "one of them."
        )
    for i, run in runs:
        before = [f for n, f in runs if n < i and not packaged(f)]
        if packaged(run) and before:
            raise ConfigError(
                f"{short(before[0].path)} sets {_OBJECTIVE}, so {short(run.path)} "
                "after it would have no effect. Leave one out, or name the file that "
                "changes the other one last."
            )
