"""The small modules T5 is made of: projections, norm, embedding, feed-forward.

Every parameter is float32 and carries T5X's logical axis names, which the mesh rules
map to devices. Shapes in comments: ``E`` emb_dim, ``H`` heads, ``D`` head_dim,
``F`` mlp_dim, ``V`` vocabulary.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.models.config import T5Config

_ACTIVATIONS = {
    # T5 uses the tanh approximation, "gelu_new" elsewhere.
    "gelu": lambda x: nn.gelu(x, approximate=True),
    "linear": lambda x: x,
    "relu": nn.relu,
    "silu": nn.silu,
}

# T5X: truncated normal for feed-forward and head, normal for attention.
MLP_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
ATTENTION_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's sharding by logical axis names; no-op without a mesh."""
    return nn.with_logical_constraint(x, axes)


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``x [..., E] @ kernel [E, F]``, whose gradients need no transposed copies.

    JAX's own rule for the kernel's gradient contracts ``dy`` with ``x`` and transposes
    the result; CPUs then write the elementwise work before ``dy`` a second time, column
    by column.
    """
    return jnp.dot(x, kernel)


def _matmul_forward(x, kernel):
    return jnp.dot(x, kernel), (x, kernel)


def _matmul_backward(residuals, dy):
    x, kernel = residuals
    dx = jnp.einsum("...f,ef->...e", dy, kernel)
    return dx, jnp.einsum("...e,...f->ef", x, dy)


matmul.defvjp(_matmul_forward, _matmul_backward)


class Dense(nn.Module):
    """``x @ kernel`` without bias, computed in ``dtype``."""

    features: int
    axes: tuple[str, str]
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer = MLP_INIT

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(self.kernel_init, self.axes),
            (x.shape[-1], self.features),
            jnp.float32,
        )
        return matmul(x.astype(self.dtype), kernel.astype(self.dtype))


class RMSNorm(nn.Module):
    """T5's layer norm: no mean, no bias, epsilon 1e-6, statistics in float32."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
            (x.shape[-1],),
            jnp.float32,
        )
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        return x.astype(self.dtype) * scale.astype(self.dtype)


class Embed(nn.Module):
    """The token embedding ``[V, E]``; gathers rows rather than one-hot products."""

    config: T5Config

    def setup(self):
        self.embedding = self.param(
            "embedding",
            nn.with_logical_partitioning(
                nn.initializers.normal(1.0), ("vocab", "embed")
            ),
            (self.config.vocab_size, self.config.emb_dim),
            jnp.float32,
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        # Cast after the gather: only the rows in use are converted. An id outside the
        # vocabulary reads NaN, which stops a run; clamping would train on nonsense.
        # The width is gathered first (as fully sharded parameters are before use), so
        # that the lookup itself is split by the batch.
        table = constrain(self.embedding, "vocab", None)
        embedded = jnp.take(table, tokens, axis=0, mode="fill")
        return embedded.astype(self.config.activation_dtype)


class Dropout(nn.Module):
    """Dropout with one mask for all positions of a row (axis -2), as in T5X."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        if self.rate == 0.0 or deterministic:
            return x
        shape = (*x.shape[:-2], 1, x.shape[-1])
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, shape)
        return jnp.where(keep, x / (1.0 - self.rate), 0).astype(x.dtype)


class MlpBlock(nn.Module):
    """The feed-forward block ``wo(act(wi(x)))``; gated with two activations.

    Parameters: ``wi`` or ``wi_0``, ``wi_1`` ``[E, F]``, and ``wo`` ``[F, E]``.
    """

    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        cfg = self.config
        dtype = cfg.activation_dtype
        hidden = None
        for i, name in enumerate(cfg.mlp_activations):
            wi = "wi" if len(cfg.mlp_activations) == 1 else f"wi_{i}"
            h = Dense(cfg.mlp_dim, ("embed", "mlp"), dtype, name=wi)(x)
            h = _ACTIVATIONS[name](h)
            hidden = h if hidden is None else hidden * h
        hidden = Dropout(cfg.dropout_rate)(hidden, deterministic)
        leading = (None,) * (x.ndim - 2)
        hidden = constrain(hidden, "batch", *leading, "mlp")
        return Dense(x.shape[-1], ("mlp", "embed"), dtype, name="wo")(hidden)
