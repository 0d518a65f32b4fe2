"""Supervised fine-tuning: maximum likelihood of the responses."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxalign import losses, models
from jaxalign.batch import Batch
from jaxalign.objectives.base import LossOutput, Objective, Params, Step
from jaxalign.objectives.metrics import Mean, Metrics


@dataclasses.dataclass(frozen=True)
class SFT(Objective):
    """Token-weighted cross-entropy: every target token of the batch counts the same.

    Attributes:
      label_smoothing: probability spread over the wrong tokens (T5X's
        ``LABEL_SMOOTHING``).
      z_loss: weight of the squared log-normaliser (T5X's ``Z_LOSS``).
    """

    dropout: bool = True
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    schema: ClassVar[str] = "supervised"
    denominator: ClassVar[str] = "tokens"

    def token_weights(self, batch: Batch) -> jax.Array:
        """``[B, K, Ld]``: how much each target token counts."""
        return batch["decoder_loss_weights"]

    def own_metrics(self, batch: Batch) -> Metrics:
        """What a kind of imitation reports beside the likelihood."""
        del batch
        return {}

    def loss(self, params: Params, step: Step) -> LossOutput:
        batch, config = step.batch, self.model.config
        states, kernel, _ = models.final_states(
            self.model,
            params["policy"],
            batch,
            deterministic=not self.dropout or step.key is None,
            dropout_key=step.key,
        )
        targets, weights = batch["decoder_target_tokens"], self.token_weights(batch)
        out = models.head_outputs(states, kernel, targets, chunk=config.logits_chunk)
        smoothing = {}
        if self.label_smoothing:
            smoothing = {
                "mean_logits": models.mean_logits(states, kernel),
                "vocab_size": kernel.shape[-1],
                "label_smoothing": self.label_smoothing,
            }
        losses_ = losses.cross_entropy(
            out.target_logits, out.log_z, z_loss=self.z_loss, where=weights, **smoothing
        )
        nll = jax.lax.stop_gradient(-out.logps)
        correct = out.target_logits >= out.max_logits
        return LossOutput(
            {self.denominator: jnp.sum(losses_ * weights)},
            {
                "loss": Mean.of(losses_, weights),
                "nll": Mean.of(nll, weights),
                "accuracy": Mean.of(correct, weights),
                **self.own_metrics(batch),
            },
        )
