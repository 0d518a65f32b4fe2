"""What all objectives on preference pairs share; `DPO` and the rest are beside it."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import batch as batches
from jaxalign import losses
from jaxalign.batch import Batch
from jaxalign.objectives.base import LossOutput, Objective, Params, Step
from jaxalign.objectives.metrics import Mean, Metrics, Values


class PairInputs(NamedTuple):
    """What a pair loss may look at, ``[B, Q]`` each.

    Log-probabilities are sums over tokens; the reference's are zero for an objective
    without one.
    """

    chosen_logps: jax.Array
    rejected_logps: jax.Array
    ref_chosen_logps: jax.Array
    ref_rejected_logps: jax.Array
    chosen_lengths: jax.Array
    rejected_lengths: jax.Array
    margin: jax.Array
    where: jax.Array

    @classmethod
    def of(cls, batch: Batch, logps: jax.Array) -> PairInputs:
        """Picks the pairs of a batch whose responses have log-probs ``[B, R]``."""
        ref = batch.get("response_ref_logps")
        ref = jnp.zeros_like(logps) if ref is None else ref
        return cls(
            *batches.select_pairs(logps, batch),
            *batches.select_pairs(ref, batch),
            *batches.select_pairs(batches.response_lengths(batch), batch),
            batch["pair_margin"],
            batch["pair_mask"],
        )

    @property
    def policy(self) -> tuple[jax.Array, jax.Array]:
        """``(chosen, rejected)`` under the policy."""
        return self.chosen_logps, self.rejected_logps

    @property
    def ratio(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The four arguments of a loss with a reference."""
        return self[:4]

    def per_token(self) -> PairInputs:
        """Means over tokens in place of sums."""
        chosen = jnp.maximum(self.chosen_lengths, 1.0)
        rejected = jnp.maximum(self.rejected_lengths, 1.0)
        return self._replace(
            chosen_logps=self.chosen_logps / chosen,
            rejected_logps=self.rejected_logps / rejected,
            ref_chosen_logps=self.ref_chosen_logps / chosen,
            ref_rejected_logps=self.ref_rejected_logps / rejected,
        )


@dataclasses.dataclass(frozen=True)
class PairObjective(Objective):
    """A loss per pair, averaged over pairs, and what people look at beside it.

    Attributes:
      beta: scales log-probabilities into rewards; with a reference, the strength of
        the KL constraint in 1/nat.
      alpha: weight of the chosen responses' negative log-likelihood, averaged over
        their tokens; 0 leaves it out.
      length_normalize: use means over tokens in place of sums.
    """

    beta: float = 0.1
    alpha: float = 0.0
    length_normalize: bool = False

    schema: ClassVar[str] = "preference"

    @abc.abstractmethod
    def pair_losses(self, pairs: PairInputs) -> jax.Array:
        """One loss per pair ``[B, Q]``."""

    def loss(self, params: Params, step: Step) -> LossOutput:
        logps = self.response_logps(params, step.batch, step.key)
        return self.output(step.batch, logps)

    def output(self, batch: Batch, logps: jax.Array) -> LossOutput:
        """Sums and metrics, given the policy's log-probabilities ``[B, R]``."""
        pairs = PairInputs.of(batch, logps)
        inputs = pairs.per_token() if self.length_normalize else pairs
        losses_ = self.pair_losses(inputs)
        sums = {"pairs": jnp.sum(losses_ * pairs.where)}
        if self.alpha:
            chosen = losses.masked(pairs.chosen_logps, pairs.where)
            sums["chosen_tokens"] = -self.alpha * jnp.sum(chosen * pairs.where)
        return LossOutput(sums, self.metrics(pairs, inputs, losses_))

    def metrics(
        self, pairs: PairInputs, inputs: PairInputs, losses_: jax.Array
    ) -> Metrics:
        """The metrics every pair objective reports, in TRL's spelling.

        ``rewards/*`` are ``beta`` times what the loss compares: log-ratios, or
        log-probabilities without a reference. ``rewards/accuracies`` counts a strict
        ``>``, so it is 0 while policy and reference agree exactly.
        """
        mask = pairs.where
        rewards_w = self.beta * (inputs.chosen_logps - inputs.ref_chosen_logps)
        rewards_l = self.beta * (inputs.rejected_logps - inputs.ref_rejected_logps)
        margin = rewards_w - rewards_l
        tokens = jnp.sum(pairs.chosen_lengths * mask)
        nll = -jnp.sum(losses.masked(pairs.chosen_logps, mask) * mask)
        found = {
            "loss": Mean.of(losses_, mask),
            "rewards/chosen": Mean.of(rewards_w, mask),
            "rewards/rejected": Mean.of(rewards_l, mask),
            "rewards/margins": Mean.of(margin, mask),
            "rewards/margins/abs": Values.of(jnp.abs(margin), mask),
            "rewards/accuracies": Mean.of(margin > 0, mask),
            "logps/chosen": Mean.of(pairs.chosen_logps, mask),
            "logps/rejected": Mean.of(pairs.rejected_logps, mask),
            "nll/chosen": Mean(nll, tokens),
            "lengths/chosen": Mean.of(pairs.chosen_lengths, mask),
            "lengths/rejected": Mean.of(pairs.rejected_lengths, mask),
        }
        if self.uses_reference:
            ratio_w = pairs.chosen_logps - pairs.ref_chosen_logps
            ratio_l = pairs.rejected_logps - pairs.ref_rejected_logps
            found["log_ratios/mean"] = Mean.of((ratio_w + ratio_l) / 2, mask)
            found["log_ratios/chosen"] = Mean.of(ratio_w, mask)
            found["log_ratios/rejected"] = Mean.of(ratio_l, mask)
            found["log_ratios/token"] = Mean(
                jnp.sum(losses.masked(ratio_w + ratio_l, mask) * mask),
                jnp.sum((pairs.chosen_lengths + pairs.rejected_lengths) * mask),
            )
        return found
