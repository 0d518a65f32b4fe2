"""Supervised fine-tuning: maximum likelihood of the responses."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxalign import losses
from jaxalign.batch import Batch
from jaxalign.objectives.base import LossOutput, Objective, Params, Statistics
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

    def loss(
        self,
        params: Params,
        batch: Batch,
        *,
        statistics: Statistics,
        dropout_key: jax.Array | None = None,
    ) -> LossOutput:
        drop = self.dropout and dropout_key is not None
        logits = self.model.apply(
            {"params": params["policy"]},
            batch,
            deterministic=not drop,
            rngs={"dropout": dropout_key} if drop else {},
        )
        targets, weights = batch["decoder_target_tokens"], self.token_weights(batch)
        losses_ = losses.cross_entropy(
            logits,
            targets,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            where=weights,
        )
        nll = losses.cross_entropy(jax.lax.stop_gradient(logits), targets)
        correct = jnp.argmax(logits, axis=-1) == targets
        return LossOutput(
            {self.denominator: jnp.sum(losses_ * weights)},
            {
                "loss": Mean.of(losses_, weights),
                "nll": Mean.of(nll, weights),
                "accuracy": Mean.of(correct, weights),
                **self.own_metrics(batch),
            },
        )
