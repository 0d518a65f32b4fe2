"""Losses on preference pairs: a chosen and a rejected response to one prompt.

Notation, with ``w`` the chosen and ``l`` the rejected response, all log-probabilities
summed over a response's tokens, EOS included::

    lr    = log pi_theta(y|x) - log pi_ref(y|x)        the log-ratio of one response
    delta = lr_w - lr_l                                the margin, before beta

Every function is pure and unreduced: arrays in, one float32 loss per pair out.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

__all__ = ["dpo", "hinge", "margins"]


def margins(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    where: jax.Array | None = None,
) -> jax.Array:
    """The log-ratio margin ``delta`` in nats, with the reference under stop-gradient.

    Args:
      chosen_logps: summed policy log-probabilities of the chosen responses, any shape.
      rejected_logps: the same for the rejected ones.
      ref_chosen_logps: the reference policy's, same shape.
      ref_rejected_logps: the reference policy's, same shape.
      where: mask, same shape; the margin is 0 where it is zero.

    Returns:
      Float32 margins of the same shape.
    """
    arrays = [chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps]
    chex.assert_equal_shape(arrays)
    chex.assert_type(arrays, float)
    chosen, rejected, ref_chosen, ref_rejected = (
        x.astype(jnp.float32) for x in map(jnp.asarray, arrays)
    )
    ref_chosen, ref_rejected = jax.lax.stop_gradient((ref_chosen, ref_rejected))
    return masked((chosen - ref_chosen) - (rejected - ref_rejected), where)


def masked(values: jax.Array, where: jax.Array | None) -> jax.Array:
    """Zeroes values where the mask is zero.

    Masks both what enters a loss's non-linearity and what leaves it: a NaN that is
    masked only at the end still turns the gradient into NaN.
    """
    return values if where is None else jnp.where(where.astype(bool), values, 0.0)


def dpo(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7).

    With ``eps`` the label smoothing (conservative DPO when positive)::

        loss = -(1 - eps) log sigmoid(beta delta) - eps log sigmoid(-beta delta)

    Args:
      chosen_logps: summed policy log-probabilities of the chosen responses, any shape.
      rejected_logps: the same for the rejected ones.
      ref_chosen_logps: the reference policy's, same shape; no gradient flows to it.
      ref_rejected_logps: the reference policy's, same shape; no gradient flows to it.
      beta: strength of the KL constraint, in 1/nat.
      label_smoothing: assumed probability in ``[0, 0.5)`` that a label is flipped.
      where: mask, same shape; zero entries give a zero loss and no gradient.

    Returns:
      One float32 loss per pair.

    >>> losses = dpo(jnp.array([-10.0]), jnp.array([-12.0]), jnp.array([-11.0]),
    ...              jnp.array([-11.5]), beta=0.1)
    >>> round(float(losses[0]), 5)
    0.62096
    """
    scaled = beta * margins(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, where
    )
    losses = -(1.0 - label_smoothing) * jax.nn.log_sigmoid(
        scaled
    ) - label_smoothing * jax.nn.log_sigmoid(-scaled)
    return masked(losses, where)


def hinge(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float,
    where: jax.Array | None = None,
) -> jax.Array:
    """The hinge on the log-ratio margin: SLiC with a reference (arXiv 2305.10425).

    A pair whose scaled margin exceeds 1 costs nothing and moves nothing::

        loss = relu(1 - beta delta)

    Args:
      chosen_logps: summed policy log-probabilities of the chosen responses, any shape.
      rejected_logps: the same for the rejected ones.
      ref_chosen_logps: the reference policy's, same shape; no gradient flows to it.
      ref_rejected_logps: the reference policy's, same shape; no gradient flows to it.
      beta: one over the margin asked for, in 1/nat.
      where: mask, same shape; zero entries give a zero loss and no gradient.

    Returns:
      One float32 loss per pair.

    >>> hinge(jnp.array([-10.0]), jnp.array([-12.0]), jnp.array([-11.0]),
    ...       jnp.array([-11.5]), beta=0.1)
    Array([0.85], dtype=float32)
    """
    scaled = beta * margins(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, where
    )
    return masked(jax.nn.relu(1.0 - scaled), where)
