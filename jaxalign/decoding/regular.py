"""Regular languages of text as automata over bytes.

``compile_regex`` builds them with `outlines_core` (Rust's regex automata); products,
must-include languages and reading through a vocabulary's escapes are here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxalign.decoding import patterns

DEAD = -1


class ByteAutomaton(NamedTuple):
    """A deterministic automaton over UTF-8 bytes; state 0 is the start."""

    table: np.ndarray  # int32 ``[S, 256]``, the next state, or -1
    accepting: np.ndarray  # bool ``[S]``

    def accepts(self, text: str) -> bool:
        """Whether the whole text is in the language."""
        state = 0
        for byte in text.encode("utf-8"):
            state = self.table[state, byte]
            if state == DEAD:
                return False
        return bool(self.accepting[state])


def compile_regex(pattern: str) -> ByteAutomaton:
    """The texts that a regular expression matches as a whole.

    The language is that of ``re.fullmatch(pattern, text, re.ASCII)``: ``\\d``, ``\\w``
    and ``\\s`` are ASCII, everything else is Unicode. Texts hold no NUL. Anchors,
    look-around, backreferences, possessive quantifiers, atomic groups and the flags
    that change letters (``(?i)``, ``(?u:...)``) are refused.

    Raises:
      ValueError: with the reason, for a pattern that is not understood.

    >>> compile_regex("(a|ab)*c?").accepts("aabc")
    True
    """
    try:
        import outlines_core
    except ImportError as error:
        raise ImportError(
            "Regular expressions are compiled by outlines-core; install it with "
            "`pip install 'jaxalign[constraints]'`."
        ) from error
    rust = patterns.for_rust(pattern)
    vocabulary = outlines_core.Vocabulary(256, {bytes([b]): [b] for b in range(256)})
    try:
        # With a NUL at the end the whole language matters, not the first alternative
        # that matches: `a|ab` alone would stop at "a".
        index = outlines_core.Index(f"(?:{rust})\\x00", vocabulary)
    except ValueError as error:
        raise ValueError(
            f"{pattern!r} cannot be compiled: {error}. Make it simpler, above all its "
            "counts."
        ) from error
    moves = index.get_transitions()
    start, finals = index.get_initial_state(), index.get_final_states()
    reached = {target for row in moves.values() for target in row.values()}
    names = [start, *sorted((set(moves) | reached) - {start})]
    number = {name: i for i, name in enumerate(names)}
    table = np.full((len(names), 256), DEAD, np.int32)
    for name, row in moves.items():
        for byte, target in row.items():
            if 0 < byte < 256:
                table[number[name], byte] = number[target]
    accepting = np.array([moves.get(name, {}).get(0) in finals for name in names])
    return trim(ByteAutomaton(table, accepting))


def including(phrase: str) -> ByteAutomaton:
    """All texts that hold ``phrase``; the automaton of Knuth, Morris and Pratt.

    >>> including("aba").accepts("ababa"), including("aba").accepts("abba")
    (True, False)
    """
    raw = phrase.encode("utf-8")
    if not raw:
        raise ValueError("A phrase to include must not be empty.")
    n = len(raw)
    table = np.zeros((n + 1, 256), np.int32)
    table[0, raw[0]] = 1
    fallback = 0
    for state in range(1, n):
        table[state] = table[fallback]
        table[state, raw[state]] = state + 1
        fallback = table[fallback, raw[state]]
    table[n] = n
    return ByteAutomaton(table, np.arange(n + 1) == n)


def excluding(phrase: str) -> ByteAutomaton:
    """All texts that do not hold ``phrase``."""
    table, _ = including(phrase)
    held = len(table) - 1
    return ByteAutomaton(
        np.where(table == held, DEAD, table)[:held], np.ones(held, bool)
    )


def intersection(
    automata: Sequence[ByteAutomaton], limit: int = 50_000
) -> ByteAutomaton:
    """Texts that are in every language; refused for more than ``limit`` states.

    >>> both = intersection([compile_regex("[ab]{3}"), including("ba")])
    >>> [t for t in ("aba", "aab", "baaa") if both.accepts(t)]
    ['aba']
    """
    return functools.reduce(functools.partial(_product, limit=limit), automata)


def _product(a: ByteAutomaton, b: ByteAutomaton, limit: int) -> ByteAutomaton:
    width = len(b.accepting)
    number = {0: 0}
    rows, queue = {}, [0]
    while queue:
        code = queue.pop()
        left, right = a.table[code // width], b.table[code % width]
        pairs = np.where((left < 0) | (right < 0), DEAD, left * width + right)
        rows[code] = pairs
        new = [p for p in np.unique(pairs[pairs >= 0]).tolist() if p not in number]
        number |= zip(new, range(len(number), len(number) + len(new)), strict=True)
        queue += new
        if len(number) > limit:
            raise ValueError(
                f"The constraints together need more than {limit} states: make them "
                "simpler, or include fewer phrases."
            )
    codes, of = np.unique([rows[code] for code in number], return_inverse=True)
    order = [number.get(code, DEAD) for code in codes.tolist()]
    table = np.array(order, np.int32)[of].reshape(-1, 256)
    codes = np.array(list(number))
    accepting = a.accepting[codes // width] & b.accepting[codes % width]
    return trim(ByteAutomaton(table, accepting))


def trim(automaton: ByteAutomaton) -> ByteAutomaton:
    """Removes moves into states from which no text ends, and those states."""
    table, accepting = automaton
    useful = accepting.copy()
    while True:
        more = useful | np.any((table >= 0) & useful[table], axis=1)
        if (more == useful).all():
            break
        useful = more
    keep = useful.copy()
    keep[0] = True  # the start stays, also in the empty language
    number = np.where(keep, np.cumsum(keep) - 1, DEAD).astype(np.int32)
    moved = np.where((table >= 0) & useful[table], number[table], DEAD)
    return ByteAutomaton(moved[keep].astype(np.int32), accepting[keep])


def through_escapes(
    automaton: ByteAutomaton, opener: str, letters: dict[str, str]
) -> ByteAutomaton:
    """The escaped spellings of the texts of a language.

    ``letters`` says what each one-letter escape behind ``opener`` stands for; that of a
    newline takes one space along. Escapes by number (``x..;``) are left out.
    """
    table, accepting = automaton
    size = len(accepting)
    # One more state, from which nothing leads anywhere, so that -1 indexes it.
    closed = np.vstack([table, np.full((1, 256), DEAD, np.int32)])

    def move(states: np.ndarray, raw: bytes) -> np.ndarray:
        for byte in raw:
            states = closed[states, byte]
        return states

    first, *rest = opener.encode("utf-8")  # of at most two bytes
    plain, partial, escape, again, newline = (i * size for i in range(5))
    states = np.arange(size)
    out = np.full((5 * size, 256), DEAD, np.int32)
    out[plain : plain + size] = table
    out[plain : plain + size, first] = states + (partial if rest else escape)
    if rest:
        begun = move(states, bytes([first]))
        out[partial : partial + size] = closed[begun]
        out[partial : partial + size, rest[0]] = states + escape
        out[escape : escape + size, first] = states + again
        out[again : again + size, rest[0]] = move(states, opener.encode())
    else:
        out[escape : escape + size, first] = move(states, opener.encode())
    for code, character in letters.items():
        mode = newline if character == "\n" else plain
        target = move(states, character.encode("utf-8"))
        target = np.where(target >= 0, target + mode, DEAD)
        out[escape : escape + size, ord(code)] = target
    out[newline : newline + size] = out[plain : plain + size]
    out[newline : newline + size, ord(" ")] = states + plain
    ends = np.zeros(5 * size, bool)
    ends[plain : plain + size] = ends[newline : newline + size] = accepting
    return trim(ByteAutomaton(out, ends))
