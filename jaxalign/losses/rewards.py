"""Losses on single trajectories with scalar rewards: regression, and weighting.

As in `jaxalign.losses.pairwise`, with one float32 loss per response out of

* ``logps`` and ``ref_logps``, sums over its tokens: means would change ``tau`` by a
  factor of the length;
* ``rewards``: scalar rewards, same shape;
* ``tau``: strength of the KL constraint, in units of the reward per nat.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jaxalign.losses.pairwise import log_ratios, masked


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
      values: the value of each response's prompt, same shape, in units of the reward.
      rescale: divide the policy term by ``tau``, as the paper's Algorithm 1 does;
        without it, the policy gradient is ``-tau d``.

    Returns:
      ``(policy_losses, value_losses)``, one of each per response.

    >>> dro_v(jnp.array([-3.0]), jnp.array([-3.5]), jnp.array([0.2]), jnp.array([1.0]),
    ...       tau=0.5, rescale=False)
    (Array([0.15125], dtype=float32), Array([0.15125], dtype=float32))
    """
    ratios = log_ratios(logps, ref_logps, where)
    chex.assert_equal_shape([ratios, values, rewards])
    values, rewards = (
        masked(jnp.asarray(x, jnp.float32), where) for x in (values, rewards)
    )
    stop = jax.lax.stop_gradient
    policy_losses = 0.5 * jnp.square(stop(rewards - values) - tau * ratios)
    if rescale:
        policy_losses = policy_losses / tau
    value_losses = 0.5 * jnp.square(values - stop(rewards - tau * ratios))
    return masked(policy_losses, where), masked(value_losses, where)


def dro_p_at_mean(
    logps: jax.Array,
    ref_logps: jax.Array,
    rewards: jax.Array,
    mean: jax.Array,
    *,
    tau: float,
    where: jax.Array | None = None,
) -> jax.Array:
    """`dro_p` with the batch mean of ``u`` already estimated; no gradient flows to it.

    The gradient is that of the variance all the same, because deviations from a mean
    add up to zero.
    """
    u = masked(rewards, where) - tau * log_ratios(logps, ref_logps, where)
    return masked(0.5 * jnp.square(u - jax.lax.stop_gradient(mean)), where)


def dro_p(
    logps: jax.Array,
    ref_logps: jax.Array,
    rewards: jax.Array,
    *,
    tau: float,
    where: jax.Array | None = None,
) -> jax.Array:
    """DRO-P: direct reward optimisation without a value network (arXiv 2405.19107).

    The mean over the batch is half the variance of ``u = r - tau lr``, which at the
    optimum is constant where every prompt has the same value; the paper's appendix
    finds it weaker than `dro_v`::

        loss = (u - mean(u))^2 / 2    over the whole global batch

    >>> zeros = jnp.zeros(2)
    >>> dro_p(zeros, zeros, jnp.array([1.0, -1.0]), tau=1.0)
    Array([0.5, 0.5], dtype=float32)
    """
    u = masked(rewards - tau * log_ratios(logps, ref_logps, where), where)
    count = u.size if where is None else jnp.maximum(jnp.sum(where), 1.0)
    return dro_p_at_mean(
        logps, ref_logps, rewards, jnp.sum(u) / count, tau=tau, where=where
    )


def reward_weights(
    rewards: jax.Array,
    *,
    temperature: float,
    max_weight: float = 20.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Weights of reward-weighted regression (Peters & Schaal 2007) and AWR.

    ``min(exp(r / temperature), max_weight)``, 0 where masked; the bound is that of
    AWR's code (Peng et al. 2019, arXiv 1910.00177).

    Args:
      rewards: standardised rewards or advantages, any shape.
      temperature: in units of the reward; infinite weighs all the same.

    >>> reward_weights(jnp.array([0.0, 100.0]), temperature=1.0)
    Array([ 1., 20.], dtype=float32)
    """
    log_weights = masked(jnp.asarray(rewards, jnp.float32), where) / temperature
    return masked(jnp.exp(jnp.minimum(log_weights, jnp.log(max_weight))), where)
