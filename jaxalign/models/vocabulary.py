"""The vocabulary head: what a loss needs of the logits, without keeping them.

For 32,000 tokens the logits are the largest array of a step. A loss needs three numbers
per position: the target's logit, the log-normaliser and, for accuracy, the largest
logit. Their gradient is written here, so that the logits exist once, or only a chunk of
them at a time.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.models.layers import constrain
from jaxalign.models.products import float32_einsum


class HeadOutputs(NamedTuple):
    """Float32 ``[..., L]`` each.

    Attributes:
      target_logits: the logit of each target.
      log_z: log-normalisers; ``target_logits - log_z`` are log-probabilities.
      max_logits: largest logits, for accuracy; they carry no gradient.
    """

    target_logits: jax.Array
    log_z: jax.Array
    max_logits: jax.Array

    @property
    def logps(self) -> jax.Array:
        """``[..., L]`` log-probabilities of the targets."""
        return self.target_logits - self.log_z


def project(states: jax.Array, kernel: jax.Array) -> jax.Array:
    """``states [..., E] @ kernel [E, V]`` accumulated and returned in float32."""
    kernel = kernel.astype(states.dtype)
    return _constrain(float32_einsum("...e,ev->...v", states, kernel))


def _constrain(logits: jax.Array) -> jax.Array:
    return constrain(logits, "batch", *[None] * (logits.ndim - 2), "vocab")


def head_outputs(
    states: jax.Array, kernel: jax.Array, targets: jax.Array, *, chunk: int = 0
) -> HeadOutputs:
    """Target logits, log-normalisers and largest logits of ``states @ kernel``.

    Args:
      states: ``[..., L, E]`` final decoder states.
      kernel: float32 ``[E, V]``.
      targets: int32 ``[..., L]``.
      chunk: positions of the ``L`` axis whose logits exist at once, forward and
        backward; 0 for all. The numbers are the same, the head product is computed
        once more in the backward pass.

    >>> out = head_outputs(jnp.zeros((1, 2)), jnp.zeros((2, 4)), jnp.array([3]))
    >>> jnp.exp(out.logps)
    Array([0.25], dtype=float32)
    """
    chex.assert_shape(targets, states.shape[:-1])
    if chunk >= states.shape[-2]:
        chunk = 0
    return HeadOutputs(*_head(states, kernel, targets, chunk))


def mean_logits(states: jax.Array, kernel: jax.Array) -> jax.Array:
    """``[..., L]`` means over the vocabulary, which label smoothing needs.

    A product with one column, the kernel's mean: no logits.
    """
    column = jnp.mean(kernel.astype(states.dtype).astype(jnp.float32), axis=-1)
    return jnp.einsum("...e,e->...", states.astype(jnp.float32), column)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _head(states, kernel, targets, chunk):
    return _forward(states, kernel, targets, chunk)[0]


@jax.named_scope("vocabulary")
def _forward(states, kernel, targets, chunk):
    if chunk:
        # Chunks of the length axis, not of the flattened tokens: the batch axis keeps
        # its sharding over devices.
        axis = targets.ndim - 1
        _, out = jax.lax.scan(
            lambda carry, x: (carry, _outputs(project(x[0], kernel), x[1])),
            None,
            (_split(states, axis, chunk), _split(targets, axis, chunk)),
        )
        out = tuple(_merge(x, axis, targets.shape[axis]) for x in out)
        return out, (states, kernel, targets, None, out[1])
    logits = project(states, kernel)
    out = _outputs(logits, targets)
    return out, (states, kernel, targets, logits, out[1])


@jax.named_scope("vocabulary")
def _backward(chunk: int, residuals: Any, cotangents: Any) -> Any:
    states, kernel, targets, logits, log_z = residuals
    of_target, of_log_z, _ = cotangents

    def gradients(states, logits, targets, log_z, of_target, of_log_z):
        hit = targets[..., None] == jnp.arange(logits.shape[-1])
        dlogits = of_log_z[..., None] * jnp.exp(logits - log_z[..., None])
        dlogits = _constrain(dlogits + jnp.where(hit, of_target[..., None], 0.0))
        dlogits = dlogits.astype(states.dtype)
        dstates = float32_einsum("...v,ev->...e", dlogits, kernel.astype(states.dtype))
        dkernel = float32_einsum("...e,...v->ev", states, dlogits)
        return dstates.astype(states.dtype), dkernel

    per_token = (targets, log_z, of_target, of_log_z)
    if not chunk:
        return *gradients(states, logits, *per_token), None

    def accumulate(dkernel, pieces):
        states, *rest = pieces
        dstates, more = gradients(states, project(states, kernel), *rest)
        return dkernel + more, dstates

    axis = targets.ndim - 1
    dkernel, dstates = jax.lax.scan(
        accumulate,
        jnp.zeros(kernel.shape, jnp.float32),
        tuple(_split(x, axis, chunk) for x in (states, *per_token)),
    )
    return _merge(dstates, axis, targets.shape[axis]), dkernel, None


_head.defvjp(_forward, _backward)


def _outputs(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
    largest = jnp.max(logits, axis=-1)
    log_z = largest + jnp.log(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen, log_z, largest


def _split(x: jax.Array, axis: int, chunk: int) -> jax.Array:
    """``[..., L, ...]`` to ``[ceil(L / chunk), ..., chunk, ...]``, padded with 0."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % chunk)
    x = jnp.pad(x, widths)
    shape = (*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def _merge(x: jax.Array, axis: int, length: int) -> jax.Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)
