"""Losses on single trajectories with labels: thumbs up and thumbs down.

As in `jaxalign.losses.pairwise`, with one float32 loss per response out of ``logps``
and ``ref_logps``, sums over its tokens, and

* ``labels``: 1 for desirable, 0 for undesirable, same shape;
* ``desirable_weight``, ``undesirable_weight``: ``lambda_D`` and ``lambda_U``.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jaxalign.losses.pairwise import log_ratios, masked


def kto_at_reference_point(
    logps: jax.Array,
    ref_logps: jax.Array,
    reference_point: jax.Array,
    labels: jax.Array,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """`kto` with the scalar ``z >= 0`` already estimated; no gradient flows to it."""
    ratios = log_ratios(logps, ref_logps, where)
    chex.assert_equal_shape([ratios, labels])
    z = jax.lax.stop_gradient(jnp.asarray(reference_point, jnp.float32))
    desirable = labels > 0
    sign = jnp.where(desirable, 1.0, -1.0)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    losses = weight * (1.0 - jax.nn.sigmoid(sign * beta * (ratios - z)))
    return masked(losses, where)


def kto(
    logps: jax.Array,
    ref_logps: jax.Array,
    kl_logps: jax.Array,
    ref_kl_logps: jax.Array,
    labels: jax.Array,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    where: jax.Array | None = None,
    kl_where: jax.Array | None = None,
) -> jax.Array:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306, Eq. 7).

    With ``y'`` the responses of the same batch, each answering another one's prompt::

        z    = max(0, mean(log pi_theta(y'|x) - log pi_ref(y'|x)))     no gradient
        loss = lambda_D (1 - sigmoid(beta (lr - z)))    if desirable
               lambda_U (1 - sigmoid(beta (z - lr)))    otherwise

    The arrays must hold the whole global batch, because ``z`` is its mean; a step that
    sees the batch in pieces estimates ``z`` first and calls `kto_at_reference_point`.

    Args:
      kl_logps: summed policy log-probabilities of the mismatched responses, of which
        `ref_kl_logps` and the mask `kl_where` have the shape.

    >>> at_start = jnp.array([-3.0, -5.0])
    >>> kto(at_start, at_start, at_start, at_start, jnp.array([1, 0]), beta=0.1)
    Array([0.5, 0.5], dtype=float32)
    """
    kl = log_ratios(kl_logps, ref_kl_logps, kl_where)
    count = kl.size if kl_where is None else jnp.maximum(jnp.sum(kl_where), 1.0)
    z = jnp.maximum(jnp.sum(kl) / count, 0.0)
    return kto_at_reference_point(
        logps,
        ref_logps,
        z,
        labels,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        where=where,
    )


def apo_zero_unpaired(
    logps: jax.Array,
    ref_logps: jax.Array,
    labels: jax.Array,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """APO-zero on single trajectories (D'Oosterlinck et al. 2024, arXiv 2408.06266).

    `kto` with its reference point at zero, so that no mismatched response is needed::

        loss = lambda_D (1 - sigmoid(beta lr))    if desirable
               lambda_U sigmoid(beta lr)          otherwise

    >>> equal = jnp.array([-3.0, -5.0])
    >>> apo_zero_unpaired(equal, equal, jnp.array([1, 0]), beta=0.1)
    Array([0.5, 0.5], dtype=float32)
    """
    return kto_at_reference_point(
        logps,
        ref_logps,
        jnp.zeros(()),
        labels,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        where=where,
    )


def bco(
    logps: jax.Array,
    ref_logps: jax.Array,
    labels: jax.Array,
    reward_shift: jax.Array | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Binary classifier optimisation (Jung et al. 2024, arXiv 2404.04656).

    A classifier of thumbs whose logit is the implicit reward::

        loss = -lambda_D log sigmoid(beta lr - shift)     if desirable
               -lambda_U log sigmoid(shift - beta lr)     otherwise

    Args:
      reward_shift: the mean of ``beta lr`` over what has been seen so far, a scalar; no
        gradient flows to it.

    >>> equal = jnp.array([-3.0, -5.0])
    >>> losses = bco(equal, equal, jnp.array([1, 0]), 0.0, beta=0.1)
    >>> [round(float(x), 4) for x in losses]
    [0.6931, 0.6931]
    """
    ratios = log_ratios(logps, ref_logps, where)
    chex.assert_equal_shape([ratios, labels])
    shift = jax.lax.stop_gradient(jnp.asarray(reward_shift, jnp.float32))
    desirable = labels > 0
    sign = jnp.where(desirable, 1.0, -1.0)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    losses = -weight * jax.nn.log_sigmoid(sign * (beta * ratios - shift))
    return masked(losses, where)
