"""The response batch: one dict of static-shaped arrays for every method.

A name's prefix says which axis the array lives on:

==============  ===============  =====================================================
prefix          shape            arrays
==============  ===============  =====================================================
``encoder_*``   ``[B, Le]``      ``input_tokens``, ``segment_ids``
``decoder_*``   ``[B, K, Ld]``   ``input_tokens``, ``target_tokens``, ``loss_weights``,
                                 ``segment_ids``
``prompt_*``    ``[B, P]``       ``mask``, ``id``
``response_*``  ``[B, R]``       ``mask``, ``prompt``, ``kl_prompt``, ``kind``,
                                 ``reward``, ``label``, ``ref_logps``, ``ref_kl_logps``
``pair_*``      ``[B, Q]``       ``mask``, ``chosen``, ``rejected``, ``margin``
==============  ===============  =====================================================

An encoder row holds prompts as segments ``1..P``; beside it stand ``K`` decoder rows
holding responses as segments ``1..R``, numbered over all ``K`` rows. Segment 0 is
padding. ``response_prompt[b, r]`` is the index ``p`` of the prompt that response ``r``
answers: decoder tokens of segment ``r + 1`` attend to the encoder tokens of segment
``p + 1`` and to nothing else. Pairs index into ``R``.

T5's position bias depends on distances inside one segment only, so packing needs no
position arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

Batch = Mapping[str, Any]

# Values of ``response_kind``.
ANSWER = 0  # a response to the task's own prompt
RATIONALE = 1  # a text that explains a preference; never a member of a pair

# Values of ``response_label``; -1 stands for "no label".
UNDESIRABLE, DESIRABLE, NO_LABEL = 0, 1, -1

# name -> (axes, dtype). Every array of a batch is listed here and nowhere else.
FIELDS: dict[str, tuple[str, type]] = {
    "encoder_input_tokens": ("BE", np.int32),
    "encoder_segment_ids": ("BE", np.int32),
    "decoder_input_tokens": ("BKD", np.int32),
    "decoder_target_tokens": ("BKD", np.int32),
    "decoder_loss_weights": ("BKD", np.float32),
    "decoder_segment_ids": ("BKD", np.int32),
    "prompt_mask": ("BP", np.float32),
    "prompt_id": ("BP", np.int32),
    "response_mask": ("BR", np.float32),
    "response_prompt": ("BR", np.int32),
    "response_kl_prompt": ("BR", np.int32),  # the mismatched prompt; -1: none
    "response_kind": ("BR", np.int32),
    "response_reward": ("BR", np.float32),
    "response_label": ("BR", np.int32),
    "response_ref_logps": ("BR", np.float32),
    "response_ref_kl_logps": ("BR", np.float32),
    "pair_mask": ("BQ", np.float32),
    "pair_chosen": ("BQ", np.int32),
    "pair_rejected": ("BQ", np.int32),
    "pair_margin": ("BQ", np.float32),
}

# Columns that a reference pass adds; the feed never makes them itself.
REFERENCE_FIELDS = ("response_ref_logps", "response_ref_kl_logps")


def sizes(batch: Batch) -> dict[str, int]:
    """The axis sizes ``{"B", "E", "K", "D", "P", "R", "Q"}`` of a batch."""
    found: dict[str, int] = {}
    for name, value in batch.items():
        if name in FIELDS:
            found.update(zip(FIELDS[name][0], value.shape, strict=True))
    return found


def check(batch: Batch, required: tuple[str, ...] = ()) -> None:
    """Checks names, axes and dtypes of a batch.

    Args:
      batch: arrays or ``jax.ShapeDtypeStruct``s by name.
      required: names that must be present.

    Raises:
      ValueError: naming the array, what was expected and what came.
    """
    missing = [name for name in required if name not in batch]
    if missing:
        raise ValueError(
            f"The batch lacks {missing}; it has {sorted(batch)}. Columns such as "
            "response_ref_logps come from the reference pass."
        )
    axes: dict[str, tuple[int, str]] = {}
    for name, value in batch.items():
        if name not in FIELDS:
            raise ValueError(f"Unknown batch array {name!r}; known: {sorted(FIELDS)}.")
        letters, dtype = FIELDS[name]
        if value.ndim != len(letters):
            raise ValueError(
                f"{name} must have axes {'x'.join(letters)}, got shape {value.shape}."
            )
        if np.dtype(value.dtype) != np.dtype(dtype):
            raise ValueError(
                f"{name} must be {np.dtype(dtype).name}, got {value.dtype}."
            )
        for letter, size in zip(letters, value.shape, strict=True):
            known, source = axes.setdefault(letter, (size, name))
            if known != size:
                raise ValueError(
                    f"{name} has {letter}={size}, but {source} has {letter}={known}."
                )


def denominators(batch: Batch) -> dict[str, jax.Array]:
    """The counts a loss may be divided by, over the whole batch.

    Returns:
      Float32 scalars, 0 where there is nothing to count: ``tokens`` (loss-weighted
      target tokens), ``responses``, ``rationales`` (responses of that kind),
      ``prompts``, ``pairs`` and ``chosen_tokens`` (target tokens of each pair's chosen
      response).
    """
    chosen, _ = select_pairs(response_lengths(batch), batch)
    mask = batch["response_mask"]
    counts = {
        "tokens": jnp.sum(batch["decoder_loss_weights"]),
        "responses": jnp.sum(mask),
        "rationales": jnp.sum(mask * (batch["response_kind"] == RATIONALE)),
        "prompts": jnp.sum(batch["prompt_mask"]),
        "pairs": jnp.sum(batch["pair_mask"]),
        "chosen_tokens": jnp.sum(chosen * batch["pair_mask"]),
    }
    return {k: v.astype(jnp.float32) for k, v in counts.items()}


def prompt_of_tokens(
    decoder_segment_ids: jax.Array, response_prompt: jax.Array
) -> jax.Array:
    """The encoder segment each decoder token may attend to.

    Args:
      decoder_segment_ids: ``[B, K, Ld]``, response ``r`` as ``r + 1``, padding 0.
      response_prompt: ``[B, R]`` prompt indices; negative: none.

    Returns:
      ``[B, K, Ld]`` encoder segment ids, 0 where the token attends to nothing.
    """
    return by_token(jnp.maximum(response_prompt + 1, 0), decoder_segment_ids)


def by_token(values: jax.Array, decoder_segment_ids: jax.Array) -> jax.Array:
    """Gives each response's number to its tokens: ``[B, R]`` to ``[B, K, Ld]``.

    >>> by_token(jnp.array([[3.0, 5.0]]), jnp.array([[[1, 1, 2, 0]]]))
    Array([[[3., 3., 5., 0.]]], dtype=float32)
    """
    chex.assert_rank([decoder_segment_ids, values], [3, 2])
    # Index 0 answers for padding, so that segment ids index the table directly.
    table = jnp.pad(values, ((0, 0), (1, 0)))
    flat = decoder_segment_ids.reshape(decoder_segment_ids.shape[0], -1)
    return jnp.take_along_axis(table, flat, axis=1).reshape(decoder_segment_ids.shape)


def sum_by_response(
    values: jax.Array, decoder_segment_ids: jax.Array, num_responses: int
) -> jax.Array:
    """Sums per-token values over each response's tokens, in float32.

    Args:
      values: ``[B, K, Ld]``.
      decoder_segment_ids: ``[B, K, Ld]``.
      num_responses: ``R``.

    Returns:
      ``[B, R]`` sums; padding belongs to no response.

    >>> sum_by_response(jnp.ones((1, 1, 4)), jnp.array([[[1, 1, 2, 0]]]), 2)
    Array([[2., 1.]], dtype=float32)
    """
    chex.assert_equal_shape([values, decoder_segment_ids])
    member = decoder_segment_ids[..., None] == jnp.arange(1, num_responses + 1)
    # A masked sum rather than a matrix product: exact in float32 on every backend.
    return jnp.sum(
        jnp.where(member, values.astype(jnp.float32)[..., None], 0.0), axis=(1, 2)
    )


def response_lengths(batch: Batch) -> jax.Array:
    """``[B, R]`` target tokens per response, EOS included."""
    return sum_by_response(
        batch["decoder_loss_weights"],
        batch["decoder_segment_ids"],
        batch["response_mask"].shape[1],
    )


def select_pairs(values: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Picks from ``[B, R]`` values: ``(chosen, rejected)`` of each pair, ``[B, Q]``."""
    take = jnp.take_along_axis
    return (
        take(values, batch["pair_chosen"], axis=1),
        take(values, batch["pair_rejected"], axis=1),
    )
