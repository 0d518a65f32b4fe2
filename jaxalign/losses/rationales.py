"""The likelihood of rationales: texts that say why a response was preferred."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jaxalign.losses.pairwise import masked

RATIONALE_TERMS = ("nll", "logsigmoid")


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

    Raises:
      ValueError: for another term.

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
