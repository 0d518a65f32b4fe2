"""Objectives on single trajectories: one response, judged by itself."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxalign import batch as batches
from jaxalign import losses, models
from jaxalign.batch import Batch
from jaxalign.objectives.base import LossOutput, Objective, Params, Statistics, answers
from jaxalign.objectives.metrics import Mean, Pairs, Values


@dataclasses.dataclass(frozen=True)
class KTO(Objective):
    """Kahneman-Tversky optimisation from thumbs up and down.

    The mismatched responses of the reference point are the batch's own, each pointed
    at another prompt of its encoder row: one more decoder pass, no encoder pass.

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

    def statistics(self, params: Params, batch: Batch) -> Statistics:
        mask = answers(batch) * (batch["response_kl_prompt"] >= 0)
        policy = jax.lax.stop_gradient(params["policy"])
        kl_logps = models.response_logps(
            self.model, policy, batch, prompt=batch["response_kl_prompt"]
        )
        kl = losses.log_ratios(kl_logps, batch["response_ref_kl_logps"])
        return {"kl": (jnp.sum(jnp.where(mask > 0, kl, 0.0)), jnp.sum(mask))}

    def loss(
        self,
        params: Params,
        batch: Batch,
        *,
        statistics: Statistics,
        dropout_key: jax.Array | None = None,
    ) -> LossOutput:
        total, count = statistics["kl"]
        unclamped = total / jnp.maximum(count, 1.0)
        z = jnp.maximum(unclamped, 0.0)
        labels = batch["response_label"]
        mask = answers(batch) * (labels >= 0)
        logps = self.response_logps(params, batch, dropout_key)
        ref = batch["response_ref_logps"]
        losses_ = losses.kto_at_reference_point(
            logps,
            ref,
            z,
            labels,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            where=mask,
        )
        chosen = mask * (labels == batches.DESIRABLE)
        rejected = mask * (labels == batches.UNDESIRABLE)
        rewards = self.beta * losses.log_ratios(logps, ref)
        saturated = jnp.abs(rewards - self.beta * z) > 5.0
        responses = jnp.sum(mask)
        return LossOutput(
            {"responses": jnp.sum(losses_ * mask)},
            {
                "loss": Mean.of(losses_, mask),
                "rewards/chosen": Mean.of(rewards, chosen),
                "rewards/rejected": Mean.of(rewards, rejected),
                "logps/chosen": Mean.of(logps, chosen),
                "logps/rejected": Mean.of(logps, rejected),
                "lengths/chosen": Mean.of(batches.response_lengths(batch), chosen),
                "lengths/rejected": Mean.of(batches.response_lengths(batch), rejected),
                "labels/desirable": Mean.of(chosen, mask),
                "kl": Mean(z * responses, responses),
                "kl/unclamped": Mean(unclamped * responses, responses),
                "saturated": Mean.of(saturated, mask),
            },
        )


@dataclasses.dataclass(frozen=True)
class DROV(Objective):
    """DRO-V: direct reward optimisation from scalar rewards, with a learned value.

    Two networks that share nothing, one scalar value per prompt, sums of
    log-probabilities. Rewards are standardised by the feed with the training split's
    mean and deviation, which the checkpoint keeps.

    Attributes:
      tau: strength of the KL constraint, in (standardised) reward per nat.
      rescale: divide the policy's loss by ``tau``, as the paper does.
    """

    tau: float = 1.0
    rescale: bool = True

    schema: ClassVar[str] = "trajectory"
    columns: ClassVar[tuple[str, ...]] = ("response_reward", "response_ref_logps")

    def networks(self) -> dict[str, Any]:
        return {
            "policy": self.model,
            "value": models.ValueModel(config=self.model.config),
        }

    def start_from(self, params: Params, policy_params: Any) -> Params:
        # The value starts from the policy's own encoder, under a fresh head; a copy,
        # because a training step gives up its state's buffers.
        shared = {k: policy_params[k] for k in ("token_embedder", "encoder")}
        shared = jax.tree.map(jnp.copy, shared)
        return {
            **params,
            "policy": policy_params,
            "value": {**params["value"], **shared},
        }

    def loss(
        self,
        params: Params,
        batch: Batch,
        *,
        statistics: Statistics,
        dropout_key: jax.Array | None = None,
    ) -> LossOutput:
        mask = answers(batch)
        logps = self.response_logps(params, batch, dropout_key)
        ref, rewards = batch["response_ref_logps"], batch["response_reward"]
        by_prompt = self.networks()["value"].apply({"params": params["value"]}, batch)
        values = jnp.take_along_axis(by_prompt, batch["response_prompt"], axis=1)
        policy_losses, value_losses = losses.dro_v(
            logps,
            ref,
            values,
            rewards,
            tau=self.tau,
            rescale=self.rescale,
            where=mask,
        )
        ratios = losses.log_ratios(logps, ref)
        residuals = rewards - values - self.tau * ratios
        lengths = batches.response_lengths(batch)
        pull = jnp.abs(self.tau * ratios) / jnp.maximum(jnp.abs(rewards - values), 1e-6)
        return LossOutput(
            {"responses": jnp.sum((policy_losses + value_losses) * mask)},
            {
                "loss": Mean.of(0.5 * jnp.square(residuals), mask),
                "loss/policy": Mean.of(policy_losses, mask),
                "loss/value": Mean.of(value_losses, mask),
                "residual/mean": Mean.of(residuals, mask),
                "residual": Values.of(residuals, mask),
                "value/mean": Mean.of(values, mask),
                "value": Values.of(values, mask),
                "value/correlation": Pairs.of(values, rewards, mask),
                "rewards/mean": Mean.of(rewards, mask),
                "rewards/log_ratio_correlation": Pairs.of(ratios, rewards, mask),
                "log_ratios": Values.of(ratios, mask),
                "log_ratios/abs": Values.of(jnp.abs(ratios), mask),
                "log_ratios/pull": Values.of(pull, mask),
                "logps": Mean.of(logps, mask),
                "kl": Mean.of(ratios, mask),
                "kl/token": Mean.of(ratios / jnp.maximum(lengths, 1.0), mask),
                "lengths": Mean.of(lengths, mask),
            },
        )
