"""Objectives on preference pairs."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxalign import batch as batches
from jaxalign import losses
from jaxalign.batch import Batch
from jaxalign.objectives.base import (
    LossOutput,
    Objective,
    Params,
    Statistics,
    pair_metrics,
)


@dataclasses.dataclass(frozen=True)
class RatioPairObjective(Objective):
    """A function of the two responses' log-ratios to a reference, averaged over pairs.

    Attributes:
      beta: strength of the KL constraint, in 1/nat.
    """

    beta: float = 0.1

    schema: ClassVar[str] = "preference"
    columns: ClassVar[tuple[str, ...]] = ("response_ref_logps",)

    @abc.abstractmethod
    def pair_losses(self, *logps: jax.Array, where: jax.Array) -> jax.Array:
        """One loss per pair ``[B, Q]``.

        Args:
          *logps: ``chosen, rejected, ref_chosen, ref_rejected``, each ``[B, Q]``.
          where: ``[B, Q]`` mask.
        """

    def loss(
        self,
        params: Params,
        batch: Batch,
        *,
        statistics: Statistics,
        dropout_key: jax.Array | None = None,
    ) -> LossOutput:
        logps = self.response_logps(params, batch, dropout_key)
        losses_ = self.pair_losses(
            *batches.select_pairs(logps, batch),
            *batches.select_pairs(batch["response_ref_logps"], batch),
            where=batch["pair_mask"],
        )
        return LossOutput(
            {"pairs": jnp.sum(losses_ * batch["pair_mask"])},
            pair_metrics(batch, logps, self.beta, losses_),
        )


@dataclasses.dataclass(frozen=True)
class DPO(RatioPairObjective):
    """Direct preference optimisation; conservative DPO when labels are smoothed.

    Attributes:
      label_smoothing: assumed probability that a preference is flipped.
    """

    label_smoothing: float = 0.0

    def pair_losses(self, *logps: jax.Array, where: jax.Array) -> jax.Array:
        return losses.dpo(
            *logps, beta=self.beta, label_smoothing=self.label_smoothing, where=where
        )


@dataclasses.dataclass(frozen=True)
class Hinge(RatioPairObjective):
    """The hinge on the margin (SLiC); pairs beyond a margin of ``1 / beta`` rest."""

    def pair_losses(self, *logps: jax.Array, where: jax.Array) -> jax.Array:
        return losses.hinge(*logps, beta=self.beta, where=where)
