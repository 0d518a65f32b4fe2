"""What the training loop asks of an objective, and what all objectives share."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax

from jaxalign import batch as batches
from jaxalign import models
from jaxalign.batch import Batch
from jaxalign.objectives.metrics import Metrics

Params = dict[str, Any]
Statistics = dict[str, tuple[jax.Array, jax.Array]]


class LossOutput(NamedTuple):
    """Sums by the denominator each is to be divided by, and metrics.

    The trainer's loss is ``sum(sums[d] / denominators(global batch)[d])``, so that
    ``k`` microbatches of ``B / k`` rows equal one of ``B``.
    """

    sums: dict[str, jax.Array]
    metrics: Metrics


@dataclasses.dataclass(frozen=True)
class Objective(abc.ABC):
    """A model's forward pass, a loss and its metrics: something the loop can step.

    A subclass sets the class variables, implements `loss`, and is then known to the
    command line, the gin files and the tests by its class name. Class variables:

    * ``schema``: the data schema it trains on;
    * ``columns``: batch arrays it needs beyond what every batch has;
    * ``min_prompts``: how many different prompts an encoder row must hold;
    * ``running``: names of `statistics` that go on adding up over the steps of a run.

    Attributes:
      model: the policy's network.
      dropout: whether the policy's forward pass drops units. Off for every objective
        with a reference: with dropout, log-ratios are noise even where policy and
        reference are equal.
    """

    model: models.T5
    dropout: bool = False

    schema: ClassVar[str] = ""
    columns: ClassVar[tuple[str, ...]] = ()
    min_prompts: ClassVar[int] = 1
    running: ClassVar[tuple[str, ...]] = ()

    @property
    def uses_reference(self) -> bool:
        return "response_ref_logps" in self.columns

    @property
    def uses_mismatched(self) -> bool:
        return "response_ref_kl_logps" in self.columns

    @property
    def uses_rewards(self) -> bool:
        return "response_reward" in self.columns

    @property
    def requires(self) -> list[str]:
        """What every single trajectory must carry: of ``reward`` and ``label``."""
        return [f for f in ("reward", "label") if f"response_{f}" in self.columns]

    def networks(self) -> dict[str, Any]:
        """The networks by name; ``"policy"`` is what a checkpoint is used for."""
        return {"policy": self.model}

    def init_params(self, key: jax.Array) -> Params:
        """Initialises every network: ``{name: parameters}``, float32."""
        nets = self.networks()
        keys = jax.random.split(key, len(nets))
        return {
            name: models.init_params(net, k)
            for (name, net), k in zip(nets.items(), keys, strict=True)
        }

    def logical_axes(self) -> dict[str, Any]:
        """Logical axis names for each parameter, same tree as `init_params`."""
        return {n: models.logical_axes(net) for n, net in self.networks().items()}

    def start_from(self, params: Params, policy_params: Any) -> Params:
        """Replaces freshly initialised parameters by those of a trained policy."""
        return {**params, "policy": policy_params}

    def statistics(self, params: Params, batch: Batch) -> Statistics:
        """Sums and counts that a loss needs over the *global* batch, if any.

        The trainer adds them over microbatches before it asks for any loss; they carry
        no gradient. Those named in ``running`` it adds over steps, too.
        """
        del params, batch
        return {}

    def denominators(self, batch: Batch) -> dict[str, jax.Array]:
        """What the sums of `loss` are divided by, counted over the *global* batch."""
        return batches.denominators(batch)

    @abc.abstractmethod
    def loss(
        self,
        params: Params,
        batch: Batch,
        *,
        statistics: Statistics,
        dropout_key: jax.Array | None = None,
    ) -> LossOutput:
        """Loss sums and metrics of a batch, or of a part of one."""

    def response_logps(
        self, params: Params, batch: Batch, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """``[B, R]`` summed log-probabilities of the responses under the policy."""
        return models.response_logps(
            self.model,
            params["policy"],
            batch,
            deterministic=not self.dropout or dropout_key is None,
            dropout_key=dropout_key,
        )


def answers(batch: Batch) -> jax.Array:
    """``[B, R]`` mask of responses to the task's own prompt (no rationales)."""
    return batch["response_mask"] * (batch["response_kind"] == batches.ANSWER)
