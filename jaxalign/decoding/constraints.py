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
    # What ends a text, the vocabulary's.
    eos_id: int = flax.struct.field(pytree_node=False, default=EOS_ID)

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
        end = table[state, token_class[self.eos_id]]
        return bool(distance[state] == 0 or distance[end] == 0)

    def allowed(self, state: jax.Array, remaining: jax.Array | int) -> jax.Array:
        """Which tokens may come next, bool ``[..., V]``, if so many may still come."""
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
    return must_include((), vocabulary, num_tokens, pattern=pattern)


def must_include(
    phrases: Sequence[str],
    vocabulary: Any,
    num_tokens: int | None = None,
    *,
    pattern: str | None = None,
    bad_words: Sequence[str] = (),
) -> Automaton:
    """Texts that hold every phrase, anywhere, in any order.

    A text is what ``vocabulary.decode`` gives: SentencePiece's leading space goes,
    escapes are undone. Padding, unknown and sentinel ids are never allowed.

    Args:
      phrases: strings to include, as they are.
      vocabulary: one of ``jaxalign.vocabularies``.
      num_tokens: rows of the model's embedding ``V``, if more than the vocabulary has.
      pattern: a regular expression that the whole text has to match as well.
      bad_words: strings that the text must not hold.

    Raises:
      ValueError: when no sequence of tokens spells such a text.
    """
    whole = regular.compile_regex("(?s:.)*" if pattern is None else pattern)
    automaton = regular.intersection(
        [whole, *map(regular.including, phrases), *map(regular.excluding, bad_words)]
    )
    if vocabulary.escapes:
        automaton = regular.through_escapes(automaton, *vocabulary.escapes)
    spelt = [raw or None for raw in vocabulary.token_bytes()]
    spelt += [None] * ((num_tokens or 0) - len(spelt))
    first = vocabulary.token_bytes(first=True)
    return from_bytes(*automaton, spelt, first, eos_id=vocabulary.eos_id)


def from_bytes(
    table: np.ndarray,
    accepting: np.ndarray,
    spelt: list[bytes | None],
    first: list[bytes | None],
    *,
    unfinished: bool = False,
    limit: int | None = None,
    eos_id: int = EOS_ID,
) -> Automaton:
    """Runs an automaton over bytes (`regular.ByteAutomaton`) over those of tokens.

    ``spelt`` has None where a token is never allowed, ``first`` the bytes of those that
    begin a text. An ``unfinished`` text that may end may also stand without EOS. The
    table over states and tokens has no more entries than ``limit``.
    """
    usable = np.array([i for i, raw in enumerate(spelt) if raw is not None])
    inside, begin = [spelt[i] for i in usable], [first[i] for i in usable]
    # State 0: no text yet. Then the states that tokens lead to, then the end.
    rows = [_walk(table, np.zeros(1, np.int64), begin)]
    found, fresh = np.zeros(0, np.int64), np.unique(rows[0][rows[0] >= 0])
    while fresh.size:
        found = np.concatenate([found, fresh])
        if limit is not None and len(found) * len(spelt) > limit:
            raise ValueError(
                f"The constraint needs a table of more than {limit} entries for "
                f"{len(spelt)} tokens: name fewer words, or shorter ones."
            )
        rows.append(_walk(table, fresh, inside))
        fresh = np.setdiff1d(rows[-1][rows[-1] >= 0], found)
    number = np.full(len(table) + 1, regular.DEAD, np.int32)  # -1 finds the last
    number[found] = np.arange(len(found)) + 1
    end = len(found) + 1
    targets = np.full((end + 1, len(spelt)), regular.DEAD, np.int32)
    targets[:end, usable] = number[np.concatenate(rows)]
    targets[0, usable[[not raw for raw in begin]]] = 0
    ends = np.concatenate([accepting[:1], accepting[found], [True]])
    targets[:end, eos_id] = np.where(ends[:end], end, regular.DEAD)
    _, kept, token_class = np.unique(
        np.ascontiguousarray(targets.T).view(f"V{4 * len(targets)}").ravel(),
        return_index=True,
        return_inverse=True,
    )
    columns = targets[:, kept]
    distance = _distances(columns, ends if unfinished else np.arange(end + 1) == end)
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
        jnp.asarray(token_class.astype(np.int32)),
        jnp.asarray(np.pad(distance, more[0], constant_values=_FAR)),
        eos_id,
    )


def _walk(table: np.ndarray, states: np.ndarray, spelt: list[bytes]) -> np.ndarray:
    """The state after each token from each state, int32 ``[states, tokens]``."""
    closed = np.vstack([table, np.full((1, 256), regular.DEAD, np.int32)])
    lengths = np.array([len(raw) for raw in spelt])
    width = int(lengths.max(initial=0))
    padded = b"".join(raw.ljust(width, b"\0") for raw in spelt)
    raw = np.frombuffer(padded, np.uint8).reshape(len(spelt), width)
    out = np.repeat(states[:, None].astype(np.int32), len(spelt), axis=1)
    rows = max(1, _CHUNK // max(len(spelt), 1))
    for start in range(0, len(states), rows):
        now = out[start : start + rows]
        for at in range(width):
            longer = np.flatnonzero(lengths > at)
            now[:, longer] = closed[now[:, longer], raw[longer, at]]
    return out


def _distances(columns: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The fewest tokens from each state to one of ``ends``; ``_FAR`` for never."""
    distance = np.where(ends, 0, _FAR).astype(np.int32)
    while True:
        via = np.where(columns >= 0, distance[columns], _FAR).min(axis=1) + 1
        better = np.minimum(distance, via)
        if (better == distance).all():
            return distance
        distance = better
