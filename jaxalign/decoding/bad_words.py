"""Texts that a response never holds, whatever tokens spell them.

A `_Reader` follows a vocabulary's steps from tokens to bytes, characters and what
escapes stand for, a byte at a time, and how far the text has come into each of the
words. Run over the bytes of every token, it becomes a table of which tokens would
complete a word. Everything else stays allowed: ids that spell nothing, malformed
escapes, bytes that are no UTF-8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.decoding import constraints
from jaxalign.decoding.regular import DEAD

_HEX = "0123456789abcdef"
_OTHER = ""  # any character that no word holds
_BAD = None  # in place of a matched part: a word is complete
_MOST = 1 << 28  # entries of a table over states and tokens
# What a character of several bytes begins with: bytes that follow, bounds of the next.
_LEADS = {
    **{b: (1, 0x80, 0xBF) for b in range(0xC2, 0xE0)},
    **{b: (2, 0x80, 0xBF) for b in range(0xE1, 0xF0)},
    **{b: (3, 0x80, 0xBF) for b in range(0xF1, 0xF4)},
    0xE0: (2, 0xA0, 0xBF),
    0xED: (2, 0x80, 0x9F),
    0xF0: (3, 0x90, 0xBF),
    0xF4: (3, 0x80, 0x8F),
}


class _State(NamedTuple):
    """How far the reader is."""

    matched: str | None  # the longest end of the text that begins a word
    # what is open: "", "§", "§x" or "§x" and digits; " " where an escaped newline would
    # take a space along
    escape: str = ""
    literal: str | None = ""  # as `matched`, if the open escape turned out to be none
    # bytes to come of a character, bounds of the next, and those that came (empty for
    # characters that no word holds; then only their number counts)
    partial: tuple[int, int, int, bytes, int] | None = None


class _Reader:
    """Bytes to text, as the vocabulary decodes them, up to the first bad word."""

    def __init__(self, words: Sequence[str], vocabulary: Any):
        self._words = set(words)
        self._begins = {word[:n] for word in words for n in range(len(word) + 1)}
        self._opener, self._letters = vocabulary.escapes or ("", {})
        # Bytes that are no UTF-8 are left out of byte vocabularies' texts.
        self._broken = "" if vocabulary.to_json()["kind"] == "bytes" else "\ufffd"
        held = set("".join(words))
        self._known = held | set(self._opener + "x; " + _HEX) | set(self._letters)
        self._raw = {c.encode()[:n] for c in self._known for n in range(1, 5)}
        # Numbers between these mean the same: some other character, or none.
        self._edges = sorted(
            {0xD800, 0xE000, 0x110000}
            | {ord(c) for c in held}
            | {ord(c) + 1 for c in held}
        )

    def _match(self, matched: str | None, c: str) -> str | None:
        if matched is _BAD:
            return _BAD
        text = matched + c if c in self._known and c else ""
        if any(text.endswith(word) for word in self._words):
            return _BAD
        while text not in self._begins:
            text = text[1:]
        return text

    def _digits(self, digits: str) -> str:
        """The same digits, or others that go on in the same way."""
        room, value = 6 - len(digits), int(digits, 16)
        spans = [(value << 4 * s, (value + 1) << 4 * s) for s in range(room + 1)]
        kinds = []
        for low, high in spans:
            if any(low < edge < high for edge in self._edges):
                return digits
            kinds.append(sum(edge <= low for edge in self._edges))
        return self._same.setdefault((len(digits), tuple(kinds)), digits)

    def read(self, state: _State, c: str) -> _State:
        """The state after a character."""
        matched, escape, literal, _ = state
        if escape == " ":
            if c == " ":
                return _State(matched)
            escape = ""
        if not escape:
            if c and c == self._opener:
                return _State(matched, c, self._match(matched, c))
            return _State(self._match(matched, c))
        if escape == self._opener:
            if c == "x":
                return _State(matched, escape + c, self._match(literal, c))
            if c == self._opener:
                return _State(self._match(matched, c))
            if c in self._letters:
                after = self._match(matched, self._letters[c])
                return _State(after, " " if c == "n" else "")
            return _State(self._match(literal, c))
        digits = escape[2:]
        if c and c in _HEX and len(digits) < 6:
            digits = self._digits(digits + c)
            return _State(matched, escape[:2] + digits, self._match(literal, c))
        if c == ";" and digits:
            point = int(digits, 16)
            if point > 0x10FFFF or 0xD800 <= point < 0xE000:
                return _State(self._match(literal, c))
            return _State(self._match(matched, chr(point)))
        return self.read(_State(literal), c)

    def step(self, state: _State, byte: int) -> _State:
        """The state after a byte."""
        if state.partial:
            left, low, high, raw, seen = state.partial
            plain = state._replace(partial=None)
            if not low <= byte <= high:
                for _ in range(seen):
                    plain = self.read(plain, self._broken) if self._broken else plain
                return self.step(plain, byte)
            raw = raw + bytes([byte]) if raw else b""
            raw = raw if raw in self._raw else b""
            if left > 1:
                return plain._replace(partial=(left - 1, 0x80, 0xBF, raw, seen + 1))
            return self.read(plain, raw.decode() if raw else _OTHER)
        if byte < 0x80:
            c = chr(byte)
            return self.read(state, c if c in self._known else _OTHER)
        if byte in _LEADS:
            if state.escape[1:]:  # no digit and no semicolon begins so
                state = _State(state.literal)
            raw = bytes([byte])
            raw = raw if raw in self._raw else b""
            return state._replace(partial=(*_LEADS[byte], raw, 1))
        return self.read(state, self._broken) if self._broken else state

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """Moves int32 ``[S, 256]``, and which texts may stand as they are ``[S]``."""
        # Bytes that no known character has act alike within these bounds.
        bounds = [0, 0x80, 0x90, 0xA0, 0xC0, 0xC2, 0xE0, 0xE1, 0xED, 0xEE, 0xF0]
        bounds += [0xF1, 0xF4, 0xF5]
        own = set(b"".join(c.encode() for c in self._known))
        kinds = [b if b in own else -sum(x <= b for x in bounds) for b in range(256)]
        _, examples, columns = np.unique(kinds, return_index=True, return_inverse=True)
        self._same: dict[Any, str] = {}
        states = [_State("")]
        number = {states[0]: 0}
        rows = []
        while len(rows) < len(states):
            row = []
            for byte in examples.tolist():
                new = self.step(states[len(rows)], byte)
                if new.matched is _BAD:
                    row.append(DEAD)
                    continue
                if new not in number:
                    number[new] = len(states)
                    states.append(new)
                row.append(number[new])
            rows.append(row)
        fine = [state.literal is not _BAD for state in states]
        table, fine = _minimal(np.array(rows, np.int32), np.array(fine))
        return table[:, columns], fine


def _minimal(table: np.ndarray, fine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One state for all that go on alike (Moore's refinement); state 0 stays first."""
    classes, count = fine.astype(np.int32), 0
    while True:
        ahead = np.where(table >= 0, classes[table], DEAD)
        rows = np.ascontiguousarray(np.column_stack([classes, ahead]).astype(np.int32))
        rows = rows.view(f"V{rows.dtype.itemsize * rows.shape[1]}").ravel()
        _, first, classes = np.unique(rows, return_index=True, return_inverse=True)
        if len(first) == count:
            break
        count = len(first)
    order = np.argsort(first, kind="stable")  # the class of state 0 comes first
    number = np.argsort(order)
    kept = table[first[order]]
    moves = np.where(kept >= 0, number[classes[kept]], DEAD)
    return moves.astype(np.int32), fine[first[order]]


def without(
    words: Sequence[str], vocabulary: Any, num_tokens: int | None = None
) -> constraints.Automaton:
    """Responses whose text holds none of the words; a ``decoding.Constraint``.

    Arguments are those of `constraints.must_include`. Words that need too large a table
    are refused.

    >>> from jaxalign.vocabularies import ByteVocabulary
    >>> rule = without(["no"], ByteVocabulary())
    >>> bool(rule.allowed(rule.advance(0, ord("n") + 3), 9)[ord("o") + 3])
    False
    """
    for word in words:
        if not isinstance(word, str) or not word:
            raise ValueError(f"A bad word must be a text, not empty; got {word!r}.")
    table, fine = _Reader(words, vocabulary).table()
    spelt, first = (
        vocabulary.token_bytes(first=first, special=True) for first in (False, True)
    )
    # Rows of the embedding that the vocabulary lacks decode as its unknown id.
    more = max(0, (num_tokens or 0) - len(spelt))
    spelt += [spelt[vocabulary.unk_id]] * more
    first += [first[vocabulary.unk_id]] * more
    return constraints.from_bytes(
        *(table, fine, spelt, first),
        unfinished=True,
        limit=_MOST,
        eos_id=vocabulary.eos_id,
    )
