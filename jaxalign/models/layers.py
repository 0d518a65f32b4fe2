"""What T5 is made of: projections, norm, embedding, feed-forward, position bias.

Every parameter is float32 and carries T5X's logical axis names, which the mesh rules
map to devices. Shapes in comments: ``E`` emb_dim, ``H`` heads, ``D`` head_dim,
``F`` mlp_dim, ``V`` vocabulary.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.adapted import SOFT_PROMPT, adapted
from jaxalign.models.config import T5Config
from jaxalign.models.products import matmul

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


def parameter(module: nn.Module, name: str, init, axes, shape) -> jax.Array:
    """A module's float32 parameter with logical axis names."""
    init = nn.with_logical_partitioning(init, axes)
    return module.param(name, init, shape, jnp.float32)


class Dense(nn.Module):
    """``x @ kernel`` without bias, computed in ``dtype``; takes an adapter."""

    features: int
    axes: tuple[str, str]
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer = MLP_INIT

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = parameter(self, "kernel", self.kernel_init, self.axes, shape)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        return adapted(self, x, matmul, kernel)


class RMSNorm(nn.Module):
    """T5's layer norm: no mean, no bias, epsilon 1e-6, statistics in float32."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init, shape = nn.initializers.ones, (x.shape[-1],)
        scale = parameter(self, "scale", init, ("embed",), shape)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        return x.astype(self.dtype) * scale.astype(self.dtype)


class Embed(nn.Module):
    """The token embedding ``[V, E]``; gathers rows rather than one-hot products."""

    config: T5Config

    def setup(self):
        init, axes = nn.initializers.normal(1.0), ("vocab", "embed")
        shape = (self.config.vocab_size, self.config.emb_dim)
        self.embedding = parameter(self, "embedding", init, axes, shape)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        # Cast after the gather: only the rows in use are converted. An id outside the
        # vocabulary reads NaN, which stops a run; clamping would train on nonsense.
        # The width is gathered first (as fully sharded parameters are before use), so
        # that the lookup itself is split by the batch.
        table = constrain(self.embedding, "vocab", None)
        embedded = jnp.take(table, tokens, axis=0, mode="fill")
        return embedded.astype(self.config.activation_dtype)

    def prompt(self) -> jax.Array | None:
        """The rows ``[n, E]`` of a soft prompt, if an adapter put one here."""
        if not self.has_variable("params", SOFT_PROMPT):
            return None
        rows = constrain(self.get_variable("params", SOFT_PROMPT), None, None)
        return rows.astype(self.config.activation_dtype)


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


def bucket_table(num_buckets: int, max_distance: int) -> np.ndarray:
    """Buckets of the distances ``0 .. max_distance``; farther ones share the last.

    Half of the buckets hold one distance each, the other half grow logarithmically.
    Computed on the host, so that no accelerator's ``log`` moves a boundary.

    >>> bucket_table(8, 16)
    array([0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7], dtype=int32)
    """
    exact = num_buckets // 2
    distance = np.arange(max_distance + 1)
    ratio = np.maximum(distance, exact) / exact
    # The nudge keeps exact powers, such as 16 = 8 * 2, from rounding down a bucket.
    grown = np.log(ratio + np.finfo(np.float32).eps) / np.log(max_distance / exact)
    large = exact + (grown * (num_buckets - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(large, num_buckets - 1))
    return bucket.astype(np.int32)


class RelativePositionBias(nn.Module):
    """T5's relative position bias (Raffel et al. 2020, section 2.1).

    The learned table ``rel_embedding [H, buckets]`` is shared by a stack's layers. Only
    the distance between key and query counts, so packed segments, which are contiguous,
    may stand anywhere in their row. Where ``bidirectional`` (encoder), keys after the
    query have buckets of their own; a causal decoder never looks at them.
    """

    config: T5Config
    bidirectional: bool

    def setup(self):
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        shape = (self.config.num_heads, self.config.relative_attention_num_buckets)
        axes = ("heads", "relpos_buckets")
        self.rel_embedding = parameter(self, "rel_embedding", init, axes, shape)

    def by_distance(self, key_minus_query: jax.Array | np.ndarray) -> jax.Array:
        """``[...]`` distances -> ``[H, ...]`` float32 biases."""
        cfg = self.config
        buckets = cfg.relative_attention_num_buckets
        if self.bidirectional:
            buckets //= 2
        table = jnp.asarray(bucket_table(buckets, cfg.relative_attention_max_distance))
        before = -jnp.asarray(key_minus_query, jnp.int32)
        distance = jnp.abs(before) if self.bidirectional else jnp.maximum(before, 0)
        bucket = table[jnp.minimum(distance, table.shape[0] - 1)]
        if self.bidirectional:
            bucket += jnp.where(before < 0, buckets, 0)
        return jnp.take(self.rel_embedding, bucket, axis=1)

    def __call__(self, length: int) -> jax.Array:
        """The bias of every query on every key of a row: ``[1, H, L, L]`` float32."""
        # Only 2L - 1 distances exist. Looking up those and laying them out as a
        # Toeplitz matrix by reshapes makes the gradient a plain sum; looking up L * L
        # entries would make it a scatter of L * L into 32.
        key_minus_query = np.concatenate([np.arange(length), np.arange(-length, 0)])
        bias = self.by_distance(key_minus_query)
        heads = bias.shape[0]
        bias = jnp.broadcast_to(bias[:, None], (heads, length, 2 * length))
        bias = bias.reshape(heads, -1)[:, : length * (2 * length - 1)]
        # Row i now starts i entries earlier: column j holds distance j - i.
        bias = bias.reshape(heads, length, 2 * length - 1)[:, :, :length]
        return bias[None]

    def at(self, position: jax.Array, length: int) -> jax.Array:
        """Queries at ``position [...]`` on keys ``0 .. T - 1``: ``[..., H, T]``."""
        distance = jnp.arange(length) - position[..., None]
        return jnp.moveaxis(self.by_distance(distance), 0, -2)
