"""Truncation of a distribution: top-k, nucleus, min-p, locally typical sampling.

Pure functions of ``[..., V]`` float32 logits that set what is left out to ``-inf``.
Tokens tied with the last one kept are kept, so that none is preferred for its id.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

# For non-negative floats the order of the bit patterns is the order of the numbers.
_ONE_BITS = 0x3F800000  # of float32 1.0
_INFINITY_BITS = 0x7F800000


def top_k_values(logits: jax.Array, k: int) -> jax.Array:
    """The ``k`` largest logits, ``[..., k]``; all of them for ``k = 0``."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    return jax.lax.top_k(logits, k)[0]


def nucleus_floor(logits: jax.Array, p: float | jax.Array) -> jax.Array:
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


def keep_from(logits: jax.Array, floor: jax.Array) -> jax.Array:
    """``logits`` from ``floor`` on, ``-inf`` below."""
    return jnp.where(logits >= floor, logits, -jnp.inf)


def apply_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Keeps the ``k`` largest logits ``[..., V]``; 0 keeps all."""
    return keep_from(logits, nucleus_floor(top_k_values(logits, k), 1.0))


def apply_min_p(logits: jax.Array, p: float) -> jax.Array:
    """Keeps tokens at least ``p`` times as probable as the most probable one.

    Nguyen et al. 2024 (arXiv 2407.01082); ``p`` lies in ``[0, 1]``, 0 keeps all.
    """
    if p == 0.0:
        return logits
    best = jnp.max(logits, axis=-1, keepdims=True)
    return keep_from(logits, best + jnp.log(jnp.float32(p)))


def apply_typical(logits: jax.Array, p: float) -> jax.Array:
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
