"""The state of decoding: groups of slots, one prompt a group, one sample a slot.

A group's prompt has cross-attention keys and values that its slots share without
copies. A slot whose sample has ended takes the prompt's next one; a group whose samples
have all ended is given another prompt (`jaxalign.decoding.seats`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.decoding import history as histories
from jaxalign.decoding import network
from jaxalign.decoding.rules import PAD_ID, START_ID, Constraint, Sampling
from jaxalign.decoding.sampling import RowSettings


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a decode loop is compiled for, and an engine's groups with it."""

    model: Any  # the network
    rules: Sampling  # of sampling
    slots: int  # ``S``, samples of a prompt decoded at a time
    num_samples: int  # ``N``, the most that a request may ask for
    length: int  # ``T``, of the longest response
    entropy: bool  # whether to record entropies
    groups: int = 0  # ``G``, prompts that an engine decodes at a time
    sharding: jax.sharding.Sharding | None = None  # of the axis of its groups


class Samples(NamedTuple):
    """Sampled responses; masks follow from ``lengths``, never from token values."""

    tokens: jax.Array  # int32 ``[B, N, T]``: the response up to its EOS, then 0
    # float32 ``[B, N, T]``, the model's full, untempered log-probability of each token,
    # EOS included; 0 after it
    logps: jax.Array
    # float32 ``[B, N, T]``, under the distribution that tokens were drawn from; 0 after
    # EOS and for the tokens of a forced prefix
    sampler_logps: jax.Array
    lengths: jax.Array  # int32 ``[B, N]`` tokens, EOS included; ``T`` where none came
    # float32 ``[B, N, T]`` of the full distribution, in nats, if asked for
    entropies: jax.Array | None = None


def no_samples(shape: tuple[int, int, int], entropy: bool = False) -> Samples:
    """Samples ``[B, N, T]`` without any token yet."""
    # Each array anew: donated buffers must be distinct.
    full, own, *more = (jnp.zeros(shape, jnp.float32) for _ in range(2 + entropy))
    tokens = jnp.full(shape, PAD_ID, jnp.int32)
    return Samples(tokens, full, own, jnp.zeros(shape[:2], jnp.int32), *more)


class Requests(NamedTuple):
    """Prompts and what is asked of each; arrays over ``R`` prompts."""

    tokens: jax.Array  # int32 ``[R, Le]``, right-padded with 0; all 0: no prompt
    keys: jax.Array  # typed, ``[R]``: sample ``n`` draws from ``fold_in(key, n)``
    num_samples: jax.Array  # int32 ``[R]``, at most ``N``
    max_new_tokens: jax.Array  # int32 ``[R]``, at most ``T``
    # int32 ``[R, N, T]``: tokens that responses begin with, if any do, then 0
    prefixes: jax.Array | None = None
    prefix_lengths: jax.Array | None = None  # int32 ``[R, N]``
    settings: RowSettings | None = None  # ``[R]``, in place of the rules'


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


def new_groups(
    plan: Plan, params: Any, requests: Requests, constraint: Constraint | None
) -> Groups:
    """Encodes ``R`` prompts and seats their first samples: ``Groups``, ``G = R``."""
    count = requests.tokens.shape[0]
    chex.assert_shape([requests.num_samples, requests.max_new_tokens], (count,))
    rows, shape = (count, plan.slots), (count, plan.num_samples, plan.length)
    mask, cross_kv = network.encode(plan.model, params, requests.tokens)
    wanted = jnp.where(jnp.any(mask, axis=1), requests.num_samples, 0)
    sample_index = jnp.broadcast_to(jnp.arange(plan.slots, dtype=jnp.int32), rows)
    samples = no_samples(shape, plan.entropy)
    if requests.prefixes is not None:
        chex.assert_shape(requests.prefixes, shape)
        samples = samples._replace(tokens=requests.prefixes)
    return Groups(
        encoder_mask=mask,
        cross_kv=cross_kv,
        keys=requests.keys,
        num_samples=wanted,
        max_new_tokens=requests.max_new_tokens,
        prefix_lengths=requests.prefix_lengths,
        settings=requests.settings,
        next_sample=jnp.minimum(wanted, plan.slots),
        sample=sample_index,
        position=jnp.zeros(rows, jnp.int32),
        inputs=jnp.full(rows, START_ID, jnp.int32),
        ended=sample_index >= wanted[:, None],
        history=histories.empty(rows, plan.rules, plan.model),
        constraint=constraint and network.repeat(constraint.start(), rows),
        samples=samples,
    )


def free(groups: Groups) -> jax.Array:
    """Bool ``[G]``: no slot is at work, and no sample waits."""
    return jnp.all(groups.ended, axis=1) & (groups.next_sample >= groups.num_samples)


def refill(groups: Groups, constraint: Constraint | None) -> Groups:
    """Gives slots that ended their prompt's next samples."""
    slots, num_samples = groups.ended.shape[1], groups.samples.tokens.shape[1]
    position = jnp.where(groups.ended, 0, groups.position)
    if slots >= num_samples:  # every sample has had its slot from the start
        return groups._replace(position=position)
    nth = jnp.cumsum(groups.ended, axis=1) - 1
    following = groups.next_sample[:, None] + nth
    takes = groups.ended & (following < groups.num_samples[:, None])

    def restart(state, start):
        return jnp.where(jnp.expand_dims(takes, range(2, state.ndim)), start, state)

    return groups._replace(
        position=position,
        sample=jnp.where(takes, following, groups.sample),
        inputs=jnp.where(takes, START_ID, groups.inputs),
        ended=groups.ended & ~takes,
        next_sample=groups.next_sample + jnp.sum(takes, axis=1),
        history=histories.restart(groups.history, takes),
        constraint=constraint
        and jax.tree.map(restart, groups.constraint, constraint.start()),
    )
