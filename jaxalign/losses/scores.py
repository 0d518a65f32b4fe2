"""Losses on scores, which reward models are trained by, and sums of several scores.

Every loss is pure and unreduced: arrays in, one float32 loss per pair or response out.
A score is any real number; all but regression see differences alone, so that what is
the same for all responses to a prompt changes nothing. ``where`` is a mask of the
losses' shape; zero entries give a zero loss and no gradient, whatever they hold.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jaxalign.losses.pairwise import masked

AGGREGATES = ("mean", "worst", "penalised")


def bradley_terry(
    chosen_scores: jax.Array,
    rejected_scores: jax.Array,
    *,
    margin: jax.Array | float = 0.0,
    label_smoothing: jax.Array | float = 0.0,
    flipped: jax.Array | None = None,
    where: jax.Array | None = None,
) -> jax.Array:
    """Bradley and Terry (1952) on scores, with a margin inside the logistic function.

    With ``alpha`` the label smoothing (Wang et al. 2024, arXiv 2401.06080)::

        z    = s_w - s_l - margin
        loss = -(1 - alpha) log sigmoid(z) - alpha log sigmoid(-z)

    Outside of the logistic function, as that paper's Eq. 8 prints it, a margin would
    have no gradient.

    Args:
      margin: by how much the chosen score should exceed; no gradient flows to it.
      label_smoothing: assumed probability that the label is wrong, of all or each.
      flipped: non-zero where the label is taken to be wrong, and the margin with it:
        the loss of ``-z``.

    >>> round(float(bradley_terry(jnp.array(1.2), jnp.array(0.1))), 6)
    0.287335
    """
    chex.assert_equal_shape([chosen_scores, rejected_scores])
    chosen, rejected = (
        masked(jnp.asarray(x, jnp.float32), where)
        for x in (chosen_scores, rejected_scores)
    )
    margin, alpha = (
        masked(jnp.broadcast_to(jnp.asarray(x, jnp.float32), chosen.shape), where)
        for x in (margin, label_smoothing)
    )
    z = chosen - rejected - jax.lax.stop_gradient(margin)
    if flipped is not None:
        z = jnp.where(flipped > 0, -z, z)
    log_right, log_wrong = jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
    return masked(-(1.0 - alpha) * log_right - alpha * log_wrong, where)


def centring(
    chosen_scores: jax.Array,
    rejected_scores: jax.Array,
    *,
    where: jax.Array | None = None,
) -> jax.Array:
    """``(s_w + s_l)^2``: holds the mean score of a pair near 0.

    A pair says nothing of it (Eisenstein et al. 2023, arXiv 2312.09244, §2; TRL's
    ``center_rewards_coefficient`` multiplies it).

    >>> float(centring(jnp.array(1.5), jnp.array(-0.5)))
    1.0
    """
    chex.assert_equal_shape([chosen_scores, rejected_scores])
    chosen, rejected = (
        masked(jnp.asarray(x, jnp.float32), where)
        for x in (chosen_scores, rejected_scores)
    )
    return jnp.square(chosen + rejected)


def score_regression(
    scores: jax.Array, targets: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """``(s - y)^2 / 2``, of scores that are to equal given numbers.

    >>> float(score_regression(jnp.array(1.0), jnp.array(3.0)))
    2.0
    """
    chex.assert_equal_shape([scores, targets])
    scores, targets = (
        masked(jnp.asarray(x, jnp.float32), where) for x in (scores, targets)
    )
    return 0.5 * jnp.square(scores - jax.lax.stop_gradient(targets))


def score_ordinal(
    scores: jax.Array,
    levels: jax.Array,
    thresholds: jax.Array,
    *,
    where: jax.Array | None = None,
) -> jax.Array:
    """Levels of a Likert scale by cumulative links (McCullagh 1980).

    With thresholds ``t_1 < ... < t_{L-1}`` between the levels ``0 .. L-1``::

        P(level <= k) = sigmoid(t_{k+1} - s)        loss = -log P(level)

    Args:
      levels: whole numbers, same shape as the scores.
      thresholds: ``[L - 1]``, ascending.

    >>> loss = score_ordinal(jnp.array(0.0), jnp.array(1), jnp.array([-1.0, 1.0]))
    >>> round(float(jnp.exp(-loss)), 6)  # sigmoid(1) - sigmoid(-1)
    0.462117
    """
    chex.assert_equal_shape([scores, levels])
    chex.assert_rank(thresholds, 1)
    scores = masked(jnp.asarray(scores, jnp.float32), where)
    levels = masked(levels, where).astype(jnp.int32)
    last = thresholds.shape[0]
    upper = thresholds[jnp.clip(levels, 0, last - 1)] - scores
    lower = thresholds[jnp.clip(levels - 1, 0, last - 1)] - scores
    is_first, is_last = levels <= 0, levels >= last
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), of which no
    # factor cancels; at either end of the scale one of them is all.
    width = jnp.where(is_first | is_last, -1.0, lower - upper)
    between = jnp.where(is_first | is_last, 0.0, jnp.log(-jnp.expm1(width)))
    log_p = jnp.where(is_last, 0.0, jax.nn.log_sigmoid(upper)) + between
    log_p += jnp.where(is_first, 0.0, jax.nn.log_sigmoid(-lower))
    return masked(-log_p, where)


def plackett_luce(
    scores: jax.Array,
    grades: jax.Array,
    lists: jax.Array | None = None,
    *,
    where: jax.Array | None = None,
) -> jax.Array:
    """The likelihood of a ranking (Plackett 1975, Luce 1959), one term a response.

    The best is drawn first, with probabilities ``softmax(s)``, then the best of the
    rest::

        loss_i = log(exp(s_i) + sum of exp(s_j) over j ranked below i) - s_i

    Responses of equal grade are not compared with each other; what is ranked above
    nothing costs nothing. Of two responses it is `bradley_terry`.

    Args:
      scores: ``[..., R]``.
      grades: same shape; a larger one is ranked above.
      lists: same shape, which ranking a response belongs to; None: one for all.

    >>> plackett_luce(jnp.array([1.0, 0.0, 0.0]), jnp.array([2.0, 1.0, 1.0])).round(4)
    Array([0.5514, 0.    , 0.    ], dtype=float32)
    """
    chex.assert_equal_shape([scores, grades])
    scores, grades = (
        masked(jnp.asarray(x, jnp.float32), where) for x in (scores, grades)
    )
    below = grades[..., :, None] > grades[..., None, :]
    if lists is not None:
        chex.assert_equal_shape([scores, lists])
        below &= lists[..., :, None] == lists[..., None, :]
    if where is not None:
        real = where.astype(bool)
        below &= real[..., :, None] & real[..., None, :]
    ahead = scores[..., None, :] - scores[..., :, None]
    ahead = jnp.where(below, ahead, -jnp.inf)
    own = jnp.zeros_like(ahead[..., :1])
    logits = jnp.concatenate([own, ahead], axis=-1)
    return masked(jax.nn.logsumexp(logits, axis=-1), where)


def aggregate(
    scores: jax.Array, how: str = "mean", *, penalty: float = 1.0, axis: int = -1
) -> jax.Array:
    """One score of the scores of an ensemble (Coste et al. 2023, arXiv 2310.02743).

    Args:
      scores: of the members along `axis`; NumPy's arrays, too.
      how: ``"mean"``; ``"worst"``, the smallest; ``"penalised"``, the mean minus
        `penalty` deviations (population), which the paper squares.

    Raises:
      ValueError: for another name.

    >>> float(aggregate(jnp.array([1.0, 3.0]), "penalised", penalty=0.5))
    1.5
    """
    if how not in AGGREGATES:
        raise ValueError(f"aggregate must be one of {AGGREGATES}, got {how!r}.")
    if how == "worst":
        return scores.min(axis)
    mean = scores.mean(axis)
    return mean if how == "mean" else mean - penalty * scores.std(axis)
