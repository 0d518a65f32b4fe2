"""What optimizers and functions are made of: two that differ are told apart."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from jaxalign.training import optimizers, schedules
from jaxalign.training.description import describe

RATE = 0.1


def scaled(step):
    return RATE * step


def _custom(factor):
    def update(updates, state, params=None):
        return jax.tree.map(lambda x: factor * x, updates), state

    return optax.GradientTransformation(lambda params: (), update)


# Each makes a new optimizer of a number; another number is another optimizer.
MAKERS = {
    "ours": lambda x: optimizers.optimizer("adamw", learning_rate=x),
    "ours, an argument": lambda x: optimizers.optimizer(
        "adamw", learning_rate=0.5, weight_decay=x
    ),
    "ours, a clip": lambda x: optimizers.adafactor(1.0, grad_clip=x),
    "a schedule": lambda x: optimizers.adafactor(schedules.cosine(x, 100)),
    "a schedule's length": lambda x: optimizers.adafactor(
        schedules.linear(1.0, int(1000 * x))
    ),
    "per network": lambda x: optimizers.per_network(
        policy=optax.sgd(0.1), value=optax.sgd(x)
    ),
    "optax": lambda x: optax.adamw(x),
    "optax, a schedule": lambda x: optax.sgd(optax.exponential_decay(x, 10, 0.5)),
    "a chain": lambda x: optax.chain(optax.clip(x), optax.sgd(0.1)),
    "schedule free": lambda x: optax.contrib.schedule_free_sgd(x),
    "hyperparameters in the state": lambda x: optax.inject_hyperparams(optax.sgd)(x),
    "several steps": lambda x: optax.MultiSteps(optax.sgd(x), 2),
    "a mask": lambda x: optax.masked(optax.sgd(x), {"policy": True}),
    "one's own": _custom,
    "a partial": lambda x: functools.partial(scaled, rate=x),
    "an array": lambda x: _custom(jnp.full(3, x)),
    "compiled": lambda x: jax.jit(lambda step: step * x),
    "a lambda's default": lambda x: lambda step, rate=x: rate * step,
}


@pytest.mark.parametrize("name", MAKERS)
def test_two_numbers_are_two_optimizers_and_one_is_one(name):
    make = MAKERS[name]
    first, again, other = (
        describe(make(0.25)),
        describe(make(0.25)),
        describe(make(0.5)),
    )
    assert first == again
    assert {k for k in first if first[k] != other.get(k)}
    assert not any("0x" in str(value) for value in first.values())


def test_the_names_are_those_of_the_settings():
    found = describe(
        optimizers.optimizer("adamw", learning_rate=schedules.constant(1e-3), b1=0.8)
    )
    assert found["name"] == "adamw"
    assert found["b1"] == 0.8
    assert found["learning_rate.learning_rate"] == 1e-3


def test_functions_that_differ_in_a_constant_or_in_what_they_read(monkeypatch):
    assert describe(lambda s: 1e-3 * s) != describe(lambda s: 1e-2 * s)
    assert describe(lambda s: s + 1) != describe(lambda s: s * 1)
    before = describe(scaled)
    assert before["RATE"] == RATE
    monkeypatch.setitem(globals(), "RATE", 0.2)
    assert describe(scaled) != before


def test_what_contains_itself_ends():
    loop: list = [1]
    loop.append(loop)
    assert describe(loop) == {"[0]": 1, "[1]": "itself"}

    def countdown(n):
        return n and countdown(n - 1)

    assert describe(countdown)["countdown"] == "itself"


def test_arrays_are_told_by_their_content():
    assert describe(np.zeros(3)) != describe(np.ones(3))
    assert describe(np.float32(0.5)) == {"": 0.5}


def test_what_gin_binds_to_a_function_is_part_of_it():
    import gin

    gin.clear_config()
    rate = gin.external_configurable(lambda step, rate=1.0: rate, name="rate_of_test")
    gin.parse_config("rate_of_test.rate = 3.0")
    first = describe(rate)
    assert first["rate"] == 3.0
    gin.clear_config()
    gin.parse_config("rate_of_test.rate = 4.0")
    assert describe(rate) != first
    gin.clear_config()
