"""What an engine runs on the devices: groups that prompts join and leave."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.decoding import groups as grouping
from jaxalign.decoding import loop
from jaxalign.decoding.groups import Plan, Requests, new_groups
from jaxalign.decoding.loop import State
from jaxalign.decoding.rules import Constraint


def _constrain(plan: Plan, state: State) -> State:
    """Groups over the sharding's axes, so that every call returns what it got."""
    if plan.sharding is None:
        return state
    groups, cache = jax.lax.with_sharding_constraint(
        (state.groups, state.cache), plan.sharding
    )
    return State(state.cursor, cache, groups)


@functools.partial(jax.jit, static_argnames="plan")
def empty(
    plan: Plan, params: Any, requests: Requests, constraint: Constraint | None
) -> State:
    """A state of groups that hold no prompt; of `requests` only the shapes count."""
    one = jax.eval_shape(
        functools.partial(new_groups, plan), params, requests, constraint
    )

    def blank(leaf):
        shape = (plan.groups, *leaf.shape[1:])
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0), shape)
        return jnp.zeros(shape, leaf.dtype)

    groups = jax.tree.map(blank, one)
    groups = groups._replace(ended=jnp.ones_like(groups.ended))
    return _constrain(plan, loop.begin(plan, groups))


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="state")
def admit(
    plan: Plan,
    params: Any,
    state: State,
    requests: Requests,
    index: jax.Array,
    constraint: Constraint | None,
) -> State:
    """Encodes requests and seats them at ``index [R]``; outside ``[0, G)``: nowhere.

    The cache needs no clearing: what is older than a row's first token is masked.
    """
    new = new_groups(plan, params, requests, constraint)
    groups = jax.tree.map(
        lambda old, x: old.at[index].set(x, mode="drop"), state.groups, new
    )
    return _constrain(plan, state._replace(groups=groups))


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="state")
def run(
    plan: Plan,
    params: Any,
    state: State,
    constraint: Constraint | None,
    dropped: jax.Array,
    ended: jax.Array,
    max_steps: jax.Array,
    stop_when_free: jax.Array,
) -> tuple[State, jax.Array]:
    """Decodes, without what was taken back; and who is free then.

    Of the groups ``dropped`` bool ``[G]`` all samples end, and of ``ended`` bool ``[G,
    N]`` those that have a slot, which takes the prompt's next one.
    """
    groups = state.groups
    slots = jnp.take_along_axis(ended, groups.sample, axis=1) | dropped[:, None]
    groups = groups._replace(
        ended=groups.ended | slots,
        next_sample=jnp.where(dropped, groups.num_samples, groups.next_sample),
    )
    state = loop.run(
        plan,
        params,
        state._replace(groups=grouping.refill(groups, constraint)),
        constraint,
        max_steps=max_steps,
        stop_when_free=stop_when_free,
    )
    return _constrain(plan, state), grouping.free(state.groups)


@jax.jit
def request_keys(seeds: jax.Array, prompt_ids: jax.Array) -> jax.Array:
    """The key of each request ``[R]``, as `generate` has it."""
    return jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(seeds), prompt_ids)
