"""Optimizers from gin: T5X's Adafactor, and all of Optax by name.

Everything returns an ``optax.GradientTransformation``. Clipping never hides the norm:
the trainer reports `gradient_norms` of the raw gradients, and the clip is the first
link of the chains built here.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign.training.adafactor import scale_by_adafactor
from jaxalign.training.schedules import Schedule

LearningRate = float | Schedule


def adafactor(
    learning_rate: LearningRate,
    *,
    decay_rate: float = 0.8,
    clipping_threshold: float | None = 1.0,
    multiply_by_parameter_scale: bool = True,
    min_dim_size_to_factor: int = 128,
    factored: bool = True,
    beta1: float | None = None,
    weight_decay_rate: float | None = None,
    epsilon1: float = 1e-30,
    epsilon2: float = 1e-3,
    grad_clip: float | None = None,
) -> optax.GradientTransformation:
    """T5X's Adafactor with T5X's recipe as the defaults, on float32 parameters.

    Args:
      learning_rate: a number or a schedule; with the parameter scale on it is relative
        to each block's root mean square, so natural values are near 1e-3.
      decay_rate: exponent ``c`` of the second moment's decay ``1 - t^-c``.
      clipping_threshold: largest root mean square of a block's update; None: no limit.
      multiply_by_parameter_scale: scale each update by its parameter's root mean
        square, at least `epsilon2`.
      min_dim_size_to_factor: of a block's two largest axes, to factor its moment.
      factored: False keeps every second moment whole.
      beta1: momentum of the updates; None keeps no first moment.
      weight_decay_rate: fraction of each parameter subtracted per step, not multiplied
        by the learning rate (T5X's convention).
      epsilon1: added to squared gradients; `epsilon2` is the smallest parameter scale.
      grad_clip: largest global norm of the gradient.

    >>> tx = adafactor(1e-3)
    >>> params = {"kernel": jnp.ones((256, 128))}
    >>> tx.init(params)[0].v_row["kernel"].shape
    (1, 128)
    """
    settings = dict(locals())
    links = [
        scale_by_adafactor(
            decay_rate,
            clipping_threshold,
            multiply_by_parameter_scale,
            min_dim_size_to_factor,
            factored,
            epsilon1,
            epsilon2,
        ),
        optax.scale_by_learning_rate(learning_rate, flip_sign=False),
    ]
    if beta1 is not None:
        links.append(optax.ema(beta1, debias=False))
    if weight_decay_rate is not None:
        links.append(optax.add_decayed_weights(weight_decay_rate))
    made = _assemble([*links, optax.scale(-1.0)], learning_rate, grad_clip)
    return _described(made, {"name": "adafactor", **settings})


def optimizer(
    name: str = "adafactor",
    *,
    learning_rate: LearningRate,
    grad_clip: float | None = None,
    **kwargs: Any,
) -> optax.GradientTransformation:
    """`adafactor` or any optimizer of Optax, by name.

    In gin: ``optimizer.name = 'adamw'``, ``optimizer.weight_decay = 0.01``.

    Args:
      name: ``"adafactor"`` (T5X's), or a function of ``optax`` that takes a learning
        rate: ``"adamw"``, ``"sgd"``, ``"lion"``, ``"rmsprop"`` ...
      grad_clip: largest global norm of the gradient, over the whole tree that this
        optimizer sees; applied first.
      **kwargs: the optimizer's own arguments.

    >>> params = {"w": jnp.ones(2)}
    >>> tx = optimizer("sgd", learning_rate=1.0, grad_clip=1.0)
    >>> updates, _ = tx.update({"w": jnp.array([3.0, 4.0])}, tx.init(params))
    >>> [round(float(x), 3) for x in updates["w"]]
    [-0.6, -0.8]
    """
    # Optax's optimizers are recognised by their learning rate; Adafactor is ours.
    constructors: dict[str, Callable[..., optax.GradientTransformation]] = {
        name: function
        for name, function in inspect.getmembers(optax, inspect.isfunction)
        if not name.startswith(("_", "scale_by_"))
        and "learning_rate" in inspect.signature(function).parameters
    } | {"adafactor": adafactor}
    if name not in constructors:
        raise ValueError(_unknown("optimizer", name, constructors))
    known = inspect.signature(constructors[name]).parameters
    for key in kwargs:
        if key not in known:
            raise ValueError(_unknown(f"argument of {name}", key, known))
    if name == "adafactor":
        return adafactor(learning_rate, grad_clip=grad_clip, **kwargs)
    bound = inspect.signature(constructors[name]).bind(learning_rate, **kwargs)
    link = constructors[name](*bound.args, **bound.kwargs)
    made = _assemble([link], learning_rate, grad_clip)
    bound.apply_defaults()
    return _described(made, {"name": name, "grad_clip": grad_clip, **bound.arguments})


def per_network(
    **transformations: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """One optimizer per network, keyed by the parameters' top-level names, all of them.

    Each has its own learning rate, state and clip: a norm is taken over one network
    only. DRO-V wants this, because a shared clip would let the value's gradients
    shrink the policy's.

    >>> tx = per_network(policy=optax.sgd(1.0), value=optax.sgd(0.1))
    >>> params = {"policy": jnp.ones(1), "value": jnp.ones(1)}
    >>> updates, _ = tx.update(params, tx.init(params))
    >>> float(updates["policy"][0]), round(float(updates["value"][0]), 3)
    (-1.0, -0.1)
    """

    def labels(params: Mapping[str, Any]) -> dict[str, str]:
        if set(params) != set(transformations):
            raise ValueError(
                f"per_network: expected optimizers for {sorted(params)}, got "
                f"{sorted(transformations)}. Give one per top-level name of the "
                "parameters."
            )
        return {name: name for name in params}

    return _described(optax.multi_transform(transformations, labels), transformations)


def gradient_norms(grads: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Global norms before clipping: ``grad_norm``, and one per network if several.

    >>> norms = gradient_norms({"policy": jnp.array([3.0]), "value": jnp.array([4.0])})
    >>> {name: float(norm) for name, norm in sorted(norms.items())}
    {'grad_norm': 5.0, 'grad_norm/policy': 3.0, 'grad_norm/value': 4.0}
    """
    parts = {f"grad_norm/{name}": optax.tree.norm(g) for name, g in grads.items()}
    total = jnp.sqrt(sum(jnp.square(norm) for norm in parts.values()))
    return {"grad_norm": total, **(parts if len(parts) > 1 else {})}


def learning_rates(state: optax.OptState) -> dict[str, jax.Array]:
    """The rate of the last update: ``learning_rate``, with `per_network` one each.

    Nothing for an optimizer that this module did not build.

    >>> tx = optimizer("sgd", learning_rate=lambda step: 0.5 / (step + 1))
    >>> state = tx.init({"w": jnp.ones(1)})
    >>> for _ in range(2):
    ...     _, state = tx.update({"w": jnp.ones(1)}, state)
    >>> {name: float(rate) for name, rate in learning_rates(state).items()}
    {'learning_rate': 0.25}
    """
    if isinstance(state, optax.MultiTransformState):
        return {
            f"{metric}/{name}": rate
            for name, inner in state.inner_states.items()
            for metric, rate in learning_rates(inner.inner_state).items()
        }
    if isinstance(state, _Recorded):
        return {"learning_rate": state.learning_rate}
    if isinstance(state, tuple) and not hasattr(state, "_fields"):
        return {k: v for link in state for k, v in learning_rates(link).items()}
    return {}


class _Recorded(NamedTuple):
    count: jax.Array
    learning_rate: jax.Array


class Described(optax.GradientTransformationExtraArgs):
    """A transformation with the settings it was made with, by their users' names."""

    description: Mapping[str, Any]


def _described(
    transformation: optax.GradientTransformation, settings: Mapping[str, Any]
) -> optax.GradientTransformation:
    described = Described(*optax.with_extra_args_support(transformation))
    described.description = settings
    return described


def _record(learning_rate: LearningRate) -> optax.GradientTransformation:
    """Leaves updates alone and keeps the last learning rate; refuses not float32."""
    rate = learning_rate if callable(learning_rate) else lambda _: learning_rate

    def init(params: Any) -> _Recorded:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if leaf.dtype != jnp.float32:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise TypeError(
                    f"parameter {name!r}: expected float32, got {leaf.dtype}. Keep "
                    "parameters in float32 and set the model's dtype='bfloat16' for "
                    "bfloat16 activations."
                )
        zero = jnp.zeros([], jnp.int32)
        return _Recorded(zero, jnp.asarray(rate(zero), jnp.float32))

    def update(updates: Any, state: _Recorded, params: Any = None):
        now = jnp.asarray(rate(state.count), jnp.float32)
        return updates, _Recorded(optax.safe_increment(state.count), now)

    return optax.GradientTransformation(init, update)


def _assemble(
    links: list[optax.GradientTransformation],
    learning_rate: LearningRate,
    grad_clip: float | None,
) -> optax.GradientTransformation:
    if grad_clip is not None:
        if not grad_clip > 0:
            raise ValueError(f"grad_clip: expected None or a norm > 0, got {grad_clip}")
        links = [optax.clip_by_global_norm(grad_clip), *links]
    return optax.chain(*links, _record(learning_rate))


def _unknown(what: str, name: str, valid: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.4)
    hint = f" Nearest: {', '.join(near)}." if near else ""
    return f"unknown {what} {name!r}.{hint} Valid: {', '.join(sorted(valid))}."
