"""Learning-rate schedules: T5X's, as plain functions of the step.

Step 0 is this run's first update, also when the run starts from a checkpoint at step
1 000 000 (T5X counts on from there, so that its warm-up is over before fine-tuning
begins). As in T5X, a warm-up starts from 0 and no rate falls below 1e-8.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]

# T5X's floor: a decayed run still moves, if barely.
_MIN_LEARNING_RATE = 1e-8


def _schedule(learning_rate: float, factor: Callable[[jax.Array], jax.Array]):
    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        return jnp.maximum(learning_rate * factor(step), _MIN_LEARNING_RATE)

    return schedule


def _warmup(step: jax.Array, warmup_steps: int) -> jax.Array:
    return jnp.minimum(1.0, step / max(warmup_steps, 1)) if warmup_steps else 1.0


def constant(learning_rate: float, warmup_steps: int = 0) -> Schedule:
    """A constant rate after a linear warm-up from 0.

    Step ``s`` below `warmup_steps` runs at ``learning_rate * s / warmup_steps``.

    >>> float(constant(0.5, warmup_steps=10)(5))
    0.25
    """
    return _schedule(learning_rate, lambda step: _warmup(step, warmup_steps))


def rsqrt(
    learning_rate: float = 1.0, warmup_steps: int = 10_000, linear_warmup: bool = False
) -> Schedule:
    """T5's inverse square root: ``learning_rate / sqrt(max(step, warmup_steps))``.

    The rate is flat for `warmup_steps` (T5's pre-training: 0.01 for 10 000 steps),
    or rises linearly to that value with `linear_warmup`.

    >>> round(float(rsqrt()(0)), 6), round(float(rsqrt()(40_000)), 6)
    (0.01, 0.005)
    """

    def factor(step: jax.Array) -> jax.Array:
        rise = _warmup(step, warmup_steps) if linear_warmup else 1.0
        return rise / jnp.sqrt(jnp.maximum(step, max(warmup_steps, 1)))

    return _schedule(learning_rate, factor)


def _progress(step: jax.Array, total_steps: int, warmup_steps: int) -> jax.Array:
    return jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)


def _check_span(name: str, total_steps: int, warmup_steps: int) -> None:
    if total_steps <= warmup_steps:
        raise ValueError(
            f"{name}: expected total_steps > warmup_steps, got total_steps="
            f"{total_steps} and warmup_steps={warmup_steps}. total_steps counts from "
            "this run's step 0 and includes the warm-up."
        )


def linear(learning_rate: float, total_steps: int, warmup_steps: int = 0) -> Schedule:
    """Linear warm-up to `learning_rate`, then linear decay to 0 at `total_steps`.

    T5X's ``linear_decay`` with ``decay_factor = 1 / (total_steps - warmup_steps)``.

    >>> [round(float(linear(1.0, 12, 2)(s)), 2) for s in (1, 2, 7, 12)]
    [0.5, 1.0, 0.5, 0.0]
    """
    _check_span("linear", total_steps, warmup_steps)
    return _schedule(
        learning_rate,
        lambda step: (
            _warmup(step, warmup_steps)
            * (1.0 - _progress(step, total_steps, warmup_steps))
        ),
    )


def cosine(learning_rate: float, total_steps: int, warmup_steps: int = 0) -> Schedule:
    """Linear warm-up to `learning_rate`, then half a cosine to 0 at `total_steps`.

    Stays at 0 afterwards; T5X's ``cosine_decay`` starts the next cycle there.

    >>> [round(float(cosine(1.0, 12, 2)(s)), 2) for s in (1, 2, 7, 12)]
    [0.5, 1.0, 0.5, 0.0]
    """
    _check_span("cosine", total_steps, warmup_steps)

    def factor(step: jax.Array) -> jax.Array:
        angle = jnp.pi * _progress(step, total_steps, warmup_steps)
        return _warmup(step, warmup_steps) * 0.5 * (1.0 + jnp.cos(angle))

    return _schedule(learning_rate, factor)
