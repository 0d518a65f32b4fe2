"""Pair losses without a reference policy: the policy's own log-probabilities only.

Each takes ``(chosen_logps, rejected_logps)`` of any shape, as *sums* or as *means* over
a response's tokens (EOS included): its docstring says which, because that is where
implementations differ silently. CPO, ORPO and SLiC add the chosen response's negative
log-likelihood, averaged over tokens; objectives add that term. Zero entries of the mask
``where`` give a zero loss and no gradient.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jaxalign.losses.pairwise import masked


def _pair(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    where: jax.Array | None,
    fill: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Both in float32, with a harmless number where they are masked."""
    chex.assert_equal_shape([chosen_logps, rejected_logps])
    chex.assert_type([chosen_logps, rejected_logps], float)
    pair = [jnp.asarray(x, jnp.float32) for x in (chosen_logps, rejected_logps)]
    if where is not None:
        pair = [jnp.where(where.astype(bool), x, fill) for x in pair]
    return tuple(pair)


def cpo(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Contrastive preference optimisation (Xu et al. 2024, arXiv 2401.08417).

    DPO with a uniform reference. With ``z = beta (l_w - l_l)``::

        loss = -(1 - eps) log sigmoid(z) - eps log sigmoid(-z)

    Args:
      chosen_logps: *summed* log-probabilities of the chosen responses.
      label_smoothing: assumed probability ``eps`` that a label is flipped.

    >>> round(float(cpo(*jnp.array([-10.0, -12.0]), beta=0.1)), 5)
    0.59814
    """
    chosen, rejected = _pair(chosen_logps, rejected_logps, where)
    z = beta * (chosen - rejected)
    losses = -(1.0 - label_smoothing) * jax.nn.log_sigmoid(z)
    losses -= label_smoothing * jax.nn.log_sigmoid(-z)
    return masked(losses, where)


def simpo(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    *,
    beta: float,
    gamma: float,
    where: jax.Array | None = None,
) -> jax.Array:
    """SimPO (Meng et al. 2024, arXiv 2405.14734, Eq. 6).

    The reward is the mean log-probability, which is what generation maximises::

        loss = -log sigmoid(beta (lbar_w - lbar_l) - gamma)

    Args:
      chosen_logps: *mean* log-probabilities per token of the chosen responses.
      beta: in tokens per nat; 2 to 10, since means are small.
      gamma: the target margin, not divided by ``beta`` (the authors' code names
        ``gamma / beta``); 0.3 to 0.8 times ``beta`` in the paper.

    >>> round(float(simpo(*jnp.array([-2.0, -3.0]), beta=2.0, gamma=0.5)), 5)
    0.20141
    """
    chosen, rejected = _pair(chosen_logps, rejected_logps, where)
    return masked(-jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma), where)


def _log_odds(mean_logps: jax.Array) -> jax.Array:
    """``log(p / (1 - p))`` of a mean log-probability, finite at ``p = 1``."""
    bounded = jnp.minimum(mean_logps, -1e-6)
    return bounded - jnp.log(-jnp.expm1(bounded))


def orpo(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    *,
    beta: float,
    where: jax.Array | None = None,
) -> jax.Array:
    """The odds-ratio term of ORPO (Hong et al. 2024, arXiv 2403.07691, Eq. 7).

    With ``odds = p / (1 - p)`` and ``p = exp`` of the mean log-probability::

        loss = -beta log sigmoid(log odds_w - log odds_l)

    Args:
      chosen_logps: *mean* log-probabilities per token of the chosen responses;
        bounded above by -1e-6, where the odds would be infinite.
      beta: the paper's ``lambda``, the weight of this term beside the likelihood.

    >>> round(float(orpo(*jnp.array([-2.0, -3.0]), beta=0.1)), 6)
    0.028875
    """
    # Zero is where the odds end; masked pairs stand elsewhere.
    chosen, rejected = _pair(chosen_logps, rejected_logps, where, fill=-1.0)
    ratio = _log_odds(chosen) - _log_odds(rejected)
    return masked(-beta * jax.nn.log_sigmoid(ratio), where)


def slic_hf(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    *,
    beta: float = 1.0,
    delta: float = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """The calibration term of SLiC-HF (Zhao et al. 2023, arXiv 2305.10425).

    On *summed* log-probabilities, with ``beta`` 1 in the paper::

        loss = relu(delta - beta (l_w - l_l))

    >>> slic_hf(jnp.array([-10.0]), jnp.array([-10.5]))
    Array([0.5], dtype=float32)
    """
    chosen, rejected = _pair(chosen_logps, rejected_logps, where)
    return masked(jax.nn.relu(delta - beta * (chosen - rejected)), where)
