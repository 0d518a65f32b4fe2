"""Losses on single trajectories: one response, judged by a label or a scalar reward.

Log-probabilities are summed over a response's tokens, EOS included; ``lr`` is the
log-ratio ``log pi_theta(y|x) - log pi_ref(y|x)``. Every function is pure and unreduced.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jaxalign.losses.pairwise import masked

__all__ = ["dro_v", "kto", "kto_at_reference_point", "log_ratios"]


def log_ratios(
    logps: jax.Array, ref_logps: jax.Array, where: jax.Array | None = None
) -> jax.Array:
    """``lr = logps - stop_gradient(ref_logps)`` in float32; 0 where masked."""
    chex.assert_equal_shape([logps, ref_logps])
    chex.assert_type([logps, ref_logps], float)
    logps, ref_logps = (jnp.asarray(x, jnp.float32) for x in (logps, ref_logps))
    return masked(logps - jax.lax.stop_gradient(ref_logps), where)


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
    """`kto` with the reference point ``z`` already estimated.

    Args:
      logps: summed policy log-probabilities, any shape.
      ref_logps: the reference policy's, same shape.
      reference_point: scalar ``z >= 0`` in nats; no gradient flows to it.
      labels: 1 for desirable, 0 for undesirable, same shape.
      beta: strength of the KL constraint, in 1/nat.
      desirable_weight: ``lambda_D``.
      undesirable_weight: ``lambda_U``.
      where: mask, same shape.

    Returns:
      One float32 loss per response.
    """
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
      logps: summed policy log-probabilities, any shape.
      ref_logps: the reference policy's, same shape.
      kl_logps: summed policy log-probabilities of the mismatched responses.
      ref_kl_logps: the reference policy's, same shape as `kl_logps`.
      labels: 1 for desirable, 0 for undesirable, same shape as `logps`.
      beta: strength of the KL constraint, in 1/nat.
      desirable_weight: ``lambda_D``.
      undesirable_weight: ``lambda_U``.
      where: mask on the responses.
      kl_where: mask on the mismatched responses.

    Returns:
      One float32 loss per response; reduce by the mean over all of them.

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


def dro_v(
    logps: jax.Array,
    ref_logps: jax.Array,
    values: jax.Array,
    rewards: jax.Array,
    *,
    tau: float,
    rescale: bool = True,
    where: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Direct reward optimisation with a value (Richemond et al., arXiv 2405.19107).

    With the residual ``d = r - V(x) - tau lr`` (Eq. 4 minimises its square)::

        policy = (sg(r - V) - tau lr)^2 / (2 tau)       d/d logps = -d   (Eq. 8 / tau)
        value  = (V - sg(r - tau lr))^2 / 2             d/dV      = -d   (Eq. 7)

    Because the responses come from an unknown behaviour policy, ``V`` is what makes the
    optimum unbiased, not a variance-reducing baseline: do not drop it.

    Args:
      logps: summed policy log-probabilities, any shape. Sums, not means: a mean would
        change ``tau`` by a factor of the length.
      ref_logps: the reference policy's, same shape.
      values: the value of each response's prompt, same shape, in units of the reward.
      rewards: scalar rewards, same shape.
      tau: strength of the KL constraint, in units of the reward per nat.
      rescale: divide the policy term by ``tau``, as the paper's Algorithm 1 does;
        without it, the policy gradient is ``-tau d``.
      where: mask, same shape.

    Returns:
      ``(policy_losses, value_losses)``, float32, one of each per response.

    >>> dro_v(jnp.array([-3.0]), jnp.array([-3.5]), jnp.array([0.2]), jnp.array([1.0]),
    ...       tau=0.5, rescale=False)
    (Array([0.15125], dtype=float32), Array([0.15125], dtype=float32))
    """
    ratios = log_ratios(logps, ref_logps, where)
    values, rewards = (jnp.asarray(x, jnp.float32) for x in (values, rewards))
    chex.assert_equal_shape([ratios, values, rewards])
    stop = jax.lax.stop_gradient
    policy_losses = 0.5 * jnp.square(stop(rewards - values) - tau * ratios)
    if rescale:
        policy_losses = policy_losses / tau
    value_losses = 0.5 * jnp.square(values - stop(rewards - tau * ratios))
    return masked(policy_losses, where), masked(value_losses, where)
