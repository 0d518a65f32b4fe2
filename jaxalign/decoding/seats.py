"""What an engine runs on the devices: groups that prompts join and leave."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.decoding import groups as grouping
from jaxalign.decoding import loop
from jaxalign.decoding.generate import prompt_keys
from jaxalign.decoding.groups import Plan, Requests, new_groups
from jaxalign.decoding.loop import State
from jaxalign.decoding.rules import Constraint


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the functions below are compiled for."""

    plan: Plan  # of the loop
    groups: int  # prompts decoded at a time
    sharding: jax.sharding.Sharding | None  # of the groups axis, or None

    def constrain(self, state: State) -> State:
        """Groups over the sharding's axes, so that every call returns what it got."""
        if self.sharding is None:
            return state
        groups, cache = jax.lax.with_sharding_constraint(
            (state.groups, state.cache), self.sharding
        )
        return State(state.cursor, cache, groups)


@functools.partial(jax.jit, static_argnames="setup")
def empty(
    setup: Setup, params: Any, requests: Requests, constraint: Constraint | None
) -> State:
    """A state of groups that hold no prompt; of `requests` only the shapes count."""
    one = jax.eval_shape(
        functools.partial(new_groups, setup.plan), params, requests, constraint
    )

    def blank(leaf):
        shape = (setup.groups, *leaf.shape[1:])
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0), shape)
        return jnp.zeros(shape, leaf.dtype)

    groups = jax.tree.map(blank, one)
    groups = groups._replace(ended=jnp.ones_like(groups.ended))
    return setup.constrain(loop.begin(setup.plan, groups))


@functools.partial(jax.jit, static_argnames="setup", donate_argnames="state")
def admit(
    setup: Setup,
    params: Any,
    state: State,
    requests: Requests,
    index: jax.Array,
    constraint: Constraint | None,
) -> State:
    """Encodes requests and seats them at the groups ``index``."""
    new = new_groups(setup.plan, params, requests, constraint)
    groups = grouping.seat(state.groups, new, index)
    return setup.constrain(state._replace(groups=groups))


@functools.partial(jax.jit, static_argnames="setup", donate_argnames="state")
def run(
    setup: Setup,
    params: Any,
    state: State,
    constraint: Constraint | None,
    dropped: jax.Array,
    ended: jax.Array,
    max_steps: jax.Array,
    stop_when_free: jax.Array,
) -> tuple[State, jax.Array]:
    """Decodes, after the groups and samples that were taken back; who is free then."""
    groups = grouping.drop(state.groups, dropped)
    state = loop.run(
        setup.plan,
        params,
        state._replace(groups=grouping.end(groups, ended, constraint)),
        constraint,
        max_steps=max_steps,
        stop_when_free=stop_when_free,
    )
    return setup.constrain(state), grouping.free(state.groups)


@jax.jit
def request_keys(seeds: jax.Array, prompt_ids: jax.Array) -> jax.Array:
    """The key of each request ``[R]``, as `generate` has it."""

    def one(seed, prompt_id):
        return prompt_keys(jax.random.key(seed), prompt_id[None])[0]

    return jax.vmap(one)(seeds, prompt_ids)
