"""Objectives on pairs that need no reference policy, and sums of pair objectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxalign import losses
from jaxalign.batch import Batch
from jaxalign.objectives.base import LossOutput
from jaxalign.objectives.pairs import PairInputs, PairObjective
from jaxalign.objectives.ratio_pairs import DPO


@dataclasses.dataclass(frozen=True)
class PreferredFT(PairObjective):
    """Maximum likelihood of the chosen responses; the rejected ones are only measured.

    The baseline of the DPO paper, and a term for `PairSum`.
    """

    alpha: float = 1.0

    def pair_losses(self, pairs: PairInputs) -> jax.Array:
        return jnp.zeros_like(pairs.where)


@dataclasses.dataclass(frozen=True)
class CPO(PairObjective):
    """Contrastive preference optimisation: DPO with a uniform reference; likelihood.

    Attributes:
      label_smoothing: assumed probability that a preference is flipped.
    """

    alpha: float = 1.0
    label_smoothing: float = 0.0

    def pair_losses(self, pairs: PairInputs) -> jax.Array:
        return losses.cpo(
            *pairs.policy,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            where=pairs.where,
        )


@dataclasses.dataclass(frozen=True)
class SimPO(PairObjective):
    """SimPO: mean log-probabilities as rewards, and a target margin.

    With ``alpha`` above 0 it is CPO-SimPO.

    Attributes:
      gamma: the target margin, not divided by ``beta``.
    """

    beta: float = 2.0
    gamma: float = 1.0
    length_normalize: bool = True

    def pair_losses(self, pairs: PairInputs) -> jax.Array:
        return losses.simpo(
            *pairs.policy, beta=self.beta, gamma=self.gamma, where=pairs.where
        )


@dataclasses.dataclass(frozen=True)
class ORPO(PairObjective):
    """Odds-ratio preference optimisation: likelihood of the chosen, odds against it.

    ``beta`` is the paper's ``lambda``.
    """

    alpha: float = 1.0
    length_normalize: bool = True

    def pair_losses(self, pairs: PairInputs) -> jax.Array:
        return losses.orpo(*pairs.policy, beta=self.beta, where=pairs.where)


@dataclasses.dataclass(frozen=True)
class SLiCHF(PairObjective):
    """SLiC-HF: a hinge on the policy's own margin, and likelihood.

    Attributes:
      delta: the margin asked for, in nats.
    """

    beta: float = 1.0
    alpha: float = 0.1
    delta: float = 1.0

    def pair_losses(self, pairs: PairInputs) -> jax.Array:
        return losses.slic_hf(
            *pairs.policy, beta=self.beta, delta=self.delta, where=pairs.where
        )


@dataclasses.dataclass(frozen=True)
class PairSum(PairObjective):
    """A weighted sum of pair objectives, with one forward pass for all of them.

    In gin: ``objectives.PairSum.terms = [(@objectives.IPO, 1.0),
    (@objectives.PreferredFT, 0.2)]``; scopes tell two of a kind apart. The reference is
    scored even if no term asks for it. ``beta`` only scales the reported rewards.

    Attributes:
      terms: ``(objective class, weight)``.
    """

    terms: tuple[tuple[Callable[..., PairObjective], float], ...] = (
        (DPO, 1.0),
        (PreferredFT, 0.2),
    )

    columns: ClassVar[tuple[str, ...]] = ("response_ref_logps",)

    def pair_losses(self, pairs: PairInputs) -> jax.Array:
        return jnp.zeros_like(pairs.where)

    def output(self, batch: Batch, logps: jax.Array) -> LossOutput:
        sums: dict[str, jax.Array] = {}
        metrics = dict(super().output(batch, logps).metrics)
        del metrics["loss"]
        for i, (kind, weight) in enumerate(self.terms):
            term = kind(model=self.model)
            if not isinstance(term, PairObjective):
                raise TypeError(
                    "PairSum.terms must hold pair objectives, such as "
                    f"(@objectives.DPO, 1.0); got {type(term).__name__}."
                )
            found = term.output(batch, logps)
            for name, value in found.sums.items():
                sums[name] = sums.get(name, 0.0) + weight * value
            metrics[f"loss/{i}_{type(term).__name__}"] = found.metrics["loss"]
        return LossOutput(sums, metrics)
