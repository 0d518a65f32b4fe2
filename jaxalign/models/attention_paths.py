"""Ways to compute attention: all scores at once, some queries at a time, a TPU kernel.

All give the same numbers, gradients of the position bias included; they differ in how
many scores exist at once. ``T5Config.attention`` names one of ``PATHS``. Decoding has
single tokens for queries and needs none of them.
"""

from __future__ import annotations

from collections.abc import Callable

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.models import windows
from jaxalign.models.products import einsum, float32_einsum

# Large enough that exp() of a masked score is 0; finite, so that a padding query with
# nothing to attend to gets a uniform average instead of NaN.
MASKED = -1e10

# Queries of one pass of `chunked`, and the TPU kernel's smallest block.
CHUNK = 128
# The TPU kernel's blocks: the largest of these that divides a length.
_BLOCKS = (512, 256, CHUNK)


@flax.struct.dataclass
class Segments:
    """Which keys a query sees: its segment's, and if causal none after itself.

    Segments are int32 ``[B, Lq]`` and ``[B, Lk]``; 0 is padding, which sees padding.
    Where `causal`, queries and keys are one row, read from left to right.
    """

    queries: jax.Array
    keys: jax.Array
    causal: bool = flax.struct.field(pytree_node=False, default=False)

    def mask(self) -> jax.Array:
        """Bool ``[B, 1, Lq, Lk]``, true where a query may look.

        >>> ids = jnp.array([[1, 1, 2]])
        >>> Segments(ids, ids, causal=True).mask()[0, 0].astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
        """
        return self.between(0, 0)

    def between(self, query: jax.Array | int, key: jax.Array | int) -> jax.Array:
        """`mask` where queries and keys are those of a row from these positions on."""
        seen = self.queries[:, :, None] == self.keys[:, None, :]
        if self.causal:
            own = query + jnp.arange(self.queries.shape[1])
            seen &= own[:, None] >= key + jnp.arange(self.keys.shape[1])
        return seen[:, None]


def weights(scores: jax.Array, mask: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Softmax over the last axis of float32 scores where ``mask``."""
    if bias is not None:
        scores = scores + bias
    return jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1)


def _attend(query, keys, values, mask, bias):
    scores = float32_einsum("bqhd,bkhd->bhqk", query, keys)
    share = weights(scores, mask, bias).astype(values.dtype)
    return einsum("bhqk,bkhd->bqhd", share, values)


# Of query [B, Lq, H, D], keys and values [B, Lk, H, D], segments, and a bias, float32
# [1, H, Lq, Lk] or None: [B, Lq, H, D].
Path = Callable[..., jax.Array]


def whole(query, keys, values, segments: Segments, bias) -> jax.Array:
    """Attention with all scores ``[B, H, Lq, Lk]`` at once."""
    return _attend(query, keys, values, segments.mask(), bias)


def chunked(query, keys, values, segments: Segments, bias) -> jax.Array:
    """`whole`, `CHUNK` queries at a time; the backward pass makes their scores again.

    Scores of ``[B, H, CHUNK, Lk]`` exist at once (Rabe & Staats 2021, with whole rows
    of keys); on CPUs only those of the keys that some query of the chunk sees, see
    `jaxalign.models.windows`. Queries beyond the last full chunk come after the loop.
    """
    length = query.shape[1]
    full = length - length % CHUNK

    def some(start, query, ids, bias):
        return windows.attend(
            _attend, start, query, keys, values, segments.replace(queries=ids), bias
        )

    def chunk(i):
        start = i * CHUNK

        def cut(x, axis):
            return jax.lax.dynamic_slice_in_dim(x, start, CHUNK, axis)

        part = None if bias is None else cut(bias, 2)
        return some(start, cut(query, 1), cut(segments.queries, 1), part)

    parts = []
    if full:
        done = jax.lax.map(chunk, jnp.arange(full // CHUNK))
        shape = (query.shape[0], full, *query.shape[2:])
        parts.append(jnp.moveaxis(done, 0, 1).reshape(shape))
    if full < length:
        part = None if bias is None else bias[:, :, full:]
        ids = segments.queries[:, full:]
        parts.append(some(full, query[:, full:], ids, part))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)


def pallas(query, keys, values, segments: Segments, bias) -> jax.Array:
    """`whole` by JAX's flash attention kernel for TPUs: no scores in memory at all.

    Rows of the batch come one after the other, so that all share one bias and the
    gradients of it are summed as they come. Rows are padded to multiples of `CHUNK`.
    """
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    asked = query.shape[1]
    more = -asked % CHUNK, -keys.shape[1] % CHUNK
    if any(more):
        query, of_query = (_padded(x, 1, more[0]) for x in (query, segments.queries))
        keys, values = (_padded(x, 1, more[1]) for x in (keys, values))
        # No query has this segment.
        of_key = _padded(segments.keys, 1, more[1], value=-1)
        segments = Segments(of_query, of_key, segments.causal)
        if bias is not None:
            bias = _padded(_padded(bias, 2, more[0]), 3, more[1])
    lengths = query.shape[1], keys.shape[1]
    q, k = (next(b for b in _BLOCKS if length % b == 0) for length in lengths)
    blocks = flash.BlockSizes(
        block_q=q, block_k_major=k, block_k=k, block_b=1,
        block_q_major_dkv=q, block_k_major_dkv=k, block_k_dkv=k, block_q_dkv=q,
        block_k_major_dq=k, block_k_dq=k, block_q_dq=q,
    )  # fmt: skip

    def local(query, keys, values, of_query, of_key, bias):
        def row(arrays):
            *qkv, of_query, of_key = (x[None] for x in arrays)
            ids = flash.SegmentIds(of_query, of_key)
            return flash.flash_attention(
                *qkv, bias, ids, causal=segments.causal, block_sizes=blocks
            )[0]

        heads_first = (jnp.swapaxes(x, 1, 2) for x in (query, keys, values))
        out = jax.lax.map(row, (*heads_first, of_query, of_key))
        return jnp.swapaxes(out, 1, 2)

    arguments = query, keys, values, segments.queries, segments.keys, bias
    if not jax.sharding.get_abstract_mesh().shape_tuple:
        return local(*arguments)[:, :asked]
    # XLA does not split a kernel: each device calls it for its own rows and heads.
    rows = nn.logical_to_mesh_axes(("batch", None, "heads", None))
    ids = nn.logical_to_mesh_axes(("batch", None))
    per_head = None if bias is None else nn.logical_to_mesh_axes((None, "heads"))
    return jax.shard_map(
        local,
        in_specs=(rows, rows, rows, ids, ids, per_head),
        out_specs=rows,
        check_vma=False,
    )(*arguments)[:, :asked]


def _padded(x: jax.Array, axis: int, more: int, value: int = 0) -> jax.Array:
    widths = [(0, more if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


PATHS: dict[str, Path] = {"whole": whole, "chunked": chunked, "pallas": pallas}
