"""Pair losses that hold each response's own log-ratio, not only their difference.

A function of the margin alone lets both log-probabilities fall together. These anchor
the chosen response, the rejected one, or both, to the reference. Notation and
shared arguments are those of `jaxalign.losses.pairwise`: sums of log-probabilities, EOS
included; ``lr_w`` and ``lr_l`` are the log-ratios of chosen and rejected response and
``delta`` their difference.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.losses.pairwise import log_ratios, margins, masked


def exo_pair(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float,
    label_smoothing: float = 1e-3,
    where: jax.Array | None = None,
) -> jax.Array:
    """Efficient exact optimisation on pairs (Ji et al. 2024, arXiv 2402.00856, Eq. 16).

    The *reverse* KL from the policy's preference to the smoothed label, where DPO is
    the forward one. With ``p = sigmoid(beta delta)``::

        loss = p (log p - log(1 - eps)) + (1 - p) (log(1 - p) - log eps)

    Args:
      label_smoothing: ``eps`` in ``(0, 0.5)``; it bounds the target away from 0.

    Raises:
      ValueError: ``eps`` outside ``(0, 0.5)``.

    >>> losses = exo_pair(jnp.array([-10.0]), jnp.array([-12.0]), jnp.array([-11.0]),
    ...                   jnp.array([-11.5]), beta=0.1)
    >>> round(float(losses[0]), 4)
    2.5055
    """
    if not 0.0 < label_smoothing < 0.5:
        raise ValueError(
            f"exo_pair needs label_smoothing in (0, 0.5), got {label_smoothing}: its "
            "reverse KL is infinite at 0."
        )
    scaled = beta * margins(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, where
    )
    log_p, log_q = jax.nn.log_sigmoid(scaled), jax.nn.log_sigmoid(-scaled)
    losses = jnp.exp(log_p) * (log_p - jnp.log1p(-label_smoothing)) + jnp.exp(log_q) * (
        log_q - jnp.log(label_smoothing)
    )
    return masked(losses, where)


def nca_pair(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float,
    where: jax.Array | None = None,
) -> jax.Array:
    """Noise contrastive alignment on pairs (Chen et al. 2024, arXiv 2402.05369).

    Each response is told from the reference by itself, so the chosen one's likelihood
    is held up::

        loss = -log sigmoid(beta lr_w)
               - (log sigmoid(-beta lr_w) + log sigmoid(-beta lr_l)) / 2

    >>> losses = nca_pair(jnp.array([-10.0]), jnp.array([-12.0]), jnp.array([-11.0]),
    ...                   jnp.array([-11.5]), beta=0.1)
    >>> round(float(losses[0]), 5)
    1.35082
    """
    chosen = log_ratios(chosen_logps, ref_chosen_logps, where)
    rejected = log_ratios(rejected_logps, ref_rejected_logps, where)
    losses = -jax.nn.log_sigmoid(beta * chosen) - 0.5 * (
        jax.nn.log_sigmoid(-beta * chosen) + jax.nn.log_sigmoid(-beta * rejected)
    )
    return masked(losses, where)


def sppo_hard(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float,
    where: jax.Array | None = None,
) -> jax.Array:
    """Self-play preference optimisation, hard labels (SPPO; Wu et al. 2024).

    Each log-ratio is regressed on its side's win probability, taken as 1 and 0
    (arXiv 2405.00675)::

        loss = (lr_w - 1 / (2 beta))^2 + (lr_l + 1 / (2 beta))^2

    Args:
      beta: one over the paper's ``eta``.

    >>> sppo_hard(jnp.array([-10.0]), jnp.array([-12.0]), jnp.array([-11.0]),
    ...           jnp.array([-11.5]), beta=0.1)
    Array([36.25], dtype=float32)
    """
    chosen = log_ratios(chosen_logps, ref_chosen_logps, where)
    rejected = log_ratios(rejected_logps, ref_rejected_logps, where)
    target = 0.5 / beta
    losses = jnp.square(chosen - target) + jnp.square(rejected + target)
    return masked(losses, where)


def apo_zero(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float,
    where: jax.Array | None = None,
) -> jax.Array:
    """Anchored preference optimisation, APO-zero (D'Oosterlinck et al. 2024).

    For chosen responses better than what the policy writes: raises them and lowers the
    rejected ones (arXiv 2408.06266, Eq. 7)::

        loss = 1 - sigmoid(beta lr_w) + sigmoid(beta lr_l)

    >>> losses = apo_zero(jnp.array([-10.0]), jnp.array([-12.0]), jnp.array([-11.0]),
    ...                   jnp.array([-11.5]), beta=0.1)
    >>> round(float(losses[0]), 5)
    0.96252
    """
    chosen = log_ratios(chosen_logps, ref_chosen_logps, where)
    rejected = log_ratios(rejected_logps, ref_rejected_logps, where)
    losses = 1.0 - jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(beta * rejected)
    return masked(losses, where)


def apo_down(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float,
    where: jax.Array | None = None,
) -> jax.Array:
    """Anchored preference optimisation, APO-down (D'Oosterlinck et al. 2024).

    For chosen responses worse than what the policy writes: lowers both, the rejected
    ones more (arXiv 2408.06266, Eq. 8)::

        loss = sigmoid(beta lr_w) + 1 - sigmoid(beta delta)

    >>> losses = apo_down(jnp.array([-10.0]), jnp.array([-12.0]), jnp.array([-11.0]),
    ...                   jnp.array([-11.5]), beta=0.1)
    >>> round(float(losses[0]), 5)
    0.98755
    """
    chosen = log_ratios(chosen_logps, ref_chosen_logps, where)
    rejected = log_ratios(rejected_logps, ref_rejected_logps, where)
    losses = 1.0 + jax.nn.sigmoid(beta * chosen)
    losses -= jax.nn.sigmoid(beta * (chosen - rejected))
    return masked(losses, where)
