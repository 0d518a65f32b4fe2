"""Finite-state constraints as token masks over a vocabulary.

An automaton over bytes (``jaxalign.decoding.regular``) is run over the bytes of every
token once, on the host. What remains for decoding is a table lookup a step: from a
state, which tokens are allowed and where they lead. A token is allowed only if the text
can still be finished in the tokens left, so decoding never ends up where nothing is
allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.decoding import regular
from jaxalign.decoding.programs import Context, Program, State
from jaxalign.decoding.rules import EOS_ID

_FAR = 2**29  # the distance of states that do not end; sums stay in int32
_CHUNK = 1 << 22  # table entries computed at once


@flax.struct.dataclass
class Automaton(Program):
    """A finite-state constraint: a program, and masks for any other decoder.

    Tokens that act alike in every state share a column.
    """

    # int32 ``[S, C]``, the state after a token of each class, or -1, which stands for
    # the last state and leads nowhere; state 0 is the start. Both sizes are powers of
    # two, so that constraints of like size share what is compiled.
    next_state: jax.Array
    token_class: jax.Array  # int32 ``[V]``
    distance: jax.Array  # int32 ``[S]``, the fewest tokens to the end, EOS included

    def init(self) -> State:
        return jnp.int32(0)

    start = init  # as a ``jaxalign.decoding.Constraint``

    def advance(self, state: jax.Array, token: jax.Array) -> jax.Array:
        """The state after ``token``; -1, for good, if it was not allowed."""
        return self.next_state[state, self.token_class[token]]

    @property
    def fewest_tokens(self) -> int:
        """Of a response that meets the constraint, EOS included."""
        return int(self.distance[0])

    def accepts(self, tokens: Sequence[int] | np.ndarray) -> bool:
        """Whether a response meets the constraint as it stands; on the host."""
        table, token_class, distance = map(np.asarray, jax.tree.leaves(self))
        state = 0
        for token in tokens:
            state = table[state, token_class[token]]
        # Also where a stop ended it before its EOS.
        end = table[state, token_class[EOS_ID]]
        return bool(distance[state] == 0 or distance[end] == 0)

    def allowed(self, state: jax.Array, remaining: jax.Array | int) -> jax.Array:
        """Which tokens may come next, bool ``[..., V]``.

        Args:
          state: int32 ``[...]``.
          remaining: tokens that may still come, EOS included; ``[...]``.
        """
        targets = self.next_state[state]
        remaining = jnp.asarray(remaining)[..., None]
        reach = (targets >= 0) & (self.distance[targets] < remaining)
        return reach[..., self.token_class]

    def proposal(self, state: State, context: Context) -> jax.Array:
        allowed = self.allowed(state, context.remaining)
        return jnp.where(allowed, context.logps[0], -jnp.inf)

    def step(self, state, context, token, key):
        return self.advance(state, token), jnp.float32(0.0), False


def regex(pattern: str, vocabulary: Any, num_tokens: int | None = None) -> Automaton:
    """Texts that match ``pattern`` as a whole; see ``regular.compile_regex``.

    >>> from jaxalign.vocabularies import ByteVocabulary
    >>> digits = regex("[0-9]{2}", ByteVocabulary())
    >>> jnp.flatnonzero(digits.allowed(0, 3)) - 3 - ord("0")
    Array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], dtype=int32)
    """
    return over_tokens(regular.compile_regex(pattern), vocabulary, num_tokens)


def must_include(
    phrases: Sequence[str],
    vocabulary: Any,
    num_tokens: int | None = None,
    *,
    pattern: str | None = None,
    bad_words: Sequence[str] = (),
) -> Automaton:
    """Texts that hold every phrase, anywhere, in any order.

    Args:
      phrases: strings to include, as they are.
      vocabulary: of the model.
      num_tokens: see :func:`over_tokens`.
      pattern: a regular expression that the whole text has to match as well.
      bad_words: strings that the text must not hold.
    """
    whole = regular.text() if pattern is None else regular.compile_regex(pattern)
    parts = [whole, *map(regular.including, phrases)]
    parts += map(regular.excluding, bad_words)
    return over_tokens(regular.intersection(parts), vocabulary, num_tokens)


def over_tokens(
    automaton: regular.ByteAutomaton, vocabulary: Any, num_tokens: int | None = None
) -> Automaton:
    """Runs an automaton over the tokens of a vocabulary.

    The language is that of ``vocabulary.decode``: SentencePiece's leading space goes,
    escapes are undone. Padding, unknown and sentinel ids are never allowed.

    Args:
      automaton: over the bytes of the decoded text.
      vocabulary: one of ``jaxalign.vocabularies``.
      num_tokens: rows of the model's embedding ``V``, if more than the vocabulary has.

    Raises:
      ValueError: when no sequence of tokens spells a text of the language.
    """
    if vocabulary.escapes:
        automaton = regular.through_escapes(automaton, *vocabulary.escapes)
    table, accepting = automaton
    size = len(accepting)
    spelt = vocabulary.token_bytes()
    num_tokens = max(num_tokens or 0, len(spelt))
    usable = np.array([i for i, raw in enumerate(spelt) if raw])
    # State 0: nothing but stripped spaces so far. Then the automaton's own states, then
    # the state behind EOS.
    end = size + 1
    targets = np.full((size + 2, num_tokens), regular.DEAD, np.int32)
    inside = walk(table, np.arange(size), [spelt[i] for i in usable])
    targets[1 : size + 1, usable] = np.where(inside >= 0, inside + 1, regular.DEAD)
    at_start = vocabulary.token_bytes(first=True)
    first = [at_start[i] for i in usable]
    begun = walk(table, np.zeros(1, np.int64), first)[0]
    begun = np.where(begun >= 0, begun + 1, regular.DEAD)
    empty = np.array([not raw for raw in first])
    targets[0, usable] = np.where(empty, 0, begun)
    targets[1 : size + 1, EOS_ID] = np.where(accepting, end, regular.DEAD)
    targets[0, EOS_ID] = end if accepting[0] else regular.DEAD
    return pack(targets, np.arange(size + 2) == end)


def pack(targets: np.ndarray, ends: np.ndarray) -> Automaton:
    """An :class:`Automaton` of a table over tokens.

    Args:
      targets: int32 ``[S, V]``, the next state or -1; state 0 is the start.
      ends: bool ``[S]``: where a response may stand as it is.

    Raises:
      ValueError: when no sequence of tokens leads from the start to an end.
    """
    columns, token_class = _classes(targets)
    distance = _distances(columns, ends)
    if distance[0] >= _FAR:
        raise ValueError(
            "No sequence of tokens of this vocabulary spells a text that meets the "
            "constraint."
        )
    columns = np.where(
        (columns >= 0) & (distance[columns] < _FAR), columns, regular.DEAD
    )
    # At least one more state than there are: the last one leads nowhere, and is what
    # -1 stands for.
    states = max(16, 1 << len(columns).bit_length())
    width = max(16, 1 << (columns.shape[1] - 1).bit_length())
    more = ((0, states - len(columns)), (0, width - columns.shape[1]))
    return Automaton(
        jnp.asarray(np.pad(columns, more, constant_values=regular.DEAD)),
        jnp.asarray(token_class),
        jnp.asarray(np.pad(distance, more[0], constant_values=_FAR)),
    )


def walk(table: np.ndarray, states: np.ndarray, spelt: list[bytes]) -> np.ndarray:
    """The state after each token from each state, int32 ``[states, tokens]``."""
    closed = np.vstack([table, np.full((1, 256), regular.DEAD, np.int32)])
    lengths = np.array([len(raw) for raw in spelt])
    order = np.argsort(-lengths, kind="stable")
    width = int(lengths.max(initial=0))
    raw = np.zeros((len(spelt), width), np.uint8)
    for row, i in enumerate(order):
        raw[row, : lengths[i]] = np.frombuffer(spelt[i], np.uint8)
    out = np.empty((len(states), len(spelt)), np.int32)
    rows = max(1, _CHUNK // max(len(spelt), 1))
    for start in range(0, len(states), rows):
        now = np.repeat(states[start : start + rows, None], len(spelt), axis=1)
        for at in range(width):
            longer = int(np.searchsorted(-lengths[order], -at, side="left"))
            now[:, :longer] = closed[now[:, :longer], raw[None, :longer, at]]
        out[start : start + rows, order] = now
    return out


def _classes(targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct columns ``[S, C]`` and the column of each token ``[V]``."""
    _, first, token_class = np.unique(
        np.ascontiguousarray(targets.T).view(f"V{4 * len(targets)}").ravel(),
        return_index=True,
        return_inverse=True,
    )
    return targets[:, first], token_class.astype(np.int32)


def _distances(columns: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The fewest tokens from each state to one of ``ends``; ``_FAR`` for never."""
    distance = np.where(ends, 0, _FAR).astype(np.int32)
    while True:
        via = np.where(columns >= 0, distance[columns], _FAR).min(axis=1) + 1
        better = np.minimum(distance, via)
        if (better == distance).all():
            return distance
        distance = better
