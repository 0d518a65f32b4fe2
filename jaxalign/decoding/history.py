"""Rules that depend on the tokens so far: penalties, bad words, stop sequences.

They apply to the raw logits, before temperature and truncation, as Hugging Face's
logits processors do and in the same order. What a row has to remember is a `History`,
whose parts exist only where a rule needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.decoding import network
from jaxalign.decoding.rules import START_ID, Sampling


class History(NamedTuple):
    """What rows remember of their tokens."""

    # int32 ``[..., L]``, the last ``L`` inputs, oldest first, -1 before the first;
    # ``L`` is what the longest bad word or stop sequence needs.
    recent: jax.Array
    # bool ``[..., V]``, the inputs so far, the start token among them; None without a
    # repetition penalty.
    seen: jax.Array | None


def _start(size: int, vocab_size: int | None) -> History:
    """Of one row that has its start token only."""
    recent = jnp.where(jnp.arange(size) == size - 1, START_ID, -1).astype(jnp.int32)
    seen = None if vocab_size is None else jnp.arange(vocab_size) == START_ID
    return History(recent, seen)


def empty(rows: tuple[int, ...], rules: Sampling, model: Any) -> History:
    """The history of rows of a shape that have their start token only."""
    words = [len(word) - 1 for word in rules.bad_words]
    size = max([0, *words, *map(len, rules.stop_sequences)])
    vocab_size = model.config.vocab_size if rules.repetition_penalty != 1.0 else None
    return network.repeat(_start(size, vocab_size), rows)


def extend(history: History, tokens: jax.Array) -> History:
    """The history after ``tokens`` ``[...]``."""
    recent, seen = history
    if recent.shape[-1]:
        recent = jnp.concatenate([recent[..., 1:], tokens[..., None]], axis=-1)
    if seen is not None:
        seen = seen | (tokens[..., None] == jnp.arange(seen.shape[-1]))
    return History(recent, seen)


def restart(history: History, rows: jax.Array) -> History:
    """Forgets the tokens of ``rows``, bool ``[...]``."""
    vocab_size = None if history.seen is None else history.seen.shape[-1]
    return jax.tree.map(
        lambda start, now: jnp.where(rows[..., None], start, now),
        _start(history.recent.shape[-1], vocab_size),
        history,
    )


def _ends_with(recent: jax.Array, sequence: Sequence[int]) -> jax.Array:
    tail = recent[..., recent.shape[-1] - len(sequence) :]
    return jnp.all(tail == jnp.asarray(sequence, jnp.int32), axis=-1)


def stopped(history: History, rules: Sampling) -> jax.Array:
    """Whether the tokens so far end with a stop sequence, ``[...]``."""
    found = jnp.zeros(history.recent.shape[:-1], bool)
    for sequence in rules.stop_sequences:
        found |= _ends_with(history.recent, sequence)
    return found


def apply_rules(
    logits: jax.Array,
    rules: Sampling,
    history: History | None = None,
    position: jax.Array | None = None,
    allowed: jax.Array | None = None,
) -> jax.Array:
    """Logits ``[..., V]`` after the rules that look back; ``-inf`` where ruled out.

    Args:
      logits: float32 ``[..., V]``, the model's own.
      rules: the repetition penalty (Keskar et al. 2019, arXiv 1909.05858: a seen
        token's logit is divided by the penalty where positive, multiplied where
        negative), bad words, ``min_new_tokens`` and the length penalty.
      history: of the rows; needed where a rule uses it.
      position: int32 ``[...]`` or scalar, tokens of the response so far.
      allowed: bool ``[..., V]``: tokens that may come next. Where none may, the
        response can only end: EOS is what remains.
    """
    tokens = jnp.arange(logits.shape[-1])
    if rules.repetition_penalty != 1.0:
        factor = jnp.float32(rules.repetition_penalty)
        less = jnp.where(logits < 0, logits * factor, logits / factor)
        logits = jnp.where(history.seen, less, logits)
    for *before, last in rules.bad_words:
        completed = _ends_with(history.recent, before)[..., None]
        logits = jnp.where(completed & (tokens == last), -jnp.inf, logits)
    if rules.min_new_tokens:
        early = jnp.asarray(position < rules.min_new_tokens)[..., None]
        logits = jnp.where(early & (tokens == rules.eos_id), -jnp.inf, logits)
    if allowed is not None:
        some = jnp.any(allowed & (logits > -jnp.inf), axis=-1, keepdims=True)
        only_eos = jnp.where(tokens == rules.eos_id, 0.0, -jnp.inf)
        logits = jnp.where(some, jnp.where(allowed, logits, -jnp.inf), only_eos)
    if rules.length_penalty is not None:
        start, factor = rules.length_penalty
        over = jnp.maximum(position - start, 0)[..., None].astype(jnp.float32)
        more = logits + jnp.abs(logits) * (jnp.float32(factor) ** over - 1.0)
        # -inf times 0 is NaN: what is ruled out stays so.
        raised = (tokens == rules.eos_id) & (over > 0) & (logits > -jnp.inf)
        logits = jnp.where(raised, more, logits)
    return logits
