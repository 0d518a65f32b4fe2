"""Maximum likelihood."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import optax

__all__ = ["cross_entropy"]


def cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Token cross-entropy with T5X's label smoothing and z-loss.

    With ``q`` putting ``1 - eps`` on the target and ``eps / (V - 1)`` on every other
    token::

        loss = -sum_v q_v log p_v - H(q) + z_loss * (logsumexp logits)^2

    The entropy ``H(q)`` is a constant that makes the best loss zero, as T5X does.

    Args:
      logits: ``[..., V]``.
      targets: ``[...]`` token ids.
      label_smoothing: ``eps`` in ``[0, 1)``.
      z_loss: weight of the penalty that keeps the log-normaliser near zero.
      where: mask ``[...]``.

    Returns:
      One float32 loss per token, in nats.

    >>> cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))
    Array([1.3862944], dtype=float32)
    """
    chex.assert_rank(targets, logits.ndim - 1)
    logits = logits.astype(jnp.float32)
    size = logits.shape[-1]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    if label_smoothing:
        on, off = 1.0 - label_smoothing, label_smoothing / (size - 1)
        uniform = size * log_z - jnp.sum(logits, axis=-1)
        entropy = -on * jnp.log(on) - label_smoothing * jnp.log(off)
        losses = (on - off) * losses + off * uniform - entropy
    if z_loss:
        losses = losses + z_loss * jnp.square(log_z)
    return losses if where is None else jnp.where(where.astype(bool), losses, 0.0)
