"""The train state and the two compiled functions: a training and an evaluation step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxalign import batch as batches
from jaxalign.batch import Batch
from jaxalign.models import adapters
from jaxalign.objectives import Objective, reference_columns
from jaxalign.objectives.base import Statistics, Step, total_loss
from jaxalign.objectives.metrics import Mean, Metrics
from jaxalign.training.optimizers import gradient_norms
from jaxalign.training.partition import REFERENCE, Partition


@flax.struct.dataclass
class TrainState:
    """What a step changes and a checkpoint holds.

    Attributes:
      step: how many steps have been taken.
      params: those that are trained, ``{network: parameters}``, float32.
      opt_state: the optimizer's.
      finite: False once a loss or gradient was not finite. From then on no step
        changes anything, so the state stays the last good one until the host looks.
      frozen: those that no gradient reaches, ``{network: parameters}``: of networks
        that rest, such as the reference, which may also follow the policy by a rule,
        and of those that train in part.
      running: the statistics that an objective adds up over steps.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    finite: jax.Array
    frozen: dict[str, Any] = flax.struct.field(default_factory=dict)
    running: Statistics = flax.struct.field(default_factory=dict)

    @classmethod
    def create(
        cls,
        networks: dict[str, Any],
        tx: optax.GradientTransformation,
        objective: Objective | None = None,
        partition: Partition | None = None,
    ) -> TrainState:
        """A state before the first step.

        Args:
          networks: ``{name: parameters}``.
          tx: the optimizer.
          objective: says which networks are frozen, beside the reference, and which
            statistics add up over steps; None: none are or do.
          partition: says which parameters train; None: all of the other networks'.
        """
        resting = objective.frozen if objective else ()
        partition = partition or Partition(resting=resting)
        params, frozen = partition.split(networks)
        zero = jnp.zeros((), jnp.float32)
        return cls(
            jnp.zeros((), jnp.int32),
            params,
            tx.init(params),
            jnp.array(True),
            frozen,
            dict.fromkeys(objective.running if objective else (), (zero, zero)),
        )

    @property
    def networks(self) -> dict[str, Any]:
        """The parameters of all networks by name, an adapter's beside its base's."""
        return adapters.overlay(self.frozen, self.params)


@dataclasses.dataclass(frozen=True)
class MovingReference:
    """A reference policy that follows the policy (Gorbatovski et al., 2404.09656).

    Every `period` steps ``ref <- mixing * policy + (1 - mixing) * ref``: an exponential
    moving average with ``period=1``, TR-DPO's soft update with more, its hard one with
    ``mixing=1``.

    Attributes:
      mixing: in ``(0, 1]``; the paper finds 0.6 good.
      period: steps between updates; the paper's 512 goes with TRL's defaults.
    """

    mixing: float = 0.6
    period: int = 512

    def __post_init__(self) -> None:
        if not 0.0 < self.mixing <= 1.0 or self.period < 1:
            raise ValueError(
                "A moving reference needs mixing in (0, 1] and a period of at least 1, "
                f"got {self.mixing} and {self.period}."
            )

    def update(self, reference: Any, policy: Any, step: jax.Array) -> Any:
        """The reference after step number `step` (1 for the first)."""
        mixing = jnp.where(step % self.period == 0, self.mixing, 0.0)
        return jax.tree.map(
            lambda old, new: jnp.where(
                mixing > 0, (1.0 - mixing) * old + mixing * new, old
            ),
            reference,
            policy,
        )


def split_microbatches(batch: Batch, count: int) -> Batch:
    """``[B, ...]`` to ``[count, B / count, ...]``, strided.

    A stride, rather than a block, leaves every device with a part of each microbatch,
    so nothing moves between devices.
    """
    return {
        k: jnp.moveaxis(v.reshape(v.shape[0] // count, count, *v.shape[1:]), 1, 0)
        for k, v in batch.items()
    }


def _sum_over(microbatches: Batch, function: Callable[[Batch], Any]) -> Any:
    """Sums a function's output over the leading axis, one microbatch at a time."""
    first = jax.tree.map(lambda x: x[0], microbatches)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, first)
    )
    total, _ = jax.lax.scan(
        lambda acc, mb: (jax.tree.map(jnp.add, acc, function(mb)), None),
        zeros,
        microbatches,
    )
    return total


def check_microbatches(objective: Objective, count: int) -> None:
    """Refuses to cut a batch whose loss is no sum over its parts.

    Raises:
      ValueError: naming the objective.
    """
    if count > 1 and not objective.additive:
        raise ValueError(
            f"The loss of {type(objective).__name__} compares all rows of a batch: it "
            f"is no sum over {count} microbatches. Set NUM_MICROBATCHES=1."
        )


def make_train_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    num_microbatches: int = 1,
    moving_reference: MovingReference | None = None,
    partition: Partition | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Makes ``step(state, batch, key) -> (state, metrics)``, unjitted.

    ``key`` is the run's key: a step folds its own number in, so that a step is a
    function of the state, the batch and the run's seed alone. A batch without the
    reference's columns is scored with the reference that the state holds.

    Args:
      objective: what to minimise.
      tx: the optimizer.
      num_microbatches: pieces the batch is cut into, one after another, to save
        memory. The result does not depend on it: denominators and statistics are the
        whole batch's.
      moving_reference: how the state's reference follows the policy; None: it rests.
      partition: which parameters train; None: all of the networks that do.

    Raises:
      ValueError: for microbatches of an objective that cannot be cut.
    """
    check_microbatches(objective, num_microbatches)
    partition = partition or Partition(resting=objective.frozen)

    def step(
        state: TrainState, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        batch = with_reference(objective, partition.reference(state.frozen), batch)
        denominators = objective.denominators(batch)
        dropout_key = jax.random.fold_in(key, state.step) if objective.dropout else None

        def networks(params: Any, key: jax.Array | None) -> Any:
            return partition.join(params, state.frozen, training=key is not None)

        def whole(params: Any) -> tuple[jax.Array, Any]:
            out, statistics = objective.whole(
                networks(params, dropout_key),
                Step(batch, key=dropout_key),
                lambda found: with_running(found, state.running),
            )
            return total_loss(out.sums, denominators), (*out, statistics)

        def part(params: Any, piece: Step) -> Any:
            out = objective.loss(networks(params, piece.key), piece)
            return total_loss(out.sums, denominators), (out.sums, out.metrics)

        def statistics_of(piece: Batch) -> Statistics:
            return objective.statistics(networks(state.params, None), piece)

        if num_microbatches == 1:
            grads, (sums, metrics, statistics) = jax.grad(whole, has_aux=True)(
                state.params
            )
        else:
            grad = jax.grad(part, has_aux=True)
            pieces = split_microbatches(batch, num_microbatches)
            statistics = with_running(_sum_over(pieces, statistics_of), state.running)

            def accumulate(carry: Any, piece: Any) -> tuple[Any, Metrics]:
                index, mb = piece
                mb_key = None
                if dropout_key is not None:
                    mb_key = jax.random.fold_in(dropout_key, index)
                grads, (sums, metrics) = grad(
                    state.params, Step(mb, statistics, mb_key)
                )
                return jax.tree.map(jnp.add, carry, (grads, sums)), metrics

            first = jax.tree.map(lambda x: x[0], pieces)
            shapes, (sum_shapes, _) = jax.eval_shape(
                grad, state.params, Step(first, statistics, dropout_key)
            )
            zeros = jax.tree.map(
                lambda s: jnp.zeros(s.shape, s.dtype), (shapes, sum_shapes)
            )
            (grads, sums), metrics = jax.lax.scan(
                accumulate, zeros, (jnp.arange(num_microbatches), pieces)
            )
        loss = total_loss(sums, denominators)
        with jax.named_scope("optimizer"):
            norms = gradient_norms(grads)
            finite = jnp.isfinite(loss) & jnp.isfinite(norms["grad_norm"])
            finite &= state.finite
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        running = {name: statistics[name] for name in objective.running}
        moved = {}
        if moving_reference:
            moved[REFERENCE] = moving_reference.update(
                state.frozen[REFERENCE], params["policy"], state.step + 1
            )
        with jax.named_scope("optimizer"):
            # A select, not a branch: it fuses with the update.
            params, opt_state, running, moved = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (params, opt_state, running, moved),
                (
                    state.params,
                    state.opt_state,
                    state.running,
                    {name: state.frozen[name] for name in moved},
                ),
            )
            norms["update_norm"] = optax.tree.norm(updates)
            norms["param_norm"] = optax.tree.norm(params)
        one = jnp.ones(())
        metrics = dict(metrics)
        metrics["objective"] = Mean(loss, one)
        metrics |= {name: Mean(norm, one) for name, norm in norms.items()}
        counts = batches.denominators(batch)
        for name in ("tokens", "responses", "pairs"):
            metrics[f"batch/{name}"] = Mean(counts[name], one)
        advanced = TrainState(
            state.step + finite.astype(jnp.int32),
            params,
            opt_state,
            finite,
            {**state.frozen, **moved},
            running,
        )
        return advanced, metrics

    return step


def with_reference(objective: Objective, reference: Any, batch: Batch) -> Batch:
    """The batch with the reference columns an objective needs, scored now.

    One that has them, or no `reference`, leaves it as it is.
    """
    needed = reference is not None and objective.uses_reference
    if not needed or "response_ref_logps" in batch:
        return batch
    columns = reference_columns(
        objective.model,
        reference,
        batch,
        mismatched=objective.uses_mismatched,
    )
    return {**batch, **columns}


def with_running(statistics: Statistics, running: Statistics) -> Statistics:
    """A batch's statistics, those that run on added to all before them."""
    return {
        name: jax.tree.map(jnp.add, running[name], found) if name in running else found
        for name, found in statistics.items()
    }


def make_eval_step(
    objective: Objective, partition: Partition | None = None
) -> Callable[..., Metrics]:
    """Makes ``step(state, batch) -> metrics``, unjitted, without dropout.

    The training state's running statistics and its reference stand in for the batch's
    own, and nothing is changed; of the rest of the state only networks are read.

    The objective's sums come back as ``objective/<denominator>`` metrics, so that the
    loss over a whole evaluation set is `evaluation_loss` of their summary.
    """
    partition = partition or Partition(resting=objective.frozen)

    def step(state: TrainState, batch: Batch) -> Metrics:
        batch = with_reference(objective, partition.reference(state.frozen), batch)
        networks = partition.join(state.params, state.frozen)
        out, _ = objective.whole(
            networks, Step(batch), lambda found: found | state.running
        )
        # A batch that keeps nothing has a count of 0, and so weighs nothing.
        counts = objective.denominators(batch)
        sums = {
            f"objective/{name}": Mean(value, counts[name])
            for name, value in out.sums.items()
        }
        return {**out.metrics, **sums}

    return step


def evaluation_loss(summary: dict[str, float]) -> dict[str, float]:
    """Folds ``objective/<denominator>`` entries of a summary into ``objective``."""
    parts = {k: v for k, v in summary.items() if k.startswith("objective/")}
    rest = {k: v for k, v in summary.items() if k not in parts}
    return {**rest, "objective": sum(parts.values())}
