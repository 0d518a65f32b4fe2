"""Beam search and diverse beam search.

Token for token what Hugging Face's ``generate`` does: of the best ``2 K`` continuations
of the ``K`` running beams those that end among the first ``K`` compete for the ``K``
finished places by normalised score, the best ``K`` that go on run on.

Diverse beam search (Vijayakumar et al. 2016, arXiv 1610.02424) runs ``num_groups`` such
searches side by side; a group's log-probabilities, and so its scores, are lowered by
``diversity_penalty`` for each time a group before it took the token at this step.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.decoding import history as histories
from jaxalign.decoding import network
from jaxalign.decoding.checks import check_sizes
from jaxalign.decoding.rules import PAD_ID, START_ID, Constraint, Sampling

_NEVER = -1e9


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """How to search.

    Attributes:
      num_beams: ``K``, over all groups.
      length_penalty: the exponent ``alpha`` of the normalisation; 0 is none.
      normalization: a finished beam's score is its log-probability divided by
        ``length ** alpha`` (``"length"``, Hugging Face's) or by
        ``((5 + length) / 6) ** alpha`` (``"brevity"``, Wu et al. 2016, arXiv
        1609.08144, equation 14; T5X's), EOS counted.
      early_stopping: True ends a search at ``K`` finished beams; False when no running
        beam would beat the worst of them at its present length (a heuristic, Hugging
        Face's default); ``"never"`` when none could at the length that suits it best.
      num_groups: of diverse beam search; 1 is plain beam search.
      diversity_penalty: for each earlier group that took a token.
      rules: the repetition penalty, bad words, ``min_new_tokens`` and ``eos_id`` of a
        `Sampling`, applied to log-probabilities; its other fields do not apply.

    >>> BeamSearch(num_beams=4).normalization
    'length'
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    normalization: str = "length"
    early_stopping: bool | str = False
    num_groups: int = 1
    diversity_penalty: float = 0.0
    rules: Sampling = dataclasses.field(default_factory=Sampling)

    def __post_init__(self):
        check_sizes(num_beams=self.num_beams, num_groups=self.num_groups)
        if self.num_beams % self.num_groups:
            raise ValueError(
                f"num_beams={self.num_beams} must be a multiple of "
                f"num_groups={self.num_groups}."
            )

        def check(name: str, fits: bool, what: str) -> None:
            if not fits:
                raise ValueError(f"{name} {what}, got {getattr(self, name)!r}.")

        fits = self.normalization in ("length", "brevity")
        check("normalization", fits, "must be 'length' or 'brevity' (T5X's)")
        fits = self.early_stopping in (True, False, "never")
        check("early_stopping", fits, "must be True, False or 'never'")
        fits = self.diversity_penalty >= 0.0 and self.num_groups > 1
        fits |= self.diversity_penalty == 0.0
        check("diversity_penalty", fits, "must be >= 0 and needs num_groups > 1")
        if self.rules.stop_sequences or self.rules.length_penalty:
            raise ValueError(
                "Beam search ends at EOS only and normalises by length itself: leave "
                "out stop_sequences and length_penalty of its rules."
            )

    def normalizer(self, length: jax.Array | float) -> jax.Array:
        """What the log-probability of a beam of ``length`` tokens is divided by."""
        length = jnp.asarray(length, jnp.float32)
        if self.normalization == "brevity":
            length = (5.0 + length) / 6.0
        return length**self.length_penalty


class Beams(NamedTuple):
    """The ``R`` best beams of each prompt, best first."""

    tokens: jax.Array  # int32 ``[B, R, T]``, EOS included, then 0
    scores: jax.Array  # float32 ``[B, R]``, normalised log-probabilities
    # int32 ``[B, R]``; 0 where the search ended with fewer beams (their score is about
    # -1e9)
    lengths: jax.Array


class _Group(NamedTuple):
    """One group's search; ``k`` beams."""

    running: jax.Array  # [B, k, T]
    running_scores: jax.Array  # [B, k] sums of log-probabilities
    best: Beams  # that have ended; k of them
    finished: jax.Array  # [B, k] which of those there are
    improvable: jax.Array  # [B]


class _Carry(NamedTuple):
    position: jax.Array
    go_on: jax.Array
    inputs: jax.Array  # [B, K]
    groups: tuple[_Group, ...]
    history: histories.History
    constraint: Any  # [B, K, ...] states
    cache: Any


def beam_search(
    model: Any,
    params: Any,
    encoder_input_tokens: jax.Array | np.ndarray,
    *,
    max_new_tokens: int,
    search: BeamSearch,
    num_return: int = 1,
    constraint: Constraint | None = None,
) -> Beams:
    """Searches the most probable responses to each prompt.

    Compiled once per model, shapes and search. Rows do not depend on each other.
    Arguments that are not named here are those of `jaxalign.decoding.generate`.

    Args:
      search: the rules.
      num_return: ``R``, how many beams to return of each prompt (n-best); groups of a
        diverse search are merged by score.
      constraint: which tokens may come next.
    """
    if not 1 <= num_return <= search.num_beams:
        raise ValueError(
            f"num_return must lie in [1, num_beams={search.num_beams}], got "
            f"{num_return}."
        )
    check_sizes(max_new_tokens=max_new_tokens)
    beams = _search(
        model,
        params,
        jnp.asarray(encoder_input_tokens, jnp.int32),
        constraint,
        length=int(max_new_tokens),
        search=search,
    )
    return jax.tree.map(lambda x: x[:, :num_return], beams)


@functools.partial(jax.jit, static_argnames=("model", "length", "search"))
def _search(
    model: Any,
    params: Any,
    encoder_input_tokens: jax.Array,
    constraint: Constraint | None,
    *,
    length: int,
    search: BeamSearch,
) -> Beams:
    chex.assert_rank(encoder_input_tokens, 2)
    batch, beams = encoder_input_tokens.shape[0], search.num_beams
    size = beams // search.num_groups
    rules = search.rules
    mask, cross_kv = network.encode(model, params, encoder_input_tokens)

    def step(carry: _Carry) -> _Carry:
        args = carry.inputs, carry.position, carry.cache, cross_kv, mask
        logits, cache = network.apply(model, params, "decode_step", *args)
        logps = jax.nn.log_softmax(logits, axis=-1)
        allowed = None
        if constraint is not None:
            remaining = jnp.full((batch, beams), length - carry.position, jnp.int32)
            allowed = constraint.allowed(carry.constraint, remaining)
        logps = histories.apply_rules(
            logps, rules, carry.history, carry.position, allowed
        )
        groups, taken, parents, ended = [], [], [], []
        for g, group in enumerate(carry.groups):
            own = logps[:, g * size : (g + 1) * size]
            if search.diversity_penalty and taken:
                before = jnp.concatenate(taken, axis=1)
                counts = jnp.sum(jax.nn.one_hot(before, own.shape[-1]), axis=1)
                own = own - search.diversity_penalty * counts[:, None]
            group, tokens, parent, done = _advance(group, own, carry.position, search)
            groups.append(group)
            taken.append(tokens)
            parents.append(parent + g * size)
            ended.append(done)
        inputs = jnp.concatenate(taken, axis=1)
        history, states, cache = network.take_rows(
            (carry.history, carry.constraint, cache), jnp.concatenate(parents, axis=1)
        )
        if constraint is not None:
            states = constraint.advance(states, inputs)
        return _Carry(
            position=carry.position + 1,
            go_on=~jnp.all(jnp.stack(ended)),
            inputs=inputs,
            groups=tuple(groups),
            history=histories.extend(history, inputs),
            constraint=states,
            cache=cache,
        )

    shape = (batch, size, length)
    # Only one of the equal first beams counts.
    alone = jnp.where(jnp.arange(size) == 0, 0.0, _NEVER)
    group = _Group(
        running=jnp.full(shape, PAD_ID, jnp.int32),
        running_scores=jnp.broadcast_to(alone, shape[:2]),
        best=Beams(
            jnp.full(shape, PAD_ID, jnp.int32),
            jnp.full(shape[:2], _NEVER),
            jnp.zeros(shape[:2], jnp.int32),
        ),
        finished=jnp.zeros(shape[:2], bool),
        improvable=jnp.any(mask, axis=1),
    )
    start = _Carry(
        position=jnp.int32(0),
        go_on=jnp.bool_(True),
        inputs=jnp.full((batch, beams), START_ID, jnp.int32),
        groups=(group,) * search.num_groups,
        history=histories.empty((batch, beams), rules, model),
        constraint=constraint and network.repeat(constraint.start(), (batch, beams)),
        cache=model.init_self_cache(batch, beams, length),
    )
    groups = jax.lax.while_loop(lambda carry: carry.go_on, step, start).groups
    merged = _side_by_side(*(group.best for group in groups))
    return _best(merged, merged.scores, beams)


def _side_by_side(*trees: Any) -> Any:
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *trees)


def _best(tree: Any, scores: jax.Array, count: int) -> Any:
    """The ``count`` entries of axis 1 with the highest scores, in order."""
    return network.take_rows(tree, jax.lax.top_k(scores, count)[1])


def _advance(
    group: _Group, logps: jax.Array, position: jax.Array, search: BeamSearch
) -> tuple[_Group, jax.Array, jax.Array, jax.Array]:
    """One step of one group, from ``logps [B, k, V]``.

    Returns the group, the tokens ``[B, k]`` and parents ``[B, k]`` of its running
    beams, and a scalar: no row can get better.
    """
    batch, size, vocab = logps.shape
    length = group.running.shape[2]
    total = logps + group.running_scores[:, :, None]
    scores, index = jax.lax.top_k(total.reshape(batch, -1), 2 * size)
    parents, tokens = index // vocab, index % vocab
    sequences = network.take_rows(group.running, parents)
    sequences = jax.lax.dynamic_update_index_in_dim(sequences, tokens, position, 2)
    ends = (tokens == search.rules.eos_id) | (position + 1 >= length)

    # The best that go on.
    run_on = scores + jnp.where(ends, _NEVER, 0.0)
    running, running_scores, inputs, parents = _best(
        (sequences, run_on, tokens, parents), run_on, size
    )

    # The best that have ended, among the first k candidates only.
    ended = ends & (jnp.arange(2 * size) < size)
    closed = ~group.improvable
    if search.early_stopping is True:
        closed |= jnp.all(group.finished, axis=1)
    normalised = scores / search.normalizer(position + 1)
    normalised += jnp.where(ended & ~closed[:, None], 0.0, _NEVER)
    lengths = jnp.broadcast_to(position + 1, normalised.shape)
    merged = _side_by_side(
        (group.best, group.finished), (Beams(sequences, normalised, lengths), ended)
    )
    best, finished = _best(merged, merged[0].scores, size)

    reach = position + 1
    if search.early_stopping == "never" and search.length_penalty > 0.0:
        reach = length
    hope = running_scores[:, :1] / search.normalizer(reach)
    worst = jnp.where(finished, jnp.min(best.scores, axis=1, keepdims=True), _NEVER)
    improvable = group.improvable & jnp.any(hope > worst, axis=1)
    closed = ~improvable | jnp.all(ends, axis=1)
    if search.early_stopping is True:
        closed |= jnp.all(finished, axis=1)
    best = best._replace(lengths=jnp.where(best.scores > _NEVER / 2, best.lengths, 0))
    group = _Group(running, running_scores, best, finished, improvable)
    return group, inputs, parents, jnp.all(closed)
