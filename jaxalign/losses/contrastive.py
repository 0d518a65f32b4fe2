"""Losses that compare all vectors of a batch, and what meta-learning makes of scores.

A contrastive loss pulls two views of one thing together and pushes it from all other
things of the batch: it is no sum over parts of a batch. Arrays in, one float32 loss per
vector or pair out. ``where`` is a mask of the vectors; zero entries give a zero loss
and no gradient, and no other entry sees them, whatever they hold.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jaxalign.losses.pairwise import masked


def info_nce(
    vectors: jax.Array,
    views: jax.Array,
    *,
    temperature: float,
    where: jax.Array | None = None,
) -> jax.Array:
    """InfoNCE on cosines, as SimCSE has it (Gao et al. 2021, arXiv 2104.08821, Eq. 1).

    With ``u_i`` a vector, ``v_i`` another view of the same thing::

        loss_i = -log( exp(cos(u_i, v_i) / temperature)
                       / sum_j exp(cos(u_i, v_j) / temperature) )

    A vector of zeros is at a right angle to all others.

    Args:
      vectors, views: ``[n, E]``; row ``i`` of both is of one thing.
      temperature: above 0; SimCSE's is 0.05.
      where: ``[n]``.

    Returns:
      ``[n]``; ``log n`` where all are the same.

    >>> loss = info_nce(jnp.eye(2), jnp.eye(2), temperature=1.0)
    >>> [round(float(x), 4) for x in loss]
    [0.3133, 0.3133]
    """
    chex.assert_rank([vectors, views], 2)
    chex.assert_equal_shape([vectors, views])
    where = jnp.ones(vectors.shape[0]) if where is None else where
    logits = _cosines(vectors, views, where, where) / temperature
    logits = jnp.where(where[None, :] > 0, logits, -jnp.inf)
    logits = jnp.where(where[:, None] > 0, logits, 0.0)
    return masked(jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(logits), where)


def sinkhorn(
    scores: jax.Array,
    *,
    epsilon: float,
    iterations: int,
    where: jax.Array | None = None,
) -> jax.Array:
    """Soft assignments that use every prototype equally (Cuturi 2013).

    What maximises ``<Q, scores> + epsilon * entropy(Q)`` where all vectors have the
    same weight and so have all prototypes, as SwAV has it (Caron et al. 2020, arXiv
    2006.09882, Eq. 3-5). Each iteration makes the prototypes' weights equal, then the
    vectors'; a few leave the former approximate.

    Args:
      scores: of vectors and prototypes, ``[n, K]``.
      epsilon: above 0; SwAV's is 0.05.
      iterations: at least 1; SwAV's is 3.
      where: ``[n]``.

    Returns:
      ``[n, K]``, a distribution over prototypes in each row; zeros where there is no
      vector.

    >>> sinkhorn(jnp.array([[3.0, 0.0], [1.0, 0.0]]), epsilon=1.0, iterations=50).sum(0)
    Array([1., 1.], dtype=float32)
    """
    chex.assert_rank(scores, 2)
    scores = jnp.asarray(scores, jnp.float32) / epsilon
    if where is not None:
        scores = jnp.where(where[:, None] > 0, scores, -jnp.inf)
    real = jnp.isfinite(scores)
    for _ in range(iterations):
        total = jax.nn.logsumexp(scores, axis=0, keepdims=True)
        scores = scores - jnp.where(jnp.isfinite(total), total, 0.0)
        total = jax.nn.logsumexp(scores, axis=1, keepdims=True)
        scores = scores - jnp.where(jnp.isfinite(total), total, 0.0)
    return jnp.where(real, jnp.exp(scores), 0.0)


def swav(
    vectors: jax.Array,
    views: jax.Array,
    prototypes: jax.Array,
    *,
    temperature: float,
    epsilon: float,
    iterations: int,
    where: jax.Array | None = None,
) -> jax.Array:
    """Swapped assignments (Caron et al. 2020, arXiv 2006.09882, Eq. 1 and 2).

    Each view predicts to which prototypes `sinkhorn` assigns the other. With ``C`` the
    prototypes, and all vectors of length 1::

        p(z) = softmax(C z / temperature)       q = stop_gradient(sinkhorn(C z))
        loss_i = H(q(u_i), p(v_i)) + H(q(v_i), p(u_i))

    Args:
      vectors, views: ``[n, E]``; row ``i`` of both is of one thing.
      prototypes: ``[K, E]``.
      temperature: above 0; SwAV's is 0.1.
      epsilon, iterations: of `sinkhorn`.
      where: ``[n]``.

    Returns:
      ``[n]``; ``2 log K`` where every prototype is the same.
    """
    chex.assert_rank([vectors, views, prototypes], 2)
    chex.assert_equal_shape([vectors, views])
    where = jnp.ones(vectors.shape[0]) if where is None else where
    everyone = jnp.ones(prototypes.shape[0])
    scores = [_cosines(x, prototypes, where, everyone) for x in (vectors, views)]
    ours, theirs = (
        jax.lax.stop_gradient(
            sinkhorn(s, epsilon=epsilon, iterations=iterations, where=where)
        )
        for s in scores
    )
    own, other = (jax.nn.log_softmax(s / temperature, axis=1) for s in scores)
    loss = -jnp.sum(ours * other + theirs * own, axis=1)
    return masked(loss, where)


def score_spread(
    scores: jax.Array, others: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """``sigmoid(|a - b|)``: how far apart two scores are, from 1/2 to 1.

    What MetaRM has a reward model enlarge on its policy's samples (Wang et al. 2024,
    arXiv 2401.06080, §4.1). Two scores that tie have no order, and give no gradient.

    >>> score_spread(jnp.array(0.0), jnp.array(0.5))
    Array(0.62245935, dtype=float32)
    """
    chex.assert_equal_shape([scores, others])
    gap = masked(
        jnp.asarray(scores, jnp.float32) - jnp.asarray(others, jnp.float32), where
    )
    # The derivative of |x| at 0 is 1 in JAX; that of x sign(x) is 0.
    return masked(jax.nn.sigmoid(gap * jnp.sign(gap)), where)


def _cosines(a: jax.Array, b: jax.Array, of_a: jax.Array, of_b: jax.Array) -> jax.Array:
    """``[n, m]``, in float32; no gradient through what the masks leave out."""
    return jnp.matmul(
        _unit(a, of_a), _unit(b, of_b).T, precision=jax.lax.Precision.HIGHEST
    )


def _unit(vectors: jax.Array, where: jax.Array) -> jax.Array:
    """Vectors of length 1, in float32; those of zeros stay, without a gradient."""
    vectors = masked(jnp.asarray(vectors, jnp.float32), where[:, None])
    square = jnp.sum(jnp.square(vectors), axis=1, keepdims=True)
    some = square > 0
    return jnp.where(some, vectors * jax.lax.rsqrt(jnp.where(some, square, 1.0)), 0.0)
