"""Resampling of weighted particles: pure functions of ``[P]`` log-weights.

Every scheme returns ``n`` indices with new log-weights, and is unbiased particle by
particle: the expected new weight at ``i`` is the old weight of ``i``. So sums of
weights, which estimate a normaliser, keep their expectation.

Weights of ``-inf`` mark dead particles; they are never drawn. Fewer than ``n`` positive
weights leave slots over, which come back with log-weight ``-inf``.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Resampled(NamedTuple):
    """Survivors."""

    indices: jax.Array  # int32 ``[n]`` into the particles resampled
    log_weights: jax.Array  # float32 ``[n]``; ``-inf`` for slots that nobody deserved


def effective_sample_size(log_weights: jax.Array) -> jax.Array:
    """``1 / sum what^2`` of the self-normalised weights over the last axis; 0 if dead.

    >>> effective_sample_size(jnp.log(jnp.array([0.5, 0.5, 0.0, 0.0])))
    Array(2., dtype=float32)
    """
    squares = jnp.sum(jnp.square(normalised(log_weights)), axis=-1)
    return jnp.where(squares > 0.0, 1.0 / jnp.where(squares > 0.0, squares, 1.0), 0.0)


def normalised(log_weights: jax.Array) -> jax.Array:
    """Weights that sum to 1 over the last axis; all 0 where every one is ``-inf``."""
    top = jnp.max(log_weights, axis=-1, keepdims=True)
    weights = jnp.exp(log_weights - jnp.where(top == -jnp.inf, 0.0, top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0.0, total, 1.0)


def _invert(weights: jax.Array, ends: jax.Array, points: jax.Array) -> jax.Array:
    """The particle whose stretch of the cumulative weights holds each point."""
    found = jnp.searchsorted(ends, points, side="right")
    # Rounding may put a point behind the last particle that has weight.
    last = weights.size - 1 - jnp.argmax(jnp.flip(weights > 0.0))
    return jnp.minimum(found, last).astype(jnp.int32)


def _with_replacement(log_weights: jax.Array, n: int, points: jax.Array) -> Resampled:
    """The particles at points in [0, 1), each with an n-th of the total weight."""
    weights = normalised(log_weights)
    ends = jnp.cumsum(weights)
    mean = jax.nn.logsumexp(log_weights) - jnp.log(n)
    indices = _invert(weights, ends, points * ends[-1])
    return Resampled(indices, jnp.full(n, mean))


def multinomial(key: jax.Array, log_weights: jax.Array, n: int) -> Resampled:
    """``n`` independent draws from ``log_weights [P]``, float32."""
    return _with_replacement(log_weights, n, jax.random.uniform(key, (n,)))


def stratified(key: jax.Array, log_weights: jax.Array, n: int) -> Resampled:
    """One draw from each ``n``-th of the cumulative weights."""
    points = (jnp.arange(n) + jax.random.uniform(key, (n,))) / n
    return _with_replacement(log_weights, n, points)


def systematic(key: jax.Array, log_weights: jax.Array, n: int) -> Resampled:
    """A comb of ``n`` teeth with one random offset."""
    points = (jnp.arange(n) + jax.random.uniform(key)) / n
    return _with_replacement(log_weights, n, points)


def threshold(weights: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """The ``c`` with ``sum min(1, c * weights) = n``, and how many saturate.

    Sorted in descending order, with ``tail_m`` the weight behind the ``m`` largest, it
    is ``(n - m) / tail_m`` for the first ``m`` at which the next weight does not
    saturate: ``weights[m] * (n - m) < tail_m``. More than ``n`` weights are positive.

    >>> w = jnp.array([0.4, 0.2, 0.1, 0.1, 0.08, 0.05, 0.04, 0.02, 0.01])
    >>> c, m = threshold(w, 4)
    >>> round(float(c), 4), int(m)
    (5.0, 2)
    """
    ordered = -jnp.sort(-weights)
    # Summed from the smallest, so that a light tail keeps its digits.
    tails = jnp.flip(jnp.cumsum(jnp.flip(ordered)))[:n]
    left = n - jnp.arange(n)
    open_ = ordered[:n] * left < tails
    # With one slot left nothing saturates, whatever rounding says.
    m = jnp.argmax(open_.at[n - 1].set(True))
    return left[m] / tails[m], m


def fearnhead_clifford(key: jax.Array, log_weights: jax.Array, n: int) -> Resampled:
    """Optimal resampling without replacement (Fearnhead and Clifford 2003).

    With normalised weights ``w`` and ``c`` from :func:`threshold`, particles with
    ``c w >= 1`` are kept once each with their weight; ``n - m`` of the others are drawn
    by a comb of stride ``tail / (n - m)`` and get one weight, ``1 / c`` of the total.
    The factor ``N / N'`` of SMC steering (Lew et al. 2023, arXiv 2306.03081, algorithm
    1) undoes the ``N' / N`` of its expansion step; both are left out here.

    The reference implementation draws particles of weight 0 when fewer than ``n`` have
    any, and gives them weight. Here those that have some are all kept, once each, and
    the slots left over stay dead.
    """
    count = log_weights.size
    if n >= count:
        kept = jnp.arange(n, dtype=jnp.int32) % count
        alive = jnp.where(jnp.arange(n) < count, log_weights[kept], -jnp.inf)
        return Resampled(kept, alive)
    weights = normalised(log_weights)
    order = jnp.argsort(-weights)
    # Few enough: everybody stays. Also the branch of an empty population.
    few = weights[order[n]] <= 0.0
    c, m = threshold(jnp.where(few, 1.0, weights), n)
    kept = jnp.where(few, weights > 0.0, jnp.argsort(order) < m)
    # The comb runs in the order of the particles: rounding errors move no tooth far.
    tail = jnp.where(kept, 0.0, weights)
    ends = jnp.cumsum(tail)
    teeth = (jax.random.uniform(key) + jnp.arange(n)) * ends[-1] / (n - m)
    hits = (~few & (jnp.arange(n) < n - m)).astype(jnp.int32)
    copies = kept.astype(jnp.int32).at[_invert(tail, ends, teeth)].add(hits)
    indices = jnp.repeat(
        jnp.arange(count, dtype=jnp.int32), copies, total_repeat_length=n
    )
    shared = jax.nn.logsumexp(log_weights) - jnp.log(c)
    new = jnp.where(kept[indices], log_weights[indices], shared)
    used = jnp.arange(n) < jnp.sum(copies)
    return Resampled(indices, jnp.where(used, new, -jnp.inf))


_ALL = (fearnhead_clifford, multinomial, stratified, systematic)
SCHEMES = {scheme.__name__: scheme for scheme in _ALL}
