"""Preference objectives that also learn to say why: RDPO, RORPO."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxalign import batch as batches
from jaxalign import losses
from jaxalign.batch import Batch
from jaxalign.objectives.base import LossOutput
from jaxalign.objectives.metrics import Mean
from jaxalign.objectives.pairs import PairObjective
from jaxalign.objectives.ratio_pairs import DPO
from jaxalign.objectives.reference_free import ORPO


@dataclasses.dataclass(frozen=True)
class WithRationales(PairObjective):
    """Adds ``gamma`` times the rationales' likelihood to the pair objective beside it.

    Put it before a pair objective in a class's bases. The rationale answers a prompt of
    its own, which shows the question and both answers in a random order; each pair has
    its own, however many pairs share a prompt. ``gamma=0`` is the base objective;
    ``preference_weight=0`` is the rationales alone. The two-term structure keeps the
    scales apart: the first is averaged over pairs, the second over rationales.

    Attributes:
      gamma: weight of the rationale's term.
      rationale_term: ``"nll"``, the paper's, or ``"logsigmoid"``, its released code's.
      rationale_norm: ``"sum"`` or ``"mean"`` over a rationale's tokens.
      preference_weight: weight of the base objective.
    """

    gamma: float = 0.1
    rationale_term: str = "nll"
    rationale_norm: str = "sum"
    preference_weight: float = 1.0

    schema: ClassVar[str] = "rationale"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("rationale_term", losses.RATIONALE_TERMS),
            ("rationale_norm", ("sum", "mean")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{type(self).__name__}.{name} must be one of {allowed}, got "
                    f"{getattr(self, name)!r}."
                )

    def output(self, batch: Batch, logps: jax.Array) -> LossOutput:
        base = super().output(batch, logps)
        mask = batch["response_mask"] * (batch["response_kind"] == batches.RATIONALE)
        lengths = batches.response_lengths(batch)
        scored = logps
        if self.rationale_norm == "mean":
            scored = logps / jnp.maximum(lengths, 1.0)
        terms = losses.rationale(
            scored, gamma=self.gamma, term=self.rationale_term, where=mask
        )
        sums = {k: self.preference_weight * v for k, v in base.sums.items()}
        sums["rationales"] = jnp.sum(terms)
        nll = -jnp.sum(losses.masked(logps, mask))
        return LossOutput(
            sums,
            {
                **base.metrics,
                "loss/rationale": Mean.of(terms, mask),
                "nll/rationale": Mean(nll, jnp.sum(lengths * mask)),
                "lengths/rationale": Mean.of(lengths, mask),
            },
        )


@dataclasses.dataclass(frozen=True)
class RDPO(WithRationales, DPO):
    """DPO with rationales; sums over rationale tokens, so ``gamma`` is small."""

    gamma: float = 0.01


@dataclasses.dataclass(frozen=True)
class RORPO(WithRationales, ORPO):
    """ORPO with rationales; means over rationale tokens."""

    gamma: float = 1.0
    rationale_norm: str = "mean"
