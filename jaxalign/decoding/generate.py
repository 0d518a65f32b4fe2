"""N samples for each of B prompts, in one compiled call on arrays."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.decoding import loop
from jaxalign.decoding.checks import check_constraint, check_sizes, pad_prefixes
from jaxalign.decoding.groups import Plan, Requests, Samples, new_groups
from jaxalign.decoding.rules import PAD_ID, Constraint, Sampling


def generate(
    model: Any,
    params: Any,
    encoder_input_tokens: jax.Array | np.ndarray,
    *,
    key: jax.Array,
    prompt_ids: jax.Array | np.ndarray,
    num_samples: int,
    max_new_tokens: int,
    sampling: Sampling,
    slots: int | None = None,
    constraint: Constraint | None = None,
    prefixes: Sequence[Sequence[Sequence[int]]] | None = None,
    entropy: bool = False,
) -> Samples:
    """Samples ``num_samples`` responses to each prompt.

    Sample ``n`` of a prompt is a function of the parameters, the prompt, ``key``, its
    id and ``n`` (up to float noise in the logits): batch neighbours, batch size and
    padding do not enter. Compiled once per model, ``(B, Le)``, ``num_samples``,
    ``max_new_tokens`` and ``sampling``; ``Generator`` keeps those shapes few.

    Args:
      model: a ``jaxalign.models.EncoderDecoder``.
      params: its parameters, on any sharding.
      encoder_input_tokens: int32 ``[B, Le]``, right-padded with 0, EOS included. A row
        of zeros is no prompt: it yields empty responses and delays nobody.
      key: a typed PRNG key.
      prompt_ids: ``[B]`` integers in ``[0, 2**32)`` that tell prompts apart.
      num_samples: ``N``.
      max_new_tokens: ``T``, EOS included.
      sampling: the rules.
      slots: samples of a prompt that are decoded at a time, the next taking over as
        one ends; default: all ``N``. Changes no sample.
      constraint: which tokens may come next (``jaxalign.decoding.Constraint``).
      prefixes: for each prompt and sample the tokens its response begins with (empty:
        none), part of the response and of ``max_new_tokens``.
      entropy: also return the full distribution's entropy at each token.
    """
    slots = num_samples if slots is None else min(slots, num_samples)
    check_sizes(num_samples=num_samples, max_new_tokens=max_new_tokens, slots=slots)
    if isinstance(encoder_input_tokens, np.ndarray):
        present = encoder_input_tokens != PAD_ID
        late = np.flatnonzero((present[:, 1:] & ~present[:, :-1]).any(axis=1))
        if late.size:
            raise ValueError(
                f"Prompt row {late[0]} has padding (0) before its last token; expected "
                "right padding. Move the tokens to the left."
            )
    tokens = jnp.asarray(encoder_input_tokens, jnp.int32)
    prompt_ids = jnp.asarray(prompt_ids, jnp.uint32)
    chex.assert_rank([tokens, prompt_ids], [2, 1])
    chex.assert_equal_shape_prefix([tokens, prompt_ids], 1)
    planned = lengths = None
    if prefixes is not None:
        planned, lengths = pad_prefixes(
            prefixes, num_samples, max_new_tokens, sampling.eos_id
        )
        chex.assert_equal_shape_prefix([tokens, planned], 1)
    check_constraint(constraint, max_new_tokens, prefixes or ())
    plan = Plan(model, sampling, slots, num_samples, max_new_tokens, entropy)
    return _generate(
        plan, params, tokens, key, prompt_ids, constraint, planned, lengths
    )


def prompt_keys(key: jax.Array, prompt_ids: jax.Array) -> jax.Array:
    """One key per prompt ``[B]``; sample ``n`` at position ``t`` folds in both."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_ids)


@functools.partial(jax.jit, static_argnames="plan")
def _generate(
    plan: Plan,
    params: Any,
    tokens: jax.Array,
    key: jax.Array,
    prompt_ids: jax.Array,
    constraint: Constraint | None = None,
    prefixes: jax.Array | None = None,
    prefix_lengths: jax.Array | None = None,
) -> Samples:
    batch = prompt_ids.size
    requests = Requests(
        tokens=tokens,
        keys=prompt_keys(key, prompt_ids),
        num_samples=jnp.full(batch, plan.num_samples, jnp.int32),
        max_new_tokens=jnp.full(batch, plan.length, jnp.int32),
        prefixes=prefixes,
        prefix_lengths=prefix_lengths,
    )
    state = loop.begin(plan, new_groups(plan, params, requests, constraint))
    return loop.run(plan, params, state, constraint).groups.samples
