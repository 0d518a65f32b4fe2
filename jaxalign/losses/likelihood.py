"""Maximum likelihood: of responses, and of texts that say why one was preferred."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jaxalign.losses.pairwise import masked

RATIONALE_TERMS = ("nll", "logsigmoid")


def cross_entropy(
    target_logits: jax.Array,
    log_z: jax.Array,
    *,
    mean_logits: jax.Array | None = None,
    vocab_size: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Token cross-entropy with T5X's label smoothing and z-loss.

    With ``q`` putting ``1 - eps`` on the target and ``eps / (V - 1)`` on every other
    token::

        loss = -sum_v q_v log p_v - H(q) + z_loss * log_z^2

    The entropy ``H(q)`` is a constant that makes the best loss zero, as T5X does. The
    three numbers of a token that this takes come from
    ``jaxalign.models.head_outputs``, which keeps no logits.

    Args:
      target_logits: ``[...]`` the target's logit.
      log_z: ``[...]`` ``logsumexp`` of the logits.
      mean_logits: ``[...]`` mean of the logits; needed where ``label_smoothing > 0``,
        as is ``vocab_size``, ``V``.
      label_smoothing: ``eps`` in ``[0, 1)``.
      z_loss: weight of the penalty that keeps the log-normaliser near zero.

    Returns:
      One float32 loss per token, in nats.

    >>> cross_entropy(jnp.zeros(1), jnp.log(jnp.array([4.0])))
    Array([1.3862944], dtype=float32)
    """
    chex.assert_equal_shape([target_logits, log_z])
    log_z = masked(log_z.astype(jnp.float32), where)
    losses = log_z - masked(target_logits.astype(jnp.float32), where)
    if label_smoothing:
        if mean_logits is None or vocab_size is None:
            raise ValueError(
                f"label_smoothing={label_smoothing} needs mean_logits and vocab_size."
            )
        on, off = 1.0 - label_smoothing, label_smoothing / (vocab_size - 1)
        mean_logits = masked(mean_logits.astype(jnp.float32), where)
        uniform = vocab_size * (log_z - mean_logits)
        entropy = -on * jnp.log(on) - label_smoothing * jnp.log(off)
        losses = (on - off) * losses + off * uniform - entropy
    if z_loss:
        losses = losses + z_loss * jnp.square(log_z)
    return masked(losses, where)


def rationale(
    logps: jax.Array, *, gamma: float, term: str = "nll", where: jax.Array | None = None
) -> jax.Array:
    """The rationale's term of RDPO and RORPO (Just et al. 2024, arXiv 2407.14477).

    ::

        nll          -gamma log pi_theta(rationale | pair)                   the paper
        logsigmoid   -log sigmoid(gamma log pi_theta(rationale | pair))      its code

    The two are not the same: the second's gradient is the first's times
    ``sigmoid(-gamma logps)``, between one half and one.

    Args:
      logps: the rationales' log-probabilities under the policy, any shape: sums over
        tokens in RDPO, means in RORPO.
      gamma: weight of the term.
      term: ``"nll"`` or ``"logsigmoid"``.

    >>> logps = jnp.array([-30.0])
    >>> rationale(logps, gamma=0.01)
    Array([0.29999998], dtype=float32)
    >>> rationale(logps, gamma=0.01, term="logsigmoid")
    Array([0.8543552], dtype=float32)
    """
    if term not in RATIONALE_TERMS:
        raise ValueError(f"term must be one of {RATIONALE_TERMS}, got {term!r}.")
    chex.assert_type(logps, float)
    scaled = gamma * masked(jnp.asarray(logps, jnp.float32), where)
    losses = -scaled if term == "nll" else -jax.nn.log_sigmoid(scaled)
    return masked(losses, where)
