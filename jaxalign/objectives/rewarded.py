"""Objectives on trajectories with scalar rewards: DRO, and weighted imitation."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxalign import batch as batches
from jaxalign import losses, models
from jaxalign.batch import Batch
from jaxalign.objectives.base import (
    LossOutput,
    Outputs,
    Params,
    Statistics,
    WholeBatchObjective,
    answers,
)
from jaxalign.objectives.metrics import Mean, Metrics, Pairs, Values
from jaxalign.objectives.sft import SFT

VALUE_KINDS = ("prompt_scalar", "token_mean", "batch_constant")


@dataclasses.dataclass(frozen=True)
class DROV(WholeBatchObjective):
    """DRO-V: direct reward optimisation from scalar rewards, with a learned value.

    As the paper trains it: two networks that share nothing, one scalar value per
    prompt, sums of log-probabilities. Rewards are standardised by the feed with the
    training split's mean and deviation, which the checkpoint keeps. The other value
    kinds and the shared trunk are the arms of the paper's ablation, where they lose.

    Attributes:
      tau: strength of the KL constraint, in (standardised) reward per nat.
      rescale: divide the policy's loss by ``tau``, as the paper does.
      value_kind: ``"prompt_scalar"``; ``"token_mean"``, the mean over a response's
        positions of a value read off the decoder; or ``"batch_constant"``, the mean of
        the prompts' values over the batch ("single value").
      share_trunk: read the value off the policy's own states, with one trunk for both
        losses.
    """

    tau: float = 1.0
    rescale: bool = True
    value_kind: str = "prompt_scalar"
    share_trunk: bool = False

    schema: ClassVar[str] = "trajectory"
    columns: ClassVar[tuple[str, ...]] = ("response_reward", "response_ref_logps")

    def __post_init__(self) -> None:
        if self.value_kind not in VALUE_KINDS:
            raise ValueError(
                f"DROV.value_kind must be one of {VALUE_KINDS}, got "
                f"{self.value_kind!r}."
            )

    def networks(self) -> dict[str, Any]:
        read = "response_mean" if self.value_kind == "token_mean" else "prompt_mean"
        value = models.ScalarModel(
            config=self.model.config, read=read, trunk=not self.share_trunk
        )
        return {"policy": self.model, "value": value}

    def forward(
        self, params: Params, batch: Batch, key: jax.Array | None = None
    ) -> Outputs:
        if not self.share_trunk or key is not None:
            logps = self.response_logps(params, batch, key)
            return {"logps": logps, "values": self.values(params, batch)}
        encoded = models.encode(self.model, params["policy"], batch)
        logps = models.response_logps(
            self.model, params["policy"], batch, encoded=encoded
        )
        return {"logps": logps, "values": self.values(params, batch, encoded)}

    def values(
        self, params: Params, batch: Batch, encoded: jax.Array | None = None
    ) -> jax.Array:
        """``[B, R]``: the value each response is compared with.

        Args:
          params: of both networks.
          batch: a response batch.
          encoded: the policy's encoder states, if they are at hand; a shared trunk
            reads them.
        """
        net, own = self.networks()["value"], {"params": params["value"]}
        if self.share_trunk and encoded is None:
            encoded = models.encode(self.model, params["policy"], batch)
        if self.value_kind == "token_mean":
            if not self.share_trunk:
                return net.apply(own, batch)
            states = self.model.apply(
                {"params": params["policy"]}, batch, encoded, method=_decoder_states
            )
            return net.apply(own, batch, states)
        by_prompt = (
            net.apply(own, batch, encoded)
            if self.share_trunk
            else net.apply(own, batch)
        )
        return jnp.take_along_axis(by_prompt, batch["response_prompt"], axis=1)

    def statistics_of(self, batch: Batch, outputs: Outputs) -> Statistics:
        if self.value_kind != "batch_constant":
            return {}
        mask = answers(batch)
        targets = losses.masked(_targets(batch, outputs["logps"], self.tau), mask)
        values = losses.masked(outputs["values"], mask)
        count = jnp.sum(mask)
        return {
            "targets": (jnp.sum(targets), count),
            "values": (jnp.sum(values), count),
        }

    def loss_of(
        self, batch: Batch, outputs: Outputs, statistics: Statistics
    ) -> LossOutput:
        mask = answers(batch)
        logps, values = outputs["logps"], outputs["values"]
        moving = 0.0
        if self.value_kind == "batch_constant":
            mean = {k: t / jnp.maximum(n, 1.0) for k, (t, n) in statistics.items()}
            # The gradient of (mean(V) - t)^2 / 2 needs every prompt of the batch; this
            # term is zero and has it.
            gap = mean["values"] - mean["targets"]
            moving = gap * losses.masked(values - jax.lax.stop_gradient(values), mask)
            values = jnp.full_like(values, mean["values"])
        policy_losses, value_losses = losses.dro_v(
            logps,
            batch["response_ref_logps"],
            values,
            batch["response_reward"],
            tau=self.tau,
            rescale=self.rescale,
            where=mask,
        )
        metrics = _regression_metrics(batch, logps, values, mask, self.tau)
        targets = _targets(batch, logps, self.tau)
        return LossOutput(
            {"responses": jnp.sum(policy_losses + value_losses + moving)},
            {
                **metrics,
                "loss/policy": Mean.of(policy_losses, mask),
                "loss/value": Mean.of(value_losses, mask),
                "value/mean": Mean.of(values, mask),
                "value": Values.of(values, mask),
                "value/correlation": Pairs.of(values, targets, mask),
            },
        )


def _targets(batch: Batch, logps: jax.Array, tau: float) -> jax.Array:
    """``r - tau lr``: what DRO regresses a response's value on."""
    ratios = losses.log_ratios(logps, batch["response_ref_logps"])
    return batch["response_reward"] - tau * ratios


def _decoder_states(
    module: models.EncoderDecoder, batch: Batch, encoded: jax.Array
) -> jax.Array:
    """``[B, K, Ld, E]``: the states the vocabulary head reads."""
    return module.decode(
        encoded,
        batch["encoder_segment_ids"],
        batch["decoder_input_tokens"],
        batch["decoder_segment_ids"],
        batches.prompt_of_tokens(
            batch["decoder_segment_ids"], batch["response_prompt"]
        ),
    )


@dataclasses.dataclass(frozen=True)
class DROP(WholeBatchObjective):
    """DRO-P: the variance over the batch in place of a learned value.

    Attributes:
      tau: strength of the KL constraint, in (standardised) reward per nat.
    """

    tau: float = 1.0

    schema: ClassVar[str] = "trajectory"
    columns: ClassVar[tuple[str, ...]] = ("response_reward", "response_ref_logps")

    def forward(
        self, params: Params, batch: Batch, key: jax.Array | None = None
    ) -> Outputs:
        return {"logps": self.response_logps(params, batch, key)}

    def statistics_of(self, batch: Batch, outputs: Outputs) -> Statistics:
        mask = answers(batch)
        u = losses.masked(_targets(batch, outputs["logps"], self.tau), mask)
        return {"u": (jnp.sum(u), jnp.sum(mask))}

    def loss_of(
        self, batch: Batch, outputs: Outputs, statistics: Statistics
    ) -> LossOutput:
        total, count = statistics["u"]
        mean = total / jnp.maximum(count, 1.0)
        mask, logps = answers(batch), outputs["logps"]
        losses_ = losses.dro_p_at_mean(
            logps,
            batch["response_ref_logps"],
            batch["response_reward"],
            mean,
            tau=self.tau,
            where=mask,
        )
        values = jnp.full_like(logps, mean)
        return LossOutput(
            {"responses": jnp.sum(losses_)},
            _regression_metrics(batch, logps, values, mask, self.tau),
        )


def _regression_metrics(
    batch: Batch, logps: jax.Array, values: jax.Array, mask: jax.Array, tau: float
) -> Metrics:
    """What DRO reports: residuals, log-ratios, and which of the two terms rules."""
    rewards = batch["response_reward"]
    ratios = losses.log_ratios(logps, batch["response_ref_logps"])
    residuals = rewards - values - tau * ratios
    lengths = batches.response_lengths(batch)
    pull = jnp.abs(tau * ratios) / jnp.maximum(jnp.abs(rewards - values), 1e-6)
    return {
        "loss": Mean.of(0.5 * jnp.square(residuals), mask),
        "residual/mean": Mean.of(residuals, mask),
        "residual": Values.of(residuals, mask),
        "rewards/mean": Mean.of(rewards, mask),
        "rewards/log_ratio_correlation": Pairs.of(ratios, rewards, mask),
        "log_ratios": Values.of(ratios, mask),
        "log_ratios/abs": Values.of(jnp.abs(ratios), mask),
        "log_ratios/pull": Values.of(pull, mask),
        "logps": Mean.of(logps, mask),
        "log_ratios/mean": Mean.of(ratios, mask),
        "log_ratios/token": Mean.of(ratios / jnp.maximum(lengths, 1.0), mask),
        "lengths": Mean.of(lengths, mask),
    }


@dataclasses.dataclass(frozen=True)
class FilteredSFT(SFT):
    """Maximum likelihood of the responses with good rewards only (RAFT).

    Attributes:
      threshold: standardised rewards above it are kept, 0 being the data's mean; None
        keeps all.
      best_of_prompt: of the responses to one prompt, keep only the best, as RAFT does
        with its samples (Dong et al. 2023, arXiv 2304.06767); rows must hold a prompt's
        responses together.
    """

    threshold: float | None = 0.0
    best_of_prompt: bool = False

    schema: ClassVar[str] = "trajectory"
    columns: ClassVar[tuple[str, ...]] = ("response_reward",)
    denominator: ClassVar[str] = "weighted_tokens"

    def response_weights(self, batch: Batch) -> jax.Array:
        """``[B, R]``: how much each response counts."""
        rewards, kept = batch["response_reward"], answers(batch)
        if self.threshold is not None:
            kept = kept * (rewards > self.threshold)
        if self.best_of_prompt:
            prompt = batch["response_prompt"]
            rival = (prompt[:, :, None] == prompt[:, None, :]) & (
                answers(batch)[:, None, :] > 0
            )
            best = jnp.max(jnp.where(rival, rewards[:, None, :], -jnp.inf), axis=2)
            kept = kept * (rewards >= best)
        return kept

    def token_weights(self, batch: Batch) -> jax.Array:
        weights = batches.by_token(
            self.response_weights(batch), batch["decoder_segment_ids"]
        )
        return weights * batch["decoder_loss_weights"]

    def own_metrics(self, batch: Batch) -> Metrics:
        weights, mask = self.response_weights(batch), answers(batch)
        return {
            "kept": Mean.of(weights > 0, mask),
            "weights": Values.of(weights, mask),
            "rewards/kept": Mean.of(batch["response_reward"], weights * mask),
        }

    def denominators(self, batch: Batch) -> dict[str, jax.Array]:
        return {"weighted_tokens": jnp.sum(self.token_weights(batch))}


@dataclasses.dataclass(frozen=True)
class RewardWeightedSFT(FilteredSFT):
    """Maximum likelihood weighted by ``exp(reward / temperature)`` (RWR, AWR).

    Rewards are standardised, so the baseline of the advantage is the data's mean. An
    infinite temperature is plain SFT on all responses.

    Attributes:
      temperature: in standard deviations of the reward.
      max_weight: bound on a weight.
    """

    threshold: float | None = None
    temperature: float = 1.0
    max_weight: float = 20.0

    def response_weights(self, batch: Batch) -> jax.Array:
        return super().response_weights(batch) * losses.reward_weights(
            batch["response_reward"],
            temperature=self.temperature,
            max_weight=self.max_weight,
        )
