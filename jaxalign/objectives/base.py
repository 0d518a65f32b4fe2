"""What the training loop asks of an objective, and what all objectives share."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import batch as batches
from jaxalign import models
from jaxalign.batch import Batch
from jaxalign.objectives.metrics import Metrics
from jaxalign.objectives.reference import reference_columns

Params = dict[str, Any]
Statistics = dict[str, tuple[jax.Array, jax.Array]]
Outputs = dict[str, jax.Array]


class Step(NamedTuple):
    """What a loss is computed of, beside the parameters.

    Attributes:
      batch: the response batch, or a part of it.
      statistics: sums and counts over the *global* batch (`Objective.statistics`).
      key: of dropout; None: nothing is dropped.
    """

    batch: Batch
    statistics: Statistics = {}
    key: jax.Array | None = None


class LossOutput(NamedTuple):
    """Sums by the denominator each is to be divided by, and metrics.

    The trainer's loss is ``sum(sums[d] / denominators(global batch)[d])``, so that
    ``k`` microbatches of ``B / k`` rows equal one of ``B``.
    """

    sums: dict[str, jax.Array]
    metrics: Metrics


def total_loss(
    sums: dict[str, jax.Array], denominators: dict[str, jax.Array]
) -> jax.Array:
    """Sums over *global* denominators; a sum over nothing is 0."""
    return sum(
        sums[name] / jnp.where(denominators[name] > 0, denominators[name], 1.0)
        for name in sorted(sums)
    )


@dataclasses.dataclass(frozen=True)
class Objective(abc.ABC):
    """A model's forward pass, a loss and its metrics: something the loop can step.

    A subclass sets the class variables, implements `loss`, and is then known to the
    command line, the gin files and the tests by its class name. Class variables:

    * ``schema``: the data schema it trains on;
    * ``columns``: batch arrays it needs beyond what every batch has;
    * ``min_prompts``: how many different prompts an encoder row must hold;
    * ``running``: names of `statistics` that go on adding up over the steps of a run;
    * ``main``: the network that a checkpoint is used for;
    * ``frozen``: networks that no step changes;
    * ``additive``: whether the loss of a batch is the sum of its microbatches' losses;
    * ``standardised``: whether checkpoints keep mean and deviation of what it scores
      (`jaxalign.training.standard`).

    Attributes:
      model: the policy's network.
      dropout: whether the policy's forward pass drops units. Off for every objective
        with a reference: with dropout, log-ratios are noise even where policy and
        reference are equal.
    """

    model: models.EncoderDecoder
    dropout: bool = False

    schema: ClassVar[str] = ""
    columns: ClassVar[tuple[str, ...]] = ()
    min_prompts: ClassVar[int] = 1
    running: ClassVar[tuple[str, ...]] = ()
    main: ClassVar[str] = "policy"
    frozen: ClassVar[tuple[str, ...]] = ()
    additive: ClassVar[bool] = True
    standardised: ClassVar[bool] = False

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
        """The networks by name, trainable and `frozen`; a checkpoint holds them all."""
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

    def start(self, fresh: Params, loaded: Params) -> Params:
        """The networks before the first step: ``{name: parameters}``.

        Args:
          fresh: what `init_params` makes.
          loaded: of checkpoints, by name: what the run gives a network to start from.

        A network without a checkpoint of its own starts from the main network's, where
        there is one: it takes the leaves that have its own names and shapes
        (`models.graft`), and the rest of it is new.
        """
        main = loaded.get(self.main, {})
        return {n: models.graft(p, loaded.get(n, main)) for n, p in fresh.items()}

    def statistics(self, params: Params, batch: Batch) -> Statistics:
        """Sums and counts that a loss needs over the *global* batch, if any.

        The trainer adds them over microbatches before it asks for any loss; they carry
        no gradient. Those named in ``running`` it adds over steps, too.
        """
        del params, batch
        return {}

    def denominators(self, batch: Batch) -> dict[str, jax.Array]:
        """What the sums of `loss` are divided by, counted over the *global* batch.

        0 where there is nothing to count; the sum is then 0, too, and the trainer
        divides by 1. An evaluation gives such a batch no weight.
        """
        return batches.denominators(batch)

    @abc.abstractmethod
    def loss(self, params: Params, step: Step) -> LossOutput:
        """Loss sums and metrics of a batch, or of a part of one."""

    def whole(
        self, params: Params, step: Step, join: Callable[[Statistics], Statistics]
    ) -> tuple[LossOutput, Statistics]:
        """`statistics` and `loss` of a batch that is not cut into microbatches.

        Args:
          params: of the networks.
          step: the global batch, without statistics.
          join: makes of the batch's statistics those that the loss is given, as
            running ones are added up.

        Returns:
          The loss, and the joined statistics.
        """
        found = join(self.statistics(params, step.batch))
        return self.loss(params, step._replace(statistics=found)), found

    def batch_loss(
        self, params: Params, batch: Batch, key: jax.Array | None = None
    ) -> tuple[jax.Array, Metrics]:
        """The loss of a global batch in one piece, and its metrics.

        What a training loop that is not this library's differentiates.

        Args:
          params: of the networks; ``"reference"`` scores a batch that lacks the
            reference's columns.
          batch: the global batch.
          key: of dropout; it does nothing for an objective without.
        """
        if self.uses_reference and "response_ref_logps" not in batch:
            scored = reference_columns(
                self.model, params["reference"], batch, mismatched=self.uses_mismatched
            )
            batch = {**batch, **scored}
        step = Step(batch, key=key if self.dropout else None)
        out, _ = self.whole(params, step, lambda found: found)
        return total_loss(out.sums, self.denominators(batch)), out.metrics

    def response_logps(
        self, params: Params, batch: Batch, key: jax.Array | None = None
    ) -> jax.Array:
        """``[B, R]`` summed log-probabilities of the responses under the policy."""
        return models.response_logps(
            self.model,
            params["policy"],
            batch,
            deterministic=not self.dropout or key is None,
            dropout_key=key,
        )


class WholeBatchObjective(Objective):
    """An objective whose loss looks at statistics of the whole batch.

    A subclass says what it computes of the networks (`forward`), and the statistics and
    the loss as functions of that. A batch that is in one piece is then run through the
    networks once; one in microbatches twice, since the first gradient needs the last
    microbatch's numbers.
    """

    @abc.abstractmethod
    def forward(
        self, params: Params, batch: Batch, key: jax.Array | None = None
    ) -> Outputs:
        """What statistics and loss are made of, such as ``{"logps": [B, R]}``.

        Whatever only one of the two reads costs the other nothing once compiled.
        """

    @abc.abstractmethod
    def statistics_of(self, batch: Batch, outputs: Outputs) -> Statistics:
        """`statistics`, given the networks' outputs, which carry no gradient."""

    @abc.abstractmethod
    def loss_of(
        self, batch: Batch, outputs: Outputs, statistics: Statistics
    ) -> LossOutput:
        """`loss`, given the networks' outputs."""

    def statistics(self, params: Params, batch: Batch) -> Statistics:
        return self.statistics_of(
            batch, self.forward(jax.lax.stop_gradient(params), batch)
        )

    def loss(self, params: Params, step: Step) -> LossOutput:
        outputs = self.forward(params, step.batch, step.key)
        return self.loss_of(step.batch, outputs, step.statistics)

    def whole(
        self, params: Params, step: Step, join: Callable[[Statistics], Statistics]
    ) -> tuple[LossOutput, Statistics]:
        if step.key is not None:  # statistics are those of the whole network
            return super().whole(params, step, join)
        outputs = self.forward(params, step.batch)
        found = join(self.statistics_of(step.batch, jax.lax.stop_gradient(outputs)))
        return self.loss_of(step.batch, outputs, found), found


def answers(batch: Batch) -> jax.Array:
    """``[B, R]`` mask of responses to the task's own prompt (no rationales)."""
    return batch["response_mask"] * (batch["response_kind"] == batches.ANSWER)
