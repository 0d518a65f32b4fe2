"""Objectives on pairs whose loss looks at log-ratios to a reference policy."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from jaxalign import losses
from jaxalign.objectives.pairs import PairInputs, PairObjective


@dataclasses.dataclass(frozen=True)
class RatioPairObjective(PairObjective):
    """A function of the two responses' log-ratios to a reference."""

    columns: ClassVar[tuple[str, ...]] = ("response_ref_logps",)


@dataclasses.dataclass(frozen=True)
class DPO(RatioPairObjective):
    """Direct preference optimisation, with its conservative and length variants.

    Attributes:
      label_smoothing: assumed probability that a preference is flipped (cDPO).
      length_penalty: ``alpha`` of length-regularised DPO (R-DPO): the reward is taken
        to favour each token of length by so much.
      margin_scale: weight of the rows' ``margin``, which the scaled margin must exceed
        (ODPO).
    """

    label_smoothing: float = 0.0
    length_penalty: float = 0.0
    margin_scale: float = 0.0

    def pair_losses(self, pairs: PairInputs) -> jax.Array:
        longer = pairs.chosen_lengths - pairs.rejected_lengths
        return losses.dpo(
            *pairs.ratio,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            offset=self.length_penalty * longer - self.margin_scale * pairs.margin,
            where=pairs.where,
        )


@dataclasses.dataclass(frozen=True)
class RobustDPO(RatioPairObjective):
    """DPO whose expectation over flipped labels is DPO on clean ones.

    Attributes:
      label_smoothing: the probability of a flip.
    """

    label_smoothing: float = 0.1

    def pair_losses(self, pairs: PairInputs) -> jax.Array:
        return losses.robust_dpo(
            *pairs.ratio,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            where=pairs.where,
        )


@dataclasses.dataclass(frozen=True)
class IPO(RatioPairObjective):
    """Identity preference optimisation: the margin regressed on ``1 / (2 beta)``."""

    length_normalize: bool = True

    def pair_losses(self, pairs: PairInputs) -> jax.Array:
        # `pairs` holds means already where length_normalize says so.
        return losses.ipo(
            *pairs.ratio, beta=self.beta, length_normalize=False, where=pairs.where
        )


@dataclasses.dataclass(frozen=True)
class Hinge(RatioPairObjective):
    """The hinge on the margin (SLiC); pairs beyond a margin of ``1 / beta`` rest."""

    def pair_losses(self, pairs: PairInputs) -> jax.Array:
        return losses.hinge(*pairs.ratio, beta=self.beta, where=pairs.where)


@dataclasses.dataclass(frozen=True)
class EXO(RatioPairObjective):
    """Efficient exact optimisation: the reverse KL to the smoothed preference.

    Attributes:
      label_smoothing: how far from certain a label is taken to be.
    """

    label_smoothing: float = 1e-3

    def pair_losses(self, pairs: PairInputs) -> jax.Array:
        return losses.exo_pair(
            *pairs.ratio,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            where=pairs.where,
        )


@dataclasses.dataclass(frozen=True)
class NCA(RatioPairObjective):
    """Noise contrastive alignment: each response told from the reference by itself."""

    def pair_losses(self, pairs: PairInputs) -> jax.Array:
        return losses.nca_pair(*pairs.ratio, beta=self.beta, where=pairs.where)


@dataclasses.dataclass(frozen=True)
class SPPO(RatioPairObjective):
    """Self-play preference optimisation with hard labels."""

    def pair_losses(self, pairs: PairInputs) -> jax.Array:
        return losses.sppo_hard(*pairs.ratio, beta=self.beta, where=pairs.where)


@dataclasses.dataclass(frozen=True)
class APOZero(RatioPairObjective):
    """Anchored preference optimisation: chosen up, rejected down."""

    def pair_losses(self, pairs: PairInputs) -> jax.Array:
        return losses.apo_zero(*pairs.ratio, beta=self.beta, where=pairs.where)


@dataclasses.dataclass(frozen=True)
class APODown(RatioPairObjective):
    """Anchored preference optimisation: both down, rejected further."""

    def pair_losses(self, pairs: PairInputs) -> jax.Array:
        return losses.apo_down(*pairs.ratio, beta=self.beta, where=pairs.where)


@dataclasses.dataclass(frozen=True)
class DPONLL(RatioPairObjective):
    """DPO with the chosen response's likelihood per token (RPO).

    Attributes:
      nll_weight: of the likelihood, averaged over tokens and then over pairs; the base
        class's ``alpha`` averages over all tokens at once.
    """

    nll_weight: float = 1.0

    def pair_losses(self, pairs: PairInputs) -> jax.Array:
        return losses.dpo_nll(
            *pairs.ratio,
            beta=self.beta,
            alpha=self.nll_weight,
            chosen_lengths=pairs.chosen_lengths,
            where=pairs.where,
        )
