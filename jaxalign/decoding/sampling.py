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

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.decoding.rules import Sampling

# Vocabulary entries summed before the cumulative sum; T5 pads its vocabulary to a
# multiple of 128.
_BLOCK = 128
# For non-negative floats the order of the bit patterns is the order of the numbers.
_ONE_BITS = 0x3F800000  # of float32 1.0
_INFINITY_BITS = 0x7F800000


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


def _nucleus_floor(logits: jax.Array, p: float | jax.Array) -> jax.Array:
    """The smallest logit of the nucleus, ``[..., 1]``; ``p`` is one, or one a row.

    The nucleus (Holtzman et al. 2020, arXiv 1904.09751) is {token: prob >= t} for the
    largest t that leaves the mass ``p``; never empty.
    """
    if not isinstance(p, jax.Array) and p >= 1.0:
        # min() and not the last of the sorted values: XLA turns a slice of top_k
        # back into a full sort, a hundred times slower on CPU.
        return jnp.min(logits, axis=-1, keepdims=True)
    probs = jax.nn.softmax(logits, axis=-1)

    def enough(threshold: jax.Array) -> jax.Array:
        mass = jnp.sum(jnp.where(probs >= threshold, probs, 0.0), axis=-1)
        return (mass >= p) & (mass > 0.0)

    low = jnp.zeros(logits.shape[:-1], jnp.int32)
    threshold = _as_floats(_last_that(enough, low, low + _ONE_BITS + 1))
    inside = jnp.where(probs >= threshold, logits, jnp.inf)
    return jnp.min(inside, axis=-1, keepdims=True)


def _as_floats(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)[..., None]


def _last_that(
    holds: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array
) -> jax.Array:
    """The bits ``[...]`` of the last number for which `holds`, from ``low`` on.

    Bisection over bit patterns finds it exactly in 31 sums; sorting the vocabulary is
    ten times slower on CPU. It holds at ``low`` and no longer at ``high``.
    """

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        goes_on = holds(_as_floats(middle))
        return jnp.where(goes_on, middle, low), jnp.where(goes_on, high, middle)

    return jax.lax.fori_loop(0, 31, halve, (low, high))[0]


def _keep_from(logits: jax.Array, floor: jax.Array) -> jax.Array:
    """``logits`` from ``floor`` on, ``-inf`` below."""
    return jnp.where(logits >= floor, logits, -jnp.inf)


def _typical(logits: jax.Array, p: float) -> jax.Array:
    """Keeps the tokens closest to the entropy with mass at least ``p``; 1 keeps all.

    Locally typical sampling (Meister et al. 2022, arXiv 2202.00666): tokens in order
    of ``|-log prob - entropy|``, equally close ones together.
    """
    if p >= 1.0:
        return logits
    logps = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(logps)
    possible = probs > 0.0
    information = jnp.where(possible, -logps, jnp.inf)
    entropy = jnp.sum(jnp.where(possible, probs * -logps, 0.0), axis=-1, keepdims=True)
    distance = jnp.abs(information - entropy)

    def too_little(border: jax.Array) -> jax.Array:
        return ~(jnp.sum(jnp.where(distance <= border, probs, 0.0), axis=-1) >= p)

    low = jnp.full(logits.shape[:-1], -1, jnp.int32)
    high = jnp.full(logits.shape[:-1], _INFINITY_BITS, jnp.int32)
    border = _as_floats(_last_that(too_little, low, high) + 1)
    return jnp.where(distance <= border, logits, -jnp.inf)


def _row_logits(logits: jax.Array, rows: RowSettings) -> jax.Array:
    """Tempered logits of each row's nucleus."""
    best = _argmax(logits)
    greedy = (rows.temperature == 0.0)[..., None]
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    shifted = shifted / jnp.where(greedy, 1.0, rows.temperature[..., None])

    def nucleus(x: jax.Array) -> jax.Array:
        kept = _keep_from(x, _nucleus_floor(x, rows.top_p))
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
    temperature, top_p = sampling.temperature, sampling.top_p
    if rows is not None:
        temperature, top_p = 1.0, 1.0
    if temperature != 1.0:
        # The largest logit goes to 0 first: a tiny temperature must not overflow.
        logits = logits - jnp.max(logits, axis=-1, keepdims=True)
        logits = logits / temperature
    if sampling.top_k or top_p < 1.0:
        values = logits
        if 0 < sampling.top_k < logits.shape[-1]:
            # Top-p of what top-k left needs the k values only, not the vocabulary.
            values = jax.lax.top_k(logits, sampling.top_k)[0]
        floor = _nucleus_floor(values, top_p)
        logits = _keep_from(logits, floor)
    if rows is not None:
        logits = _row_logits(logits, rows)
    if sampling.min_p > 0.0:  # Nguyen et al. 2024 (arXiv 2407.01082)
        floor = jnp.max(logits, axis=-1, keepdims=True)
        floor = floor + jnp.log(jnp.float32(sampling.min_p))
        logits = _keep_from(logits, floor)
    return _typical(logits, sampling.typical_p)


def _blocks(x: jax.Array, empty: float) -> jax.Array:
    """``[..., V]`` as ``[..., V / _BLOCK, _BLOCK]``, padded with `empty`."""
    padding = -x.shape[-1] % _BLOCK
    if padding:
        widths = [(0, 0)] * (x.ndim - 1) + [(0, padding)]
        x = jnp.pad(x, widths, constant_values=empty)
    return x.reshape(*x.shape[:-1], -1, _BLOCK)


def _block(blocks: jax.Array, index: jax.Array) -> jax.Array:
    """Block ``index [...]`` of ``[..., n, _BLOCK]``."""
    return jnp.take_along_axis(blocks, index[..., None, None], axis=-2)[..., 0, :]


def _argmax(logits: jax.Array) -> jax.Array:
    """``jnp.argmax`` over the last axis, int32.

    Largest numbers of blocks first, then inside of one: XLA's CPU compiler takes a
    maximum several times as fast as the place of one.
    """
    blocks = _blocks(logits, -jnp.inf)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    inside = jnp.argmax(_block(blocks, block), axis=-1)
    return (block * _BLOCK + inside).astype(jnp.int32)


def _categorical(uniform: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverts the distribution function at ``uniform`` ``[...]`` in ``[0, 1)``.

    Returns the tokens and ``logsumexp`` of the logits, which needs the same sums.

    One random number a row rather than the ``V`` of the Gumbel trick, which costs more
    than a decoding step of a small model on CPU. The sum goes over blocks first, then
    inside the chosen block, so no cumulative sum runs over the whole vocabulary.
    """
    largest = jnp.max(logits, axis=-1, keepdims=True)
    # Summed as they are exponentiated, the weights would not be written to memory, in
    # half the time of a draw on CPUs; but in another order, and to other last bits.
    blocks = _blocks(jnp.exp(logits - largest), 0.0)
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
    inside = _block(blocks, block)
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
        tokens = _argmax(ruled)
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
