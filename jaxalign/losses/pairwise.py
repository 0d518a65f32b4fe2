"""Losses on preference pairs: a chosen and a rejected response to one prompt.

Notation, with ``w`` the chosen and ``l`` the rejected response, all log-probabilities
summed over a response's tokens, EOS included::

    lr    = log pi_theta(y|x) - log pi_ref(y|x)        the log-ratio of one response
    delta = lr_w - lr_l                                the margin, before beta

Every function is pure and unreduced: arrays in, one float32 loss per pair out. They
share these arguments:

* ``chosen_logps``, ``rejected_logps``: the policy's log-probabilities, any shape;
* ``ref_chosen_logps``, ``ref_rejected_logps``: the reference policy's, same shape; no
  gradient flows to them;
* ``beta``: strength of the KL constraint, in 1/nat;
* ``where``: mask, same shape; zero entries give a zero loss and no gradient.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def log_ratios(
    logps: jax.Array, ref_logps: jax.Array, where: jax.Array | None = None
) -> jax.Array:
    """``lr = logps - stop_gradient(ref_logps)`` in float32; 0 where masked."""
    chex.assert_equal_shape([logps, ref_logps])
    chex.assert_type([logps, ref_logps], float)
    logps, ref_logps = (jnp.asarray(x, jnp.float32) for x in (logps, ref_logps))
    return masked(logps - jax.lax.stop_gradient(ref_logps), where)


def margins(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    where: jax.Array | None = None,
) -> jax.Array:
    """The log-ratio margin ``delta`` in nats; the reference is under stop-gradient."""
    chex.assert_equal_shape([chosen_logps, rejected_logps])
    chosen = log_ratios(chosen_logps, ref_chosen_logps, where)
    return chosen - log_ratios(rejected_logps, ref_rejected_logps, where)


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
    offset: jax.Array | float = 0.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7).

    With ``eps`` the label smoothing (conservative DPO when positive)::

        z    = beta delta + offset
        loss = -(1 - eps) log sigmoid(z) - eps log sigmoid(-z)

    Args:
      label_smoothing: assumed probability in ``[0, 0.5)`` that a label is flipped.
      offset: added to the scaled margin, broadcast to it: ``alpha (|y_w| - |y_l|)`` is
        length-regularised DPO (Park et al. 2024, arXiv 2403.19159), minus a
        margin is ODPO (Amini et al. 2024, arXiv 2402.10571).

    >>> losses = dpo(jnp.array([-10.0]), jnp.array([-12.0]), jnp.array([-11.0]),
    ...              jnp.array([-11.5]), beta=0.1)
    >>> round(float(losses[0]), 5)
    0.62096
    """
    scaled = beta * margins(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, where
    )
    scaled = masked(scaled + jax.lax.stop_gradient(offset), where)
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
      beta: one over the margin asked for, in 1/nat.

    >>> hinge(jnp.array([-10.0]), jnp.array([-12.0]), jnp.array([-11.0]),
    ...       jnp.array([-11.5]), beta=0.1)
    Array([0.85], dtype=float32)
    """
    scaled = beta * margins(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, where
    )
    return masked(jax.nn.relu(1.0 - scaled), where)


def robust_dpo(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float,
    label_smoothing: float = 0.1,
    where: jax.Array | None = None,
) -> jax.Array:
    """Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409).

    Unbiased for DPO's loss on clean labels when each label is flipped with probability
    ``eps``; the price is that the loss is unbounded below::

        loss = (-(1 - eps) log sigmoid(z) + eps log sigmoid(-z)) / (1 - 2 eps),
        z    = beta delta

    Args:
      label_smoothing: the flip probability ``eps`` in ``[0, 0.5)``.

    Raises:
      ValueError: a flip probability outside ``[0, 0.5)``.

    >>> losses = robust_dpo(jnp.array([-10.0]), jnp.array([-12.0]),
    ...                     jnp.array([-11.0]), jnp.array([-11.5]), beta=0.1)
    >>> round(float(losses[0]), 5)
    0.60221
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(
            f"robust_dpo needs a flip probability in [0, 0.5), got {label_smoothing}: "
            "at 0.5 the labels say nothing."
        )
    scaled = beta * margins(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, where
    )
    losses = (
        label_smoothing * jax.nn.log_sigmoid(-scaled)
        - (1.0 - label_smoothing) * jax.nn.log_sigmoid(scaled)
    ) / (1.0 - 2.0 * label_smoothing)
    return masked(losses, where)


def ipo(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float,
    length_normalize: bool = True,
    chosen_lengths: jax.Array | None = None,
    rejected_lengths: jax.Array | None = None,
    where: jax.Array | None = None,
) -> jax.Array:
    """Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036, Eq. 17).

    The margin is regressed on a constant, so it stays finite where all labels agree::

        loss = (h - 1 / (2 beta))^2

    ``h`` is the difference of the two log-ratios *per token* (what the authors meant,
    huggingface/trl#1265), or ``delta``, the paper's letter, without normalisation.

    Args:
      beta: the paper's ``tau``.
      length_normalize: divide each log-ratio by the number of its tokens.
      chosen_lengths: tokens of the chosen responses, same shape; needed to normalise.
      rejected_lengths: tokens of the rejected responses.

    Raises:
      ValueError: normalisation without lengths.

    >>> ipo(jnp.array([-10.0]), jnp.array([-12.0]), jnp.array([-11.0]),
    ...     jnp.array([-11.5]), beta=0.1, length_normalize=False)
    Array([12.25], dtype=float32)
    """
    logps = [chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps]
    if length_normalize:
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError(
                "ipo(length_normalize=True) needs chosen_lengths and rejected_lengths; "
                "pass them, or length_normalize=False for sums."
            )
        chosen = jnp.maximum(chosen_lengths, 1)
        rejected = jnp.maximum(rejected_lengths, 1)
        logps = [x / n for x, n in zip(logps, 2 * [chosen, rejected], strict=True)]
    h = margins(*logps, where)
    return masked(jnp.square(h - 1.0 / (2.0 * beta)), where)


def dpo_nll(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float,
    chosen_lengths: jax.Array,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """DPO with the chosen response's likelihood (Pang et al. 2024, arXiv 2404.19733).

    The second term keeps the chosen response from becoming less likely, which a loss of
    the margin alone allows::

        loss = dpo - alpha log pi_theta(y_w|x) / |y_w|

    Args:
      chosen_lengths: tokens of the chosen responses, same shape.
      alpha: weight of the likelihood.

    >>> losses = dpo_nll(jnp.array([-10.0]), jnp.array([-12.0]), jnp.array([-11.0]),
    ...                  jnp.array([-11.5]), beta=0.1, chosen_lengths=jnp.array([5]))
    >>> round(float(losses[0]), 5)
    2.62096
    """
    chex.assert_equal_shape([chosen_logps, chosen_lengths])
    nll = -masked(chosen_logps.astype(jnp.float32), where)
    nll = nll / jnp.maximum(chosen_lengths, 1)
    return alpha * nll + dpo(
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        beta=beta,
        label_smoothing=label_smoothing,
        where=where,
    )
