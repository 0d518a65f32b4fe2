"""The decode loop: what runs on the devices.

``G`` groups of ``S`` slots decode in step. A group holds one prompt, whose
cross-attention keys and values its slots share without copies; a slot holds one of the
prompt's ``N`` samples. A slot whose sample has ended takes the prompt's next one inside
the loop; a group whose samples have all ended is given another prompt by `admit`.

Slots stand at different positions of their responses, and yet all of them write the
same column of the self-attention cache in a step: the cache is a ring over steps, and
T5's position bias depends on distances only (``T5.decode_step``'s ``cursor``).

Of the model it uses ``encode``, ``cross_key_values``, ``init_self_cache`` and
``decode_step`` only.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp

from jaxalign.decoding import history as histories
from jaxalign.decoding.sampling import (
    EOS_ID,
    PAD_ID,
    START_ID,
    RowSettings,
    Sampling,
    sample,
)


class Constraint(Protocol):
    """Which tokens may come next: a pytree whose leaves are its tables.

    Register the class with ``jax.tree_util.register_dataclass``. States are pytrees
    with one entry a row; the methods take and return any leading shape ``[...]``.
    """

    def start(self) -> Any:
        """The state of one row before its first token; arrays without row axes."""

    def allowed(self, state: Any, remaining: jax.Array) -> jax.Array:
        """Bool ``[..., V]``: tokens that may come next. All False ends the row.

        Args:
          state: of the rows.
          remaining: int32 ``[...]``, tokens that may still come, EOS included.
        """

    def advance(self, state: Any, tokens: jax.Array) -> Any:
        """The states after ``tokens`` int32 ``[...]``."""


class Samples(NamedTuple):
    """Sampled responses; masks follow from ``lengths``, never from token values.

    Attributes:
      tokens: int32 ``[B, N, T]``: the response up to its EOS, then 0.
      logps: float32 ``[B, N, T]``, the model's full, untempered log-probability of each
        token, EOS included; 0 after it.
      sampler_logps: float32 ``[B, N, T]``, under the distribution that tokens were
        drawn from; 0 after EOS and for the tokens of a forced prefix.
      lengths: int32 ``[B, N]`` tokens, EOS included; ``T`` where none came.
      entropies: float32 ``[B, N, T]`` of the full distribution, in nats, or None.
    """

    tokens: jax.Array
    logps: jax.Array
    sampler_logps: jax.Array
    lengths: jax.Array
    entropies: jax.Array | None = None


class Requests(NamedTuple):
    """Prompts and what is asked of each; arrays over ``R`` prompts.

    Attributes:
      tokens: int32 ``[R, Le]``, right-padded with 0. A row of zeros is no prompt.
      keys: typed PRNG keys ``[R]``: sample ``n`` draws from ``fold_in(key, n)``.
      num_samples: int32 ``[R]``, at most ``N``.
      max_new_tokens: int32 ``[R]``, at most ``T``.
      prefixes: int32 ``[R, N, T]``: tokens that responses begin with, then 0; None
        where there are none.
      prefix_lengths: int32 ``[R, N]`` or None.
      settings: temperature and top-p of each, ``[R]``; None takes the rules'.
    """

    tokens: jax.Array
    keys: jax.Array
    num_samples: jax.Array
    max_new_tokens: jax.Array
    prefixes: jax.Array | None = None
    prefix_lengths: jax.Array | None = None
    settings: RowSettings | None = None


class Groups(NamedTuple):
    """All that belongs to a prompt; every leaf has the axis ``[G]`` first."""

    encoder_mask: jax.Array  # [G, Le]
    cross_kv: Any
    keys: jax.Array  # [G]
    num_samples: jax.Array  # [G]; 0: no prompt
    max_new_tokens: jax.Array  # [G]
    prefix_lengths: jax.Array | None  # [G, N]
    settings: RowSettings | None  # [G]
    next_sample: jax.Array  # [G] samples given to a slot so far
    sample: jax.Array  # [G, S] the sample a slot works on
    position: jax.Array  # [G, S] tokens it has
    inputs: jax.Array  # [G, S] the last of them
    ended: jax.Array  # [G, S] nothing to do
    history: histories.History  # [G, S, ...]
    constraint: Any  # [G, S, ...] states
    samples: Samples  # [G, N, T]; begins with the forced prefixes


class State(NamedTuple):
    """The loop between two steps."""

    cursor: jax.Array  # scalar, steps so far
    cache: Any  # [G, S, H, T, D] per layer; [G, H, T, D] where S is 1
    groups: Groups


def apply(model: Any, params: Any, method: str, *args: Any) -> Any:
    """Calls one of the model's decoding methods."""
    return model.apply({"params": params}, *args, method=method)


def encode(model: Any, params: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
    """The mask ``[B, Le]`` and the cross-attention keys and values of prompts."""
    mask = (tokens != PAD_ID).astype(jnp.int32)
    encoded = apply(model, params, "encode", tokens, mask)
    return mask, apply(model, params, "cross_key_values", encoded)


def new_groups(
    model: Any,
    params: Any,
    requests: Requests,
    *,
    slots: int,
    num_samples: int,
    length: int,
    rules: Sampling,
    constraint: Constraint | None = None,
    entropy: bool = False,
) -> Groups:
    """Encodes prompts and seats their first samples.

    Args:
      model: the network.
      params: its parameters.
      requests: ``R`` of them.
      slots: ``S``.
      num_samples: ``N``, the most that a request may ask for.
      length: ``T``, the longest response.
      rules: of sampling.
      constraint: tokens that may come next, or None.
      entropy: record entropies.

    Returns:
      ``Groups`` with ``G = R``.
    """
    count = requests.tokens.shape[0]
    chex.assert_shape([requests.num_samples, requests.max_new_tokens], (count,))
    rows, shape = (count, slots), (count, num_samples, length)
    mask, cross_kv = encode(model, params, requests.tokens)
    wanted = jnp.where(jnp.any(mask, axis=1), requests.num_samples, 0)
    sample_index = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), rows)
    vocab_size = model.config.vocab_size if rules.repetition_penalty != 1.0 else None
    states = None
    if constraint is not None:
        states = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (*rows, *jnp.shape(x))), constraint.start()
        )
    tokens = requests.prefixes
    if tokens is None:
        tokens = jnp.full(shape, PAD_ID, jnp.int32)
    chex.assert_shape(tokens, shape)

    def zeros():
        return jnp.zeros(shape, jnp.float32)

    return Groups(
        encoder_mask=mask,
        cross_kv=cross_kv,
        keys=requests.keys,
        num_samples=wanted,
        max_new_tokens=requests.max_new_tokens,
        prefix_lengths=requests.prefix_lengths,
        settings=requests.settings,
        next_sample=jnp.minimum(wanted, slots),
        sample=sample_index,
        position=jnp.zeros(rows, jnp.int32),
        inputs=jnp.full(rows, START_ID, jnp.int32),
        ended=sample_index >= wanted[:, None],
        history=histories.empty(rows, vocab_size, rules),
        constraint=states,
        samples=Samples(
            tokens=tokens,
            logps=zeros(),
            sampler_logps=zeros(),
            lengths=jnp.zeros(shape[:2], jnp.int32),
            entropies=zeros() if entropy else None,
        ),
    )


def begin(model: Any, groups: Groups) -> State:
    """The state before the first step."""
    count, slots = groups.ended.shape
    length = groups.samples.tokens.shape[2]
    cache = model.init_self_cache(count, slots, length)
    return State(jnp.int32(0), _without_axis(cache, slots), groups)


def _without_axis(cache: Any, slots: int) -> Any:
    """The model's cache as it lies between steps.

    XLA's CPU compiler orders an axis of one as it likes, and then copies the whole
    cache from one order into the other at every step.
    """
    return jax.tree.map(lambda x: x.squeeze(1), cache) if slots == 1 else cache


def _with_axis(cache: Any, slots: int) -> Any:
    return jax.tree.map(lambda x: jnp.expand_dims(x, 1), cache) if slots == 1 else cache


def seat(state: State, new: Groups, where: jax.Array) -> State:
    """Puts the ``R`` groups of ``new`` into the places ``where [R]``.

    A place outside ``[0, G)`` drops the group. The cache needs no clearing: what is
    older than a row's first token is masked.
    """
    groups = jax.tree.map(
        lambda old, x: old.at[where].set(x, mode="drop"), state.groups, new
    )
    return state._replace(groups=groups)


def free_groups(groups: Groups) -> jax.Array:
    """Bool ``[G]``: no slot is at work, and no sample waits."""
    return jnp.all(groups.ended, axis=1) & (groups.next_sample >= groups.num_samples)


def drop(groups: Groups, where: jax.Array) -> Groups:
    """Ends all samples of the groups ``where`` bool ``[G]``."""
    waiting = jnp.where(where, groups.num_samples, groups.next_sample)
    return groups._replace(ended=groups.ended | where[:, None], next_sample=waiting)


def end(
    groups: Groups, where: jax.Array, constraint: Constraint | None = None
) -> Groups:
    """Ends samples where they stand; their slots take the prompts' next ones.

    Args:
      groups: of the state.
      where: bool ``[G, N]``: samples; those without a slot are left alone.
      constraint: as given to `new_groups`.
    """
    here = jnp.take_along_axis(where, groups.sample, axis=1) & ~groups.ended
    return _refill(groups._replace(ended=groups.ended | here), constraint)


def run(
    model: Any,
    params: Any,
    state: State,
    rules: Sampling,
    constraint: Constraint | None = None,
    *,
    max_steps: jax.Array | int | None = None,
    stop_when_free: jax.Array | int | None = None,
) -> State:
    """Steps until all samples have ended.

    Args:
      model: the network.
      params: its parameters.
      state: its cache is overwritten where the caller donates it.
      rules: of sampling.
      constraint: as given to `new_groups`.
      max_steps: return after so many steps.
      stop_when_free: return when so many groups are free.
    """
    first = state.cursor

    def unfinished(state: State) -> jax.Array:
        go_on = jnp.any(~state.groups.ended)
        if max_steps is not None:
            go_on &= state.cursor - first < max_steps
        if stop_when_free is not None:
            go_on &= jnp.sum(free_groups(state.groups)) < stop_when_free
        return go_on

    return jax.lax.while_loop(
        unfinished, lambda state: step(model, params, state, rules, constraint), state
    )


def step(
    model: Any,
    params: Any,
    state: State,
    rules: Sampling,
    constraint: Constraint | None,
) -> State:
    """One token for every slot at work, then new samples for those that ended."""
    groups, old = state.groups, state.groups.samples
    count, slots = groups.ended.shape
    logits, cache = apply(
        model,
        params,
        "decode_step",
        groups.inputs,
        groups.position,
        _with_axis(state.cache, slots),
        groups.cross_kv,
        groups.encoder_mask,
        state.cursor,
    )
    of_group = jnp.broadcast_to(jnp.arange(count)[:, None], (count, slots))
    forced = None
    if groups.prefix_lengths is not None:
        inside = groups.position < groups.prefix_lengths[of_group, groups.sample]
        planned = old.tokens[of_group, groups.sample, groups.position]
        forced = jnp.where(inside, planned, -1)
    ruled = None
    if rules.looks_back or constraint is not None:
        allowed = None
        if constraint is not None:
            remaining = groups.max_new_tokens[:, None] - groups.position
            allowed = constraint.allowed(groups.constraint, remaining)
        ruled = histories.apply_rules(
            logits, rules, groups.history, groups.position, allowed
        )
    draw = sample(
        logits,
        _keys(groups),
        rules,
        ruled=ruled,
        forced=forced,
        entropy=old.entropies is not None,
        rows=jax.tree.map(
            lambda x: jnp.broadcast_to(x[:, None], (count, slots)), groups.settings
        ),
    )
    alive = ~groups.ended
    tokens = jnp.where(alive, draw.tokens, PAD_ID)

    # Slots without work write outside of the array, which drops it.
    row = jnp.where(alive, groups.sample, old.tokens.shape[1])

    def write(array, values):
        place = array.at[of_group, row, groups.position]
        return place.set(values.astype(array.dtype), mode="drop")

    samples = Samples(
        tokens=write(old.tokens, tokens),
        logps=write(old.logps, draw.logps),
        sampler_logps=write(old.sampler_logps, draw.sampler_logps),
        lengths=old.lengths.at[of_group, row].set(groups.position + 1, mode="drop"),
        entropies=None
        if old.entropies is None
        else write(old.entropies, draw.entropies),
    )
    history = histories.extend(groups.history, tokens)
    ends = (tokens == EOS_ID) | histories.stopped(history, rules)
    if forced is not None:
        ends &= forced < 0
    position = groups.position + alive
    ends |= position >= groups.max_new_tokens[:, None]
    constraint_state = groups.constraint
    if constraint is not None:
        constraint_state = constraint.advance(constraint_state, tokens)
    groups = groups._replace(
        position=position,
        inputs=tokens,
        ended=groups.ended | ends,
        history=history,
        constraint=constraint_state,
        samples=samples,
    )
    cache = _without_axis(cache, slots)
    return State(state.cursor + 1, cache, _refill(groups, constraint))


def _keys(groups: Groups) -> jax.Array:
    """One key per slot, a function of (prompt's key, sample, position) only."""
    per_sample = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
    per_token = jax.vmap(jax.vmap(jax.random.fold_in))
    return per_token(per_sample(groups.keys, groups.sample), groups.position)


def _refill(groups: Groups, constraint: Constraint | None) -> Groups:
    """Gives slots that ended their prompt's next samples."""
    slots, num_samples = groups.ended.shape[1], groups.samples.tokens.shape[1]
    position = jnp.where(groups.ended, 0, groups.position)
    if slots >= num_samples:  # every sample has had its slot from the start
        return groups._replace(position=position)
    nth = jnp.cumsum(groups.ended, axis=1) - 1
    following = groups.next_sample[:, None] + nth
    takes = groups.ended & (following < groups.num_samples[:, None])
    states = groups.constraint
    if constraint is not None:

        def restart(state, start):
            takes_ = takes.reshape(*takes.shape, *[1] * (state.ndim - 2))
            return jnp.where(takes_, start, state)

        states = jax.tree.map(restart, states, constraint.start())
    return groups._replace(
        position=position,
        sample=jnp.where(takes, following, groups.sample),
        inputs=jnp.where(takes, START_ID, groups.inputs),
        ended=groups.ended & ~takes,
        next_sample=groups.next_sample + jnp.sum(takes, axis=1),
        history=histories.restart(groups.history, takes),
        constraint=states,
    )
