"""Losses on preference pairs: a chosen and a rejected response to one prompt.

Notation, with ``w`` the chosen and ``l`` the rejected response, all log-probabilities
summed over a response's tokens, EOS included::

    lr    = log pi_theta(y|x) - log pi_ref(y|x)        the log-ratio of one response
    delta = lr_w - lr_l                                the margin, before beta

Some functions see the margin alone, which lets both log-probabilities fall together;
others anchor the chosen response, the rejected one, or both, to the reference.

Every function is pure and unreduced: arrays in, one float32 loss per pair out. They
share these arguments:

* ``chosen_logps``, ``rejected_logps``: the policy's log-probabilities, any shape;
* ``ref_chosen_logps``, ``ref_rejected_logps``: the reference policy's, same shape; no
  gradient flows to them;
* ``beta``: strength of the KL constraint, in 1/nat;
* ``where``: mask, same shape; zero entries give a zero loss and no gradient.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

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


def masked(values: jax.Array, where: jax.Array | None) -> jax.Array:
    """Zeroes values where the mask is zero.

    Masks both what enters a loss's non-linearity and what leaves it: a NaN that is
    masked only at the end still turns the gradient into NaN.
    """
    return values if where is None else jnp.where(where.astype(bool), values, 0.0)


def _of_log_ratios(loss: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Makes ``loss(lr_w, lr_l, ...)`` one of four log-probabilities and a mask."""
    parameters = inspect.signature(loss).parameters

    @functools.wraps(loss)
    def of_logps(
        chosen_logps: jax.Array,
        rejected_logps: jax.Array,
        ref_chosen_logps: jax.Array,
        ref_rejected_logps: jax.Array,
        *,
        where: jax.Array | None = None,
        **settings: Any,
    ) -> jax.Array:
        chex.assert_equal_shape([chosen_logps, rejected_logps])
        chosen = log_ratios(chosen_logps, ref_chosen_logps, where)
        rejected = log_ratios(rejected_logps, ref_rejected_logps, where)
        if "where" in parameters:  # it masks what it adds to them
            settings["where"] = where
        return masked(loss(chosen, rejected, **settings), where)

    # What `help` shows is what is called, the loss's own settings included.
    del of_logps.__wrapped__
    own = inspect.signature(of_logps)
    *logps, where, _ = own.parameters.values()
    settings = [p for p in list(parameters.values())[2:] if p.name != "where"]
    of_logps.__signature__ = own.replace(parameters=[*logps, *settings, where])
    return of_logps


@_of_log_ratios
def dpo(
    chosen: jax.Array,
    rejected: jax.Array,
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

    >>> losses = dpo(*jnp.array([-10.0, -12.0, -11.0, -11.5]), beta=0.1)
    >>> round(float(losses), 5)
    0.62096
    """
    scaled = beta * (chosen - rejected) + jax.lax.stop_gradient(offset)
    scaled = masked(scaled, where)
    losses = -(1.0 - label_smoothing) * jax.nn.log_sigmoid(scaled)
    return losses - label_smoothing * jax.nn.log_sigmoid(-scaled)


@_of_log_ratios
def hinge(chosen: jax.Array, rejected: jax.Array, *, beta: float) -> jax.Array:
    """The hinge on the log-ratio margin: SLiC with a reference (arXiv 2305.10425).

    A pair whose scaled margin exceeds 1 costs nothing and moves nothing::

        loss = relu(1 - beta delta)    beta: one over the margin asked for

    >>> hinge(*jnp.array([-10.0, -12.0, -11.0, -11.5]), beta=0.1)
    Array(0.85, dtype=float32)
    """
    return jax.nn.relu(1.0 - beta * (chosen - rejected))


@_of_log_ratios
def robust_dpo(
    chosen: jax.Array, rejected: jax.Array, *, beta: float, label_smoothing: float = 0.1
) -> jax.Array:
    """Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409).

    Unbiased for DPO's loss on clean labels when each label is flipped with probability
    ``eps = label_smoothing``, in ``[0, 0.5)``; in return it is unbounded below::

        loss = (-(1 - eps) log sigmoid(z) + eps log sigmoid(-z)) / (1 - 2 eps),
        z    = beta delta

    >>> losses = robust_dpo(*jnp.array([-10.0, -12.0, -11.0, -11.5]), beta=0.1)
    >>> round(float(losses), 5)
    0.60221
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(
            f"robust_dpo needs a flip probability in [0, 0.5), got {label_smoothing}: "
            "at 0.5 the labels say nothing."
        )
    scaled = beta * (chosen - rejected)
    losses = label_smoothing * jax.nn.log_sigmoid(-scaled)
    losses -= (1.0 - label_smoothing) * jax.nn.log_sigmoid(scaled)
    return losses / (1.0 - 2.0 * label_smoothing)


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
      chosen_lengths: tokens of the chosen responses, same shape; needed to normalise,
        as are those of the rejected ones.

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
    chosen, rejected = (log_ratios(*pair, where) for pair in (logps[::2], logps[1::2]))
    h = chosen - rejected
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


@_of_log_ratios
def exo_pair(
    chosen: jax.Array,
    rejected: jax.Array,
    *,
    beta: float,
    label_smoothing: float = 1e-3,
) -> jax.Array:
    """Efficient exact optimisation on pairs (Ji et al. 2024, arXiv 2402.00856, Eq. 16).

    The *reverse* KL from the policy's preference to the smoothed label, where DPO is
    the forward one. With ``p = sigmoid(beta delta)`` and ``eps = label_smoothing`` in
    ``(0, 0.5)``, which bounds the target away from 0::

        loss = p (log p - log(1 - eps)) + (1 - p) (log(1 - p) - log eps)

    >>> losses = exo_pair(*jnp.array([-10.0, -12.0, -11.0, -11.5]), beta=0.1)
    >>> round(float(losses), 4)
    2.5055
    """
    if not 0.0 < label_smoothing < 0.5:
        raise ValueError(
            f"exo_pair needs label_smoothing in (0, 0.5), got {label_smoothing}: its "
            "reverse KL is infinite at 0."
        )
    scaled = beta * (chosen - rejected)
    log_p, log_q = jax.nn.log_sigmoid(scaled), jax.nn.log_sigmoid(-scaled)
    losses = jnp.exp(log_p) * (log_p - jnp.log1p(-label_smoothing))
    return losses + jnp.exp(log_q) * (log_q - jnp.log(label_smoothing))


@_of_log_ratios
def nca_pair(chosen: jax.Array, rejected: jax.Array, *, beta: float) -> jax.Array:
    """Noise contrastive alignment on pairs (Chen et al. 2024, arXiv 2402.05369).

    Each response is told from the reference by itself, so the chosen one's likelihood
    is held up::

        loss = -log sigmoid(beta lr_w)
               - (log sigmoid(-beta lr_w) + log sigmoid(-beta lr_l)) / 2

    >>> losses = nca_pair(*jnp.array([-10.0, -12.0, -11.0, -11.5]), beta=0.1)
    >>> round(float(losses), 5)
    1.35082
    """
    down = jax.nn.log_sigmoid(-beta * chosen) + jax.nn.log_sigmoid(-beta * rejected)
    return -jax.nn.log_sigmoid(beta * chosen) - 0.5 * down


@_of_log_ratios
def sppo_hard(chosen: jax.Array, rejected: jax.Array, *, beta: float) -> jax.Array:
    """Self-play preference optimisation, hard labels (SPPO; Wu et al. 2024).

    Each log-ratio is regressed on its side's win probability, taken as 1 and 0
    (arXiv 2405.00675; ``beta`` is one over the paper's ``eta``)::

        loss = (lr_w - 1 / (2 beta))^2 + (lr_l + 1 / (2 beta))^2

    >>> sppo_hard(*jnp.array([-10.0, -12.0, -11.0, -11.5]), beta=0.1)
    Array(36.25, dtype=float32)
    """
    target = 0.5 / beta
    return jnp.square(chosen - target) + jnp.square(rejected + target)


@_of_log_ratios
def apo_zero(chosen: jax.Array, rejected: jax.Array, *, beta: float) -> jax.Array:
    """Anchored preference optimisation, APO-zero (D'Oosterlinck et al. 2024).

    For chosen responses better than what the policy writes: raises them and lowers the
    rejected ones (arXiv 2408.06266, Eq. 7)::

        loss = 1 - sigmoid(beta lr_w) + sigmoid(beta lr_l)

    >>> losses = apo_zero(*jnp.array([-10.0, -12.0, -11.0, -11.5]), beta=0.1)
    >>> round(float(losses), 5)
    0.96252
    """
    return 1.0 - jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(beta * rejected)


@_of_log_ratios
def apo_down(chosen: jax.Array, rejected: jax.Array, *, beta: float) -> jax.Array:
    """Anchored preference optimisation, APO-down (D'Oosterlinck et al. 2024).

    For chosen responses worse than what the policy writes: lowers both, the rejected
    ones more (arXiv 2408.06266, Eq. 8)::

        loss = sigmoid(beta lr_w) + 1 - sigmoid(beta delta)

    >>> losses = apo_down(*jnp.array([-10.0, -12.0, -11.0, -11.5]), beta=0.1)
    >>> round(float(losses), 5)
    0.98755
    """
    losses = 1.0 + jax.nn.sigmoid(beta * chosen)
    return losses - jax.nn.sigmoid(beta * (chosen - rejected))
