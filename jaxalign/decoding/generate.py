"""N samples for each of B prompts, in one compiled call on arrays.

The encoder runs once per prompt, and so do the cross-attention keys and values, which
the prompt's N samples share without copies. The loop (``jaxalign.decoding.loop``) ends
as soon as every response has ended.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.decoding import loop
from jaxalign.decoding.loop import Constraint, Samples
from jaxalign.decoding.sampling import EOS_ID, PAD_ID, Sampling


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
      model: a ``jaxalign.models.T5``, or anything with its decoding methods.
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
      constraint: which tokens may come next (``jaxalign.decoding.loop.Constraint``).
      prefixes: for each prompt and sample the tokens its response begins with (empty:
        none), part of the response and of ``max_new_tokens``.
      entropy: also return the full distribution's entropy at each token.

    Returns:
      ``Samples``.

    Raises:
      ValueError: on a size below 1, prompts that are not right-padded, prefixes that
        do not fit or break the constraint, or a constraint that needs more tokens.
    """
    slots = num_samples if slots is None else min(slots, num_samples)
    sizes = {
        "num_samples": num_samples,
        "max_new_tokens": max_new_tokens,
        "slots": slots,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}.")
    if isinstance(encoder_input_tokens, np.ndarray):
        present = encoder_input_tokens != PAD_ID
        late = np.flatnonzero((present[:, 1:] & ~present[:, :-1]).any(axis=1))
        if late.size:
            raise ValueError(
                f"Prompt row {late[0]} has padding (0) before its last token; expected "
                "right padding. Move the tokens to the left."
            )
    planned = lengths = None
    if prefixes is not None:
        planned, lengths = pad_prefixes(prefixes, num_samples, max_new_tokens)
        chex.assert_axis_dimension(planned, 0, encoder_input_tokens.shape[0])
    check_constraint(constraint, max_new_tokens, prefixes or ())
    return _generate(
        model,
        params,
        jnp.asarray(encoder_input_tokens, jnp.int32),
        key,
        jnp.asarray(prompt_ids, jnp.uint32),
        constraint,
        planned,
        lengths,
        num_samples=int(num_samples),
        max_new_tokens=int(max_new_tokens),
        slots=int(slots),
        sampling=sampling,
        entropy=bool(entropy),
    )


def prompt_keys(key: jax.Array, prompt_ids: jax.Array) -> jax.Array:
    """One key per prompt ``[B]``; sample ``n`` at position ``t`` folds in both."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_ids)


def check_constraint(
    constraint: Constraint | None,
    max_new_tokens: int,
    prefixes: Sequence[Sequence[Sequence[int]]] = (),
) -> None:
    """Refuses a constraint that no response can meet, before anything is decoded.

    Args:
      constraint: of the responses.
      max_new_tokens: of a response, EOS included.
      prefixes: that responses begin with, by prompt and sample.

    Raises:
      ValueError: when the tokens are too few, or naming the prefix that breaks it.
    """
    if constraint is None:
        return

    def allowed(state: Any, position: int) -> np.ndarray:
        remaining = np.int32(max_new_tokens - position)
        return np.asarray(constraint.allowed(state, remaining))

    if not allowed(constraint.start(), 0).any():
        needed = getattr(constraint, "fewest_tokens", None)
        raise ValueError(
            f"No response of max_new_tokens={max_new_tokens} tokens, EOS included, "
            "meets the constraint"
            + (f", which needs at least {needed}" if needed else "")
            + ": allow more tokens, or a shorter text."
        )
    for b, rows in enumerate(prefixes):
        for n, row in enumerate(rows):
            state = constraint.start()
            for position, token in enumerate(row):
                if not allowed(state, position)[token]:
                    raise ValueError(
                        f"prefixes[{b}][{n}] breaks the constraint at its token "
                        f"{position} (id {token}): behind it no response of "
                        f"{max_new_tokens} tokens meets it. Change either."
                    )
                state = constraint.advance(state, np.int32(token))
            if len(row) == max_new_tokens or not allowed(state, len(row)).any():
                raise ValueError(
                    f"prefixes[{b}][{n}] leaves no token for what the constraint still "
                    f"needs; max_new_tokens is {max_new_tokens}, prefix included."
                )


def pad_prefixes(
    prefixes: Sequence[Sequence[Sequence[int]]], num_samples: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Arrays ``[B, N, T]`` and lengths ``[B, N]`` of forced prefixes.

    Raises:
      ValueError: naming the prefix that is too long or holds an EOS.
    """
    padded = np.full((len(prefixes), num_samples, length), PAD_ID, np.int32)
    lengths = np.zeros((len(prefixes), num_samples), np.int32)
    for b, rows in enumerate(prefixes):
        if len(rows) > num_samples:
            raise ValueError(
                f"prefixes[{b}] has {len(rows)} rows for {num_samples} samples."
            )
        for n, row in enumerate(rows):
            if len(row) > length:
                raise ValueError(
                    f"prefixes[{b}][{n}] has {len(row)} tokens; max_new_tokens is "
                    f"{length}, prefix included."
                )
            if EOS_ID in list(row):
                raise ValueError(
                    f"prefixes[{b}][{n}] holds EOS ({EOS_ID}), after which nothing can "
                    "be sampled; leave it out."
                )
            padded[b, n, : len(row)] = row
            lengths[b, n] = len(row)
    return padded, lengths


@functools.partial(
    jax.jit,
    static_argnames=(
        "model",
        "num_samples",
        "max_new_tokens",
        "slots",
        "sampling",
        "entropy",
    ),
)
def _generate(
    model: Any,
    params: Any,
    encoder_input_tokens: jax.Array,
    key: jax.Array,
    prompt_ids: jax.Array,
    constraint: Constraint | None = None,
    prefixes: jax.Array | None = None,
    prefix_lengths: jax.Array | None = None,
    *,
    num_samples: int,
    max_new_tokens: int,
    slots: int,
    sampling: Sampling,
    entropy: bool = False,
) -> Samples:
    chex.assert_rank([encoder_input_tokens, prompt_ids], [2, 1])
    chex.assert_equal_shape_prefix([encoder_input_tokens, prompt_ids], 1)
    batch = encoder_input_tokens.shape[0]
    requests = loop.Requests(
        tokens=encoder_input_tokens,
        keys=prompt_keys(key, prompt_ids),
        num_samples=jnp.full(batch, num_samples, jnp.int32),
        max_new_tokens=jnp.full(batch, max_new_tokens, jnp.int32),
        prefixes=prefixes,
        prefix_lengths=prefix_lengths,
    )
    groups = loop.new_groups(
        model,
        params,
        requests,
        slots=slots,
        num_samples=num_samples,
        length=max_new_tokens,
        rules=sampling,
        constraint=constraint,
        entropy=entropy,
    )
    state = loop.run(model, params, loop.begin(model, groups), sampling, constraint)
    return state.groups.samples
