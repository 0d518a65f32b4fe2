"""Contrastive search (Su et al. 2022, arXiv 2202.06417, equation 5).

Deterministic: of the ``k`` most probable tokens, the one with the largest ::

    (1 - alpha) p(v | x, y) - alpha max_j cos(h_v, h_j)

where ``h_v`` is the decoder's final state after reading ``v`` and ``h_j`` those of the
inputs so far, the start token among them. All ``k`` candidates are read in one step.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.decoding import network
from jaxalign.decoding.checks import check_sizes
from jaxalign.decoding.groups import Samples, no_samples
from jaxalign.decoding.rules import EOS_ID, PAD_ID, START_ID


class _Carry(NamedTuple):
    position: jax.Array
    logits: jax.Array  # [B, V] of the next token
    ended: jax.Array  # [B]
    states: jax.Array  # [B, T + 1, E] unit vectors of the inputs so far
    samples: Samples
    cache: Any  # [B, k, ...], k equal continuations


def contrastive_search(
    model: Any,
    params: Any,
    encoder_input_tokens: jax.Array | np.ndarray,
    *,
    max_new_tokens: int,
    top_k: int = 4,
    penalty_alpha: float = 0.6,
    eos_id: int = EOS_ID,
) -> Samples:
    """One response to each prompt, probable and unlike what it has said already.

    Arguments that are not named here are those of `jaxalign.decoding.generate`.

    Args:
      top_k: candidates ``k`` at each step; 1 is greedy.
      penalty_alpha: weight of the degeneration penalty, in ``[0, 1]``.
      eos_id: the token that ends a response, the vocabulary's.

    Returns:
      ``Samples`` with ``N = 1``; ``sampler_logps`` are 0, nothing is drawn.
    """
    check_sizes(top_k=top_k, max_new_tokens=max_new_tokens)
    if not 0.0 <= penalty_alpha <= 1.0:
        raise ValueError(f"penalty_alpha must lie in [0, 1], got {penalty_alpha!r}.")
    return _search(
        model,
        params,
        jnp.asarray(encoder_input_tokens, jnp.int32),
        jnp.float32(penalty_alpha),
        length=int(max_new_tokens),
        top_k=int(top_k),
        eos_id=int(eos_id),
    )


@functools.partial(jax.jit, static_argnames=("model", "length", "top_k", "eos_id"))
def _search(
    model: Any,
    params: Any,
    encoder_input_tokens: jax.Array,
    alpha: jax.Array,
    *,
    length: int,
    top_k: int,
    eos_id: int,
) -> Samples:
    chex.assert_rank(encoder_input_tokens, 2)
    batch = encoder_input_tokens.shape[0]
    mask, cross_kv = network.encode(model, params, encoder_input_tokens)

    def read(tokens, position, cache):
        """Unit states ``[B, k, E]``, logits ``[B, k, V]`` and the cache."""
        args = tokens, position, cache, cross_kv, mask
        states, cache = network.apply(model, params, "decode_step_states", *args)
        logits = network.apply(model, params, "logits", states)
        states = states.astype(jnp.float32)
        norms = jnp.linalg.norm(states, axis=-1, keepdims=True)
        return states / jnp.maximum(norms, 1e-12), logits, cache

    def step(carry: _Carry) -> _Carry:
        logps = jax.nn.log_softmax(carry.logits, axis=-1)
        best, candidates = jax.lax.top_k(logps, top_k)  # [B, k]
        states, logits, cache = read(candidates, carry.position + 1, carry.cache)
        likeness = jnp.einsum("bke,bte->bkt", states, carry.states)
        known = jnp.arange(length + 1) <= carry.position
        likeness = jnp.max(jnp.where(known, likeness, -jnp.inf), axis=-1)
        scores = (1.0 - alpha) * jnp.exp(best) - alpha * likeness
        choice = jnp.argmax(scores, axis=-1)[:, None]

        tokens, logps, logits, states = jax.tree.map(
            lambda x: x[:, 0],
            network.take_rows((candidates, best, logits, states), choice),
        )
        alive = ~carry.ended
        tokens = jnp.where(alive, tokens, PAD_ID)
        old, at = carry.samples, (slice(None), 0, carry.position)
        samples = old._replace(
            tokens=old.tokens.at[at].set(tokens),
            logps=old.logps.at[at].set(jnp.where(alive, logps, 0.0)),
            lengths=old.lengths + alive[:, None],
        )
        return _Carry(
            position=carry.position + 1,
            logits=logits,
            ended=carry.ended | (tokens == eos_id),
            states=carry.states.at[:, carry.position + 1].set(states),
            samples=samples,
            cache=network.take_rows(cache, jnp.repeat(choice, top_k, axis=1)),
        )

    start = jnp.full((batch, top_k), START_ID, jnp.int32)
    # One column more than tokens: candidates of the last step are read as well.
    cache = model.init_self_cache(batch, top_k, length + 1)
    states, logits, cache = read(start, jnp.int32(0), cache)
    known = jnp.zeros((batch, length + 1, states.shape[-1]), jnp.float32)
    carry = _Carry(
        position=jnp.int32(0),
        logits=logits[:, 0],
        ended=~jnp.any(mask, axis=1),
        states=known.at[:, 0].set(states[:, 0]),
        samples=no_samples((batch, 1, length)),
        cache=cache,
    )
    done = jax.lax.while_loop(
        lambda c: (c.position < length) & ~jnp.all(c.ended), step, carry
    )
    return done.samples
