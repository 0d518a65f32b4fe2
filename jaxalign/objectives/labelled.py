"""Objectives on single trajectories with thumbs: KTO, APO-zero unpaired, BCO."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxalign import batch as batches
from jaxalign import losses, models
from jaxalign.batch import Batch
from jaxalign.objectives.base import (
    LossOutput,
    Objective,
    Outputs,
    Params,
    Statistics,
    Step,
    WholeBatchObjective,
    answers,
)
from jaxalign.objectives.metrics import Mean, Metrics, Values


@dataclasses.dataclass(frozen=True)
class KTO(WholeBatchObjective):
    """Kahneman-Tversky optimisation from thumbs up and down.

    The mismatched responses of the reference point are the batch's own, each pointed
    at another prompt of its encoder row: one more decoder pass, without gradient, and
    no encoder pass. A batch in microbatches is encoded once more, as the point needs
    all of it before any gradient.

    Attributes:
      beta: strength of the KL constraint, in 1/nat.
      desirable_weight: ``lambda_D``.
      undesirable_weight: ``lambda_U``; the paper keeps
        ``lambda_D n_D : lambda_U n_U`` between 1:1 and 4:3.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    schema: ClassVar[str] = "trajectory"
    columns: ClassVar[tuple[str, ...]] = (
        "response_label",
        "response_ref_logps",
        "response_ref_kl_logps",
    )
    min_prompts: ClassVar[int] = 2

    def forward(
        self, params: Params, batch: Batch, key: jax.Array | None = None
    ) -> Outputs:
        if key is not None:
            return {"logps": self.response_logps(params, batch, key)}
        policy = params["policy"]
        encoded = models.encode(self.model, policy, batch)
        kl_logps = models.response_logps(
            self.model,
            jax.lax.stop_gradient(policy),
            batch,
            prompt=batch["response_kl_prompt"],
            encoded=jax.lax.stop_gradient(encoded),
        )
        logps = models.response_logps(self.model, policy, batch, encoded=encoded)
        return {"logps": logps, "kl_logps": kl_logps}

    def statistics_of(self, batch: Batch, outputs: Outputs) -> Statistics:
        mask = answers(batch) * (batch["response_kl_prompt"] >= 0)
        kl = losses.log_ratios(
            outputs["kl_logps"], batch["response_ref_kl_logps"], mask
        )
        return {"kl": (jnp.sum(kl), jnp.sum(mask))}

    def labels(self, batch: Batch, statistics: Statistics) -> jax.Array:
        """``[B, R]``: 1 desirable, 0 undesirable, -1 unknown."""
        del statistics
        return batch["response_label"]

    def loss_of(
        self, batch: Batch, outputs: Outputs, statistics: Statistics
    ) -> LossOutput:
        total, count = statistics["kl"]
        unclamped = total / jnp.maximum(count, 1.0)
        z = jnp.maximum(unclamped, 0.0)
        labels = self.labels(batch, statistics)
        mask = answers(batch) * (labels >= 0)
        logps = outputs["logps"]
        losses_ = losses.kto_at_reference_point(
            logps,
            batch["response_ref_logps"],
            z,
            labels,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            where=mask,
        )
        # A batch without a mismatched response says nothing about the point.
        responses = jnp.sum(mask) * (count > 0)
        return LossOutput(
            {"responses": jnp.sum(losses_)},
            {
                **_metrics(batch, logps, labels, mask, self.beta, losses_, z),
                "reference_point": Mean(z * responses, responses),
                "reference_point/unclamped": Mean(unclamped * responses, responses),
            },
        )


@dataclasses.dataclass(frozen=True)
class RewardKTO(KTO):
    """KTO from scalar rewards: desirable is what exceeds the batch's mean reward.

    The baseline of the DRO paper (arXiv 2405.19107), which found ``beta`` 5 best.
    """

    beta: float = 5.0

    columns: ClassVar[tuple[str, ...]] = (
        "response_reward",
        "response_ref_logps",
        "response_ref_kl_logps",
    )

    def statistics_of(self, batch: Batch, outputs: Outputs) -> Statistics:
        mask = answers(batch)
        rewards = losses.masked(batch["response_reward"], mask)
        return {
            **super().statistics_of(batch, outputs),
            "reward": (jnp.sum(rewards), jnp.sum(mask)),
        }

    def labels(self, batch: Batch, statistics: Statistics) -> jax.Array:
        total, count = statistics["reward"]
        above = batch["response_reward"] > total / jnp.maximum(count, 1.0)
        return jnp.where(above, batches.DESIRABLE, batches.UNDESIRABLE)


@dataclasses.dataclass(frozen=True)
class APOZeroUnpaired(Objective):
    """KTO with its reference point at zero: no mismatched responses to score.

    Attributes:
      beta: strength of the KL constraint, in 1/nat.
      desirable_weight: ``lambda_D``.
      undesirable_weight: ``lambda_U``.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    schema: ClassVar[str] = "trajectory"
    columns: ClassVar[tuple[str, ...]] = ("response_label", "response_ref_logps")

    def loss(self, params: Params, step: Step) -> LossOutput:
        batch = step.batch
        labels = batch["response_label"]
        mask = answers(batch) * (labels >= 0)
        logps = self.response_logps(params, batch, step.key)
        losses_ = losses.apo_zero_unpaired(
            logps,
            batch["response_ref_logps"],
            labels,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            where=mask,
        )
        return LossOutput(
            {"responses": jnp.sum(losses_)},
            _metrics(batch, logps, labels, mask, self.beta, losses_),
        )


@dataclasses.dataclass(frozen=True)
class BCO(WholeBatchObjective):
    """Binary classifier optimisation: the implicit reward as a classifier's logit.

    The reward shift is the mean implicit reward over all responses of the run so far,
    the current batch included.

    Attributes:
      beta: strength of the KL constraint, in 1/nat.
      desirable_weight: ``lambda_D``.
      undesirable_weight: ``lambda_U``.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    schema: ClassVar[str] = "trajectory"
    columns: ClassVar[tuple[str, ...]] = ("response_label", "response_ref_logps")
    running: ClassVar[tuple[str, ...]] = ("rewards",)

    def forward(
        self, params: Params, batch: Batch, key: jax.Array | None = None
    ) -> Outputs:
        return {"logps": self.response_logps(params, batch, key)}

    def statistics_of(self, batch: Batch, outputs: Outputs) -> Statistics:
        mask = answers(batch) * (batch["response_label"] >= 0)
        ratios = losses.log_ratios(outputs["logps"], batch["response_ref_logps"], mask)
        return {"rewards": (self.beta * jnp.sum(ratios), jnp.sum(mask))}

    def loss_of(
        self, batch: Batch, outputs: Outputs, statistics: Statistics
    ) -> LossOutput:
        total, count = statistics["rewards"]
        shift = total / jnp.maximum(count, 1.0)
        labels, logps = batch["response_label"], outputs["logps"]
        mask = answers(batch) * (labels >= 0)
        losses_ = losses.bco(
            logps,
            batch["response_ref_logps"],
            labels,
            shift,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            where=mask,
        )
        responses = jnp.sum(mask)
        return LossOutput(
            {"responses": jnp.sum(losses_)},
            {
                **_metrics(batch, logps, labels, mask, self.beta, losses_),
                "rewards/shift": Mean(shift * responses, responses),
            },
        )


def _metrics(
    batch: Batch,
    logps: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    beta: float,
    losses_: jax.Array,
    z: jax.Array | float = 0.0,
) -> Metrics:
    """What every objective on thumbs reports, in TRL's spelling."""
    chosen = mask * (labels == batches.DESIRABLE)
    rejected = mask * (labels == batches.UNDESIRABLE)
    ratios = losses.log_ratios(logps, batch["response_ref_logps"])
    rewards = beta * ratios
    lengths = batches.response_lengths(batch)
    saturated = jnp.abs(rewards - beta * z) > 5.0
    return {
        "loss": Mean.of(losses_, mask),
        "rewards/chosen": Mean.of(rewards, chosen),
        "rewards/rejected": Mean.of(rewards, rejected),
        "rewards/abs": Values.of(jnp.abs(rewards), mask),
        "logps/chosen": Mean.of(logps, chosen),
        "logps/rejected": Mean.of(logps, rejected),
        "lengths/chosen": Mean.of(lengths, chosen),
        "lengths/rejected": Mean.of(lengths, rejected),
        "labels/desirable": Mean.of(chosen, mask),
        "log_ratios/mean": Mean.of(ratios, mask),
        "saturated": Mean.of(saturated, mask),
    }
