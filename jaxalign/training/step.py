"""The train state and the two compiled functions: a training and an evaluation step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxalign import batch as batches
from jaxalign.batch import Batch
from jaxalign.objectives import Objective, reference_columns
from jaxalign.objectives.metrics import Mean, Metrics
from jaxalign.training.optimizers import gradient_norms


@flax.struct.dataclass
class TrainState:
    """What a step changes and a checkpoint holds.

    Attributes:
      step: how many steps have been taken.
      params: ``{"policy": ..., ...}``, float32.
      opt_state: the optimizer's.
      finite: False once a loss or gradient was not finite. From then on no step
        changes anything, so the state stays the last good one until the host looks.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    finite: jax.Array

    @classmethod
    def create(cls, params: Any, tx: optax.GradientTransformation) -> TrainState:
        return cls(jnp.zeros((), jnp.int32), params, tx.init(params), jnp.array(True))


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


def loss_and_metrics(
    objective: Objective,
    params: Any,
    batch: Batch,
    denominators: dict[str, jax.Array],
    statistics: Any,
    dropout_key: jax.Array | None,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], Metrics]]:
    """The scalar to differentiate: sums over *global* denominators."""
    out = objective.loss(params, batch, statistics=statistics, dropout_key=dropout_key)
    total = sum(out.sums[name] / denominators[name] for name in sorted(out.sums))
    return total, (out.sums, out.metrics)


def make_train_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    num_microbatches: int = 1,
    reference_params: bool = False,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Makes ``step(state, batch, key, reference=None) -> (state, metrics)``, unjitted.

    ``key`` is the run's key: a step folds its own number in, so that a step is a
    function of the state, the batch and the run's seed alone.

    Args:
      objective: what to minimise.
      tx: the optimizer.
      num_microbatches: pieces the batch is cut into, one after another, to save
        memory. The result does not depend on it: denominators and statistics are the
        whole batch's.
      reference_params: whether the step is given the reference policy's parameters
        and scores the batch with them, in place of cached columns.
    """

    def step(
        state: TrainState, batch: Batch, key: jax.Array, reference: Any = None
    ) -> tuple[TrainState, Metrics]:
        if reference_params:
            columns = reference_columns(
                objective.model,
                reference,
                batch,
                mismatched=objective.uses_mismatched,
            )
            batch = {**batch, **columns}
        denominators = batches.denominators(batch)
        dropout_key = jax.random.fold_in(key, state.step) if objective.dropout else None
        grad = jax.grad(
            lambda p, b, s, k: loss_and_metrics(objective, p, b, denominators, s, k),
            has_aux=True,
        )
        if num_microbatches == 1:
            statistics = objective.statistics(state.params, batch)
            grads, (sums, metrics) = grad(state.params, batch, statistics, dropout_key)
        else:
            pieces = split_microbatches(batch, num_microbatches)
            statistics = _sum_over(
                pieces, lambda b: objective.statistics(state.params, b)
            )

            def accumulate(carry: Any, piece: Any) -> tuple[Any, Metrics]:
                index, mb = piece
                mb_key = None
                if dropout_key is not None:
                    mb_key = jax.random.fold_in(dropout_key, index)
                grads, (sums, metrics) = grad(state.params, mb, statistics, mb_key)
                return jax.tree.map(jnp.add, carry, (grads, sums)), metrics

            first = jax.tree.map(lambda x: x[0], pieces)
            shapes, (sum_shapes, _) = jax.eval_shape(
                grad, state.params, first, statistics, dropout_key
            )
            zeros = jax.tree.map(
                lambda s: jnp.zeros(s.shape, s.dtype), (shapes, sum_shapes)
            )
            (grads, sums), metrics = jax.lax.scan(
                accumulate, zeros, (jnp.arange(num_microbatches), pieces)
            )
        loss = sum(sums[name] / denominators[name] for name in sorted(sums))
        norms = gradient_norms(grads)
        finite = state.finite & jnp.isfinite(loss) & jnp.isfinite(norms["grad_norm"])
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # A select, not a branch: it fuses with the update.
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        one = jnp.ones(())
        metrics = dict(metrics)
        metrics["objective"] = Mean(loss, one)
        metrics |= {name: Mean(norm, one) for name, norm in norms.items()}
        metrics["update_norm"] = Mean(optax.tree.norm(updates), one)
        metrics["param_norm"] = Mean(optax.tree.norm(params), one)
        for name in ("tokens", "responses", "pairs"):
            metrics[f"batch/{name}"] = Mean(denominators[name], one)
        advanced = TrainState(
            state.step + finite.astype(jnp.int32), params, opt_state, finite
        )
        return advanced, metrics

    return step


def make_eval_step(objective: Objective) -> Callable[[Any, Batch], Metrics]:
    """Makes ``step(params, batch) -> metrics``, unjitted, without dropout.

    The objective's sums come back as ``objective/<denominator>`` metrics, so that the
    loss over a whole evaluation set is `evaluation_loss` of their summary.
    """

    def step(params: Any, batch: Batch) -> Metrics:
        statistics = objective.statistics(params, batch)
        out = objective.loss(params, batch, statistics=statistics)
        counts = batches.denominators(batch)
        # An all-padding batch must weigh nothing, so its count is zero, not one.
        nonempty = jnp.any(batch["response_mask"] > 0).astype(jnp.float32)
        sums = {
            f"objective/{name}": Mean(value * nonempty, counts[name] * nonempty)
            for name, value in out.sums.items()
        }
        return {**out.metrics, **sums}

    return step


def evaluation_loss(summary: dict[str, float]) -> dict[str, float]:
    """Folds ``objective/<denominator>`` entries of a summary into ``objective``."""
    parts = {k: v for k, v in summary.items() if k.startswith("objective/")}
    rest = {k: v for k, v in summary.items() if k not in parts}
    return {**rest, "objective": sum(parts.values())}
