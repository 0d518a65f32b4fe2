"""The decode loop: what runs on the devices, token by token.

Slots (``jaxalign.decoding.groups``) stand at different positions of their responses,
and yet all of them write the same column of the self-attention cache in a step: the
cache is a ring over steps, and T5's position bias depends on distances only
(``T5.decode_step``'s ``cursor``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.decoding import groups as grouping
from jaxalign.decoding import history as histories
from jaxalign.decoding import network
from jaxalign.decoding.groups import Groups, Plan, Samples
from jaxalign.decoding.rules import PAD_ID, Constraint
from jaxalign.decoding.sampling import sample


class State(NamedTuple):
    """The loop between two steps."""

    cursor: jax.Array  # scalar, steps so far
    cache: Any  # [G, S, H, T, D] per layer; [G, H, T, D] where S is 1
    groups: Groups


def begin(plan: Plan, groups: Groups) -> State:
    """The state before the first step."""
    count, slots = groups.ended.shape
    cache = plan.model.init_self_cache(count, slots, plan.length)
    return State(jnp.int32(0), _without_axis(cache, slots), groups)


def _without_axis(cache: Any, slots: int) -> Any:
    """The model's cache as it lies between steps.

    XLA's CPU compiler orders an axis of one as it likes, and then copies the whole
    cache from one order into the other at every step.
    """
    return jax.tree.map(lambda x: x.squeeze(1), cache) if slots == 1 else cache


def _with_axis(cache: Any, slots: int) -> Any:
    return jax.tree.map(lambda x: jnp.expand_dims(x, 1), cache) if slots == 1 else cache


def run(
    plan: Plan,
    params: Any,
    state: State,
    constraint: Constraint | None,
    *,
    max_steps: jax.Array | None = None,
    stop_when_free: jax.Array | None = None,
) -> State:
    """Steps until all samples have ended, or what is given of two limits is reached.

    `max_steps` counts steps, `stop_when_free` groups that are free.
    """
    first = state.cursor

    def unfinished(state: State) -> jax.Array:
        go_on = jnp.any(~state.groups.ended)
        if max_steps is not None:
            go_on &= state.cursor - first < max_steps
        if stop_when_free is not None:
            go_on &= jnp.sum(grouping.free(state.groups)) < stop_when_free
        return go_on

    return jax.lax.while_loop(
        unfinished, lambda state: _step(plan, params, state, constraint), state
    )


def _step(
    plan: Plan, params: Any, state: State, constraint: Constraint | None
) -> State:
    """One token for every slot at work, then new samples for those that ended."""
    groups, old, rules = state.groups, state.groups.samples, plan.rules
    count, slots = groups.ended.shape
    cache = _with_axis(state.cache, slots)
    args = groups.inputs, groups.position, cache, groups.cross_kv, groups.encoder_mask
    logits, cache = network.apply(
        plan.model, params, "decode_step", *args, state.cursor
    )
    of_group = jnp.broadcast_to(jnp.arange(count)[:, None], (count, slots))
    forced = None
    if groups.prefix_lengths is not None:
        inside = groups.position < groups.prefix_lengths[of_group, groups.sample]
        planned = old.tokens[of_group, groups.sample, groups.position]
        forced = jnp.where(inside, planned, -1)
    allowed = None
    if constraint is not None:
        remaining = groups.max_new_tokens[:, None] - groups.position
        allowed = constraint.allowed(groups.constraint, remaining)
    draw = sample(
        logits,
        _keys(groups),
        rules,
        ruled=histories.apply_rules(
            logits, rules, groups.history, groups.position, allowed
        ),
        forced=forced,
        entropy=plan.entropy,
        rows=jax.tree.map(
            lambda x: jnp.broadcast_to(x[:, None], (count, slots)), groups.settings
        ),
    )
    alive = ~groups.ended
    tokens = jnp.where(alive, draw.tokens, PAD_ID)

    # Slots without work write outside of the array, which drops it.
    row = jnp.where(alive, groups.sample, plan.num_samples)

    def write(array, values):
        at = array.at[of_group, row, groups.position]
        return at.set(values.astype(array.dtype), mode="drop")

    samples = Samples(
        tokens=write(old.tokens, tokens),
        logps=write(old.logps, draw.logps),
        sampler_logps=write(old.sampler_logps, draw.sampler_logps),
        lengths=old.lengths.at[of_group, row].set(groups.position + 1, mode="drop"),
        entropies=write(old.entropies, draw.entropies) if plan.entropy else None,
    )
    history = histories.extend(groups.history, tokens)
    ends = (tokens == rules.eos_id) | histories.stopped(history, rules)
    if forced is not None:
        ends &= forced < 0
    position = groups.position + alive
    ends |= position >= groups.max_new_tokens[:, None]
    states = groups.constraint
    if constraint is not None:
        states = constraint.advance(states, tokens)
    groups = groups._replace(
        position=position,
        inputs=tokens,
        ended=groups.ended | ends,
        history=history,
        constraint=states,
        samples=samples,
    )
    groups = grouping.refill(groups, constraint)
    return State(state.cursor + 1, _without_axis(cache, slots), groups)


def _keys(groups: Groups) -> jax.Array:
    """One key per slot, a function of (prompt's key, sample, position) only."""
    per_sample = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
    per_token = jax.vmap(jax.vmap(jax.random.fold_in))
    return per_token(per_sample(groups.keys, groups.sample), groups.position)
