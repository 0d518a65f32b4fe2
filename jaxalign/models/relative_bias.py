"""T5's relative position bias (Raffel et al. 2020, section 2.1).

The bias depends on the distance between key and query only. Packed segments are
contiguous, so distances inside a segment are the same wherever it stands in its row.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.config import T5Config


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
    """The learned table ``rel_embedding [H, buckets]``, shared by a stack's layers.

    Attributes:
      config: the network's.
      bidirectional: keys after the query have buckets of their own (encoder); a
        causal decoder never looks at them.
    """

    config: T5Config
    bidirectional: bool

    def setup(self):
        cfg = self.config
        self.rel_embedding = self.param(
            "rel_embedding",
            nn.with_logical_partitioning(
                nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
                ("heads", "relpos_buckets"),
            ),
            (cfg.num_heads, cfg.relative_attention_num_buckets),
            jnp.float32,
        )

    def _by_distance(self, key_minus_query: jax.Array | np.ndarray) -> jax.Array:
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
        bias = self._by_distance(key_minus_query)
        heads = bias.shape[0]
        bias = jnp.broadcast_to(bias[:, None], (heads, length, 2 * length))
        bias = bias.reshape(heads, -1)[:, : length * (2 * length - 1)]
        # Row i now starts i entries earlier: column j holds distance j - i.
        bias = bias.reshape(heads, length, 2 * length - 1)[:, :, :length]
        return bias[None]

    def at(self, position: jax.Array, length: int) -> jax.Array:
        """The bias of queries at ``position`` on keys ``0 .. length - 1``.

        Args:
          position: int32, any shape ``[...]``.
          length: of the key axis ``T``.

        Returns:
          ``[..., H, T]`` float32.
        """
        distance = jnp.arange(length) - position[..., None]
        return jnp.moveaxis(self._by_distance(distance), 0, -2)

    def before(self, distance: jax.Array) -> jax.Array:
        """The bias on keys that stand ``distance [T]`` before the query: ``[H, T]``."""
        return self._by_distance(-distance)
