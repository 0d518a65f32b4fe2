"""From logits to a token: one draw per row.

Two distributions matter and never share a name. The *full* one is the model's own,
untempered: policy gradients, KL terms and scores are defined on it. The *sampler's*
is what tokens are drawn from after temperature and truncation. Recording one in
place of the other makes KL estimates negative (huggingface/trl#235), so every draw
returns both log-probabilities.

Transforms apply in the order of Hugging Face's ``generate``: the rules that look back
at the tokens so far (``jaxalign.decoding.history``), temperature, top-k, top-p, min-p,
typical, each on what the one before left.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.decoding import truncation
from jaxalign.decoding.rules import Sampling

# Vocabulary entries summed before the cumulative sum; T5 pads its vocabulary to a
# multiple of 128.
_BLOCK = 128


class Draw(NamedTuple):
    """One token per row; all arrays ``[...]``."""

    tokens: jax.Array  # int32 ids
    logps: jax.Array  # under the model's full, untempered distribution
    sampler_logps: jax.Array  # under that drawn from; 0 where greedy or forced
    entropies: jax.Array | None = None  # of the full one, in nats, if asked for


class RowSettings(NamedTuple):
    """Temperature and nucleus of each row, in place of one for all; arrays ``[...]``.

    They are data, not part of what is compiled: a server takes any of them.
    """

    temperature: jax.Array  # float32; 0 takes the most probable token
    top_p: jax.Array  # float32 in ``(0, 1]``


def _row_logits(logits: jax.Array, rows: RowSettings) -> jax.Array:
    """Tempered logits of each row's nucleus."""
    best = jnp.argmax(logits, axis=-1)
    greedy = (rows.temperature == 0.0)[..., None]
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    shifted = shifted / jnp.where(greedy, 1.0, rows.temperature[..., None])

    def nucleus(x: jax.Array) -> jax.Array:
        kept = truncation.keep_from(x, truncation.nucleus_floor(x, rows.top_p))
        return jnp.where(rows.top_p[..., None] < 1.0, kept, x)

    shifted = jax.lax.cond(jnp.any(rows.top_p < 1.0), nucleus, lambda x: x, shifted)
    is_best = jnp.arange(logits.shape[-1]) == best[..., None]
    return jnp.where(greedy, jnp.where(is_best, 0.0, -jnp.inf), shifted)


def sampler_logits(
    logits: jax.Array, sampling: Sampling, rows: RowSettings | None = None
) -> jax.Array:
    """What tokens are drawn from: log-probabilities ``[..., V]`` up to a constant.

    Tempered, then truncated; `rows`, where given, replaces the temperature, which is
    otherwise above 0, and the top-p of `sampling`.
    """
    if rows is not None:
        if sampling.top_k:
            logits = truncation.apply_top_k(logits, sampling.top_k)
        logits = _row_logits(logits, rows)
    else:
        if sampling.temperature != 1.0:
            # The largest logit goes to 0 first: a tiny temperature must not overflow.
            logits = logits - jnp.max(logits, axis=-1, keepdims=True)
            logits = logits / sampling.temperature
        if sampling.top_k or sampling.top_p < 1.0:
            # Top-p of what top-k left needs the k values only, not the vocabulary.
            values = truncation.top_k_values(logits, sampling.top_k)
            floor = truncation.nucleus_floor(values, sampling.top_p)
            logits = truncation.keep_from(logits, floor)
    logits = truncation.apply_min_p(logits, sampling.min_p)
    return truncation.apply_typical(logits, sampling.typical_p)


def _categorical(uniform: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverts the distribution function at ``uniform`` ``[...]`` in ``[0, 1)``.

    Returns the tokens and ``logsumexp`` of the logits, which needs the same sums.

    One random number a row rather than the ``V`` of the Gumbel trick, which costs more
    than a decoding step of a small model on CPU. The sum goes over blocks first, then
    inside the chosen block, so no cumulative sum runs over the whole vocabulary.
    """
    largest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    padding = -logits.shape[-1] % _BLOCK
    if padding:
        weights = jnp.pad(weights, [(0, 0)] * (logits.ndim - 1) + [(0, padding)])
    blocks = weights.reshape(*logits.shape[:-1], -1, _BLOCK)
    masses = jnp.sum(blocks, axis=-1)
    ends = jnp.cumsum(masses, axis=-1)
    target = uniform * ends[..., -1]

    def first_above(cumulative, mass, target):
        # Only what has mass counts: sums in another order than left to right may
        # rise by a rounding error over an entry of probability 0.
        above = (cumulative > target[..., None]) & (mass > 0.0)
        last = mass.shape[-1] - 1 - jnp.argmax(jnp.flip(mass > 0.0, -1), axis=-1)
        return jnp.where(jnp.any(above, axis=-1), jnp.argmax(above, axis=-1), last)

    block = first_above(ends, masses, target)
    start = jnp.take_along_axis(
        jnp.concatenate([jnp.zeros_like(ends[..., :1]), ends], axis=-1),
        block[..., None],
        axis=-1,
    )[..., 0]
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    offset = first_above(jnp.cumsum(inside, axis=-1), inside, target - start)
    # Logits that are NaN leave no mass anywhere; stay inside the vocabulary then (the
    # log-probability returned is NaN and tells).
    token = jnp.minimum(block * _BLOCK + offset, logits.shape[-1] - 1)
    return token.astype(jnp.int32), largest[..., 0] + jnp.log(ends[..., -1])


def sample(
    logits: jax.Array,
    keys: jax.Array,
    sampling: Sampling,
    *,
    ruled: jax.Array | None = None,
    forced: jax.Array | None = None,
    entropy: bool = False,
    rows: RowSettings | None = None,
) -> Draw:
    """Draws one token per row.

    Args:
      logits: ``[..., V]`` float32, the model's own.
      keys: ``[...]`` typed PRNG keys, one a row: a row's token depends on nothing else
        in the batch. Unused when greedy.
      sampling: temperature and truncation.
      ruled: ``[..., V]``, the logits after ``history.apply_rules`` or any other
        change, which are then tempered and truncated; default: ``logits``.
      forced: int32 ``[...]``, the token to take instead of a draw; negative: none.
      entropy: whether to return the full distribution's.
      rows: temperature and top-p of each row, in place of `sampling`'s.

    >>> key = jax.random.key(0)
    >>> sample(jnp.log(jnp.array([0.2, 0.5, 0.3])), key, Sampling(top_k=1)).tokens
    Array(1, dtype=int32)
    """
    chex.assert_type(logits, jnp.float32)
    chex.assert_shape(keys, logits.shape[:-1])

    def chosen(tokens, logits):
        return jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]

    ruled = logits if ruled is None else ruled
    tempered = None
    if sampling.temperature == 0.0 and rows is None:
        tokens = jnp.argmax(ruled, axis=-1).astype(jnp.int32)
    else:
        draw_uniform = jax.random.uniform
        for _ in range(keys.ndim):
            draw_uniform = jax.vmap(draw_uniform)
        tempered = sampler_logits(ruled, sampling, rows)
        tokens, own_total = _categorical(draw_uniform(keys), tempered)
    if forced is not None:
        tokens = jnp.where(forced >= 0, forced, tokens)
    # Where nothing was changed, spare a pass over the vocabulary.
    unchanged = tempered is logits
    total = own_total if unchanged else jax.nn.logsumexp(logits, axis=-1)
    logps = chosen(tokens, logits) - total
    if tempered is None:
        own = jnp.zeros_like(logps)
    else:
        own = logps if unchanged else chosen(tokens, tempered) - own_total
    if forced is not None:
        own = jnp.where(forced >= 0, 0.0, own)
    entropies = None
    if entropy:
        every = logits - total[..., None]
        entropies = -jnp.sum(
            jnp.where(every > -jnp.inf, jnp.exp(every) * every, 0.0), axis=-1
        )
    return Draw(tokens, logps, own, entropies)
