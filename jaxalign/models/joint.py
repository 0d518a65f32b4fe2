"""A prompt and its responses as one text for the encoder, made of a packed batch.

A batch keeps prompts and responses apart. What reads them together gets them here as
rows ``prompt EOS response EOS`` or ``prompt EOS a EOS b EOS``, one for each response or
pair, each from its first token on: however the batch is packed, a row is the same.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.batch import Batch

# Tokens of each row of some array, where a span starts in each, and its length.
_Span = tuple[jax.Array, jax.Array, jax.Array]


def with_response(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Each response after its prompt.

    Returns:
      Tokens and segments, int32 ``[B, R, Le + Ld]``: segment 1, then padding; of a
      response that there is not, padding alone.
    """
    parts = [_prompts(batch, batch["response_prompt"]), _responses(batch)]
    return _join(parts, batch["response_mask"], _length(batch, 1))


def with_pair(batch: Batch, swapped: bool) -> tuple[jax.Array, jax.Array]:
    """Both responses of each pair after their prompt.

    Args:
      batch: a response batch.
      swapped: the rejected one first.

    Returns:
      Tokens and segments, int32 ``[B, Q, Le + 2 Ld]``.
    """
    tokens, start, length = _responses(batch)
    names = ("pair_rejected", "pair_chosen") if swapped else ()
    names = names or ("pair_chosen", "pair_rejected")
    pick = jnp.take_along_axis
    both = [
        (tokens, pick(start, batch[name], axis=1), pick(length, batch[name], axis=1))
        for name in names
    ]
    prompt = pick(batch["response_prompt"], batch["pair_chosen"], axis=1)
    parts = [_prompts(batch, prompt), *both]
    return _join(parts, batch["pair_mask"], _length(batch, 2))


def _length(batch: Batch, responses: int) -> int:
    longest = batch["decoder_target_tokens"].shape[-1]
    return batch["encoder_input_tokens"].shape[-1] + responses * longest


def _prompts(batch: Batch, wanted: jax.Array) -> _Span:
    """The spans of the prompts with these numbers."""
    start, length = _spans(batch["encoder_segment_ids"], batch["prompt_mask"].shape[1])
    pick = jnp.take_along_axis
    where = jnp.maximum(wanted, 0)
    return (
        batch["encoder_input_tokens"],
        pick(start, where, axis=1),
        pick(length, where, axis=1),
    )


def _responses(batch: Batch) -> _Span:
    flat = batch["decoder_segment_ids"].shape[0], -1
    segments = batch["decoder_segment_ids"].reshape(flat)
    tokens = batch["decoder_target_tokens"].reshape(flat)
    return tokens, *_spans(segments, batch["response_mask"].shape[1])


def _spans(segments: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Start and length ``[B, count]`` of the segments ``1 .. count`` of ``[B, N]``."""
    member = segments[:, :, None] == jnp.arange(1, count + 1)
    return jnp.argmax(member, axis=1), jnp.sum(member, axis=1)


def _join(
    parts: list[_Span], real: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
    """Spans one after the other, ``[B, n, size]``."""
    position = jnp.arange(size)
    tokens = jnp.zeros((*real.shape, size), jnp.int32)
    begun = jnp.zeros_like(parts[0][1])[..., None]
    for source, start, length in parts:
        inside = position - begun
        here = (inside >= 0) & (inside < length[..., None])
        index = jnp.where(here, start[..., None] + inside, 0)
        rows = index.reshape(index.shape[0], -1)
        found = jnp.take_along_axis(source, rows, axis=1).reshape(index.shape)
        tokens = jnp.where(here, found, tokens)
        begun = begun + length[..., None]
    segments = (position < begun) & (real > 0)[..., None]
    return jnp.where(segments, tokens, 0), segments.astype(jnp.int32)
