"""Multi-head attention with T5X's parameters: no biases, no scaling by sqrt(D).

The scaling is folded into the initialiser of the query kernel. Scores and softmax
are float32 whatever the activations are.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.models.attention_paths import PATHS, Segments, weights
from jaxalign.models.config import T5Config
from jaxalign.models.layers import ATTENTION_INIT, Dense, constrain
from jaxalign.models.products import einsum, float32_einsum

KeyValues = tuple[jax.Array, jax.Array]


class Attention(nn.Module):
    """Projections and attention; parameters ``{query,key,value,out}/kernel``.

    Kernels are 2-D with heads and head_dim joined: ``[E, H * D]`` and ``[H * D, E]``.
    """

    config: T5Config

    def setup(self):
        cfg = self.config
        joined = cfg.num_heads * cfg.head_dim
        dtype = cfg.activation_dtype
        axes = ("embed", "joined_kv")

        def query_init(key, shape, dtype=jnp.float32):
            return ATTENTION_INIT(key, shape, dtype) / math.sqrt(cfg.head_dim)

        self.query = Dense(joined, axes, dtype, query_init)
        self.key = Dense(joined, axes, dtype, ATTENTION_INIT)
        self.value = Dense(joined, axes, dtype, ATTENTION_INIT)
        self.out = Dense(cfg.emb_dim, ("joined_kv", "embed"), dtype, ATTENTION_INIT)

    def _split(self, x: jax.Array) -> jax.Array:
        """``[B, L, H * D]`` -> ``[B, L, H, D]``."""
        cfg = self.config
        x = x.reshape(*x.shape[:-1], cfg.num_heads, cfg.head_dim)
        return constrain(x, "batch", "length", "heads", "kv")

    def _join(self, x: jax.Array) -> jax.Array:
        return self.out(x.reshape(*x.shape[:-2], -1))

    def key_values(self, x: jax.Array) -> KeyValues:
        """Keys and values ``[B, L, H, D]`` of the states ``[B, L, E]``."""
        return self._split(self.key(x)), self._split(self.value(x))

    def attend(
        self,
        x: jax.Array,
        key_values: KeyValues,
        segments: Segments,
        bias: jax.Array | None,
        deterministic: bool,
    ) -> jax.Array:
        """Attends from ``x [B, Lq, E]`` to keys and values ``[B, Lk, H, D]``.

        ``segments`` say which keys a query sees; ``bias`` is float32
        ``[1, H, Lq, Lk]`` or None.
        """
        cfg = self.config
        keys, values = key_values
        if cfg.dropout_rate > 0.0 and not deterministic:
            # As in T5X, a dropped key is dropped for all queries of the row: a weight
            # of 0 on a value is the value times 0.
            keep = 1.0 - cfg.dropout_rate
            kept = jax.random.bernoulli(
                self.make_rng("dropout"), keep, (*values.shape[:-1], 1)
            )
            values = jnp.where(kept, values / keep, 0).astype(values.dtype)
        query = self._split(self.query(x))
        # Parameters are made on rows of one token, on whatever device.
        path = PATHS["whole" if self.is_initializing() else cfg.attention]
        return self._join(path(query, keys, values, segments, bias))

    def attend_step(
        self,
        x: jax.Array,
        key_values: KeyValues,
        mask: jax.Array,
        bias: jax.Array | None,
    ) -> jax.Array:
        """One query for each of ``N`` continuations: ``x [B, N, E]`` -> ``[B, N, E]``.

        Keys and values are ``[B, H, Lk, D]``, shared by the N queries of a prompt and
        never copied, or ``[B, N, H, T, D]``, each continuation's own. Heads come before
        positions, so that a step reads them as they lie: with heads behind, CPUs copy
        the whole cache into that order at every token. ``mask`` is bool
        ``[B, 1 or N, Lk]``, ``bias`` float32 ``[B or 1, N or 1, H, Lk]`` or None.
        """
        keys, values = key_values
        own = keys.ndim == 5
        query = self.query(x)
        query = query.reshape(*x.shape[:-1], self.config.num_heads, -1)
        mask = mask[:, :, None]
        if own and keys.dtype == jnp.bfloat16:
            context = jax.lax.platform_dependent(
                *(query, keys, values, mask, bias),
                cpu=_attend_by_element,
                default=_attend_own,
            )
        elif own:
            context = _attend_own(query, keys, values, mask, bias)
        else:
            scores = float32_einsum("bnhd,bhkd->bnhk", query, keys)
            share = weights(scores, mask, bias).astype(values.dtype)
            context = einsum("bnhk,bhkd->bnhd", share, values)
        return self._join(context)


def _attend_own(query, keys, values, mask, bias):
    """Each query of ``[B, N, H, D]`` on keys and values of its own."""
    scores = float32_einsum("bnhd,bnhkd->bnhk", query, keys)
    share = weights(scores, mask, bias).astype(values.dtype)
    return einsum("bnhk,bnhkd->bnhd", share, values)


def _attend_by_element(query, keys, values, mask, bias):
    """`_attend_own` in sums of float32 elements.

    No unit takes products of one vector with a matrix: for them XLA's CPU compiler
    writes the whole cache in float32 at every token. These sums read it as it is.
    """
    query, keys, wide = (x.astype(jnp.float32) for x in (query, keys, values))
    share = weights(jnp.sum(query[..., None, :] * keys, axis=-1), mask, bias)
    return jnp.sum(share[..., None] * wide, axis=-2).astype(values.dtype)


def write_cache(cache: jax.Array, new: jax.Array, position: jax.Array) -> jax.Array:
    """Writes ``new [B, N, H, D]`` into ``cache [B, N, H, T, D]`` at ``position``.

    The position is a scalar, or ``[B, N]`` where continuations differ in length.
    """
    new = new.astype(cache.dtype)
    if position.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(
            cache, new[..., None, :], position, 3
        )
    update = jax.vmap(
        jax.vmap(jax.lax.dynamic_update_index_in_dim, (0, 0, 0, None)), (0, 0, 0, None)
    )
    return update(cache, new, position, 1)
