"""The jitted decode loop: N samples for each of B prompts.

The encoder runs once per prompt, and so do the cross-attention keys and values, which
the prompt's N samples share without copies. Self-attention caches are
``[B, N, T, H, D]``; the loop writes them in place and ends as soon as every row has
ended. Of the model it uses ``encode``, ``cross_key_values``, ``init_self_cache`` and
``decode_step`` only.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.decoding.sampling import Sampling, sample, sample_keys

PAD_ID = 0  # also the token a T5 decoder starts from
EOS_ID = 1


class Samples(NamedTuple):
    """Sampled responses; masks follow from ``lengths``, never from token values.

    Attributes:
      tokens: int32 ``[B, N, T]``: the response up to its EOS, then 0.
      logps: float32 ``[B, N, T]``, the model's full, untempered log-probability of each
        token, EOS included; 0 after it.
      sampler_logps: float32 ``[B, N, T]``, under the distribution that tokens were
        drawn from; 0 after EOS.
      lengths: int32 ``[B, N]`` tokens, EOS included; ``T`` where none came.
    """

    tokens: jax.Array
    logps: jax.Array
    sampler_logps: jax.Array
    lengths: jax.Array


def generate(
    model: Any,
    params: Any,
    encoder_input_tokens: jax.Array | np.ndarray,
    *,
    key: jax.Array,
    prompt_ids: jax.Array | np.ndarray,
    num_samples: int,
    max_new_tokens: int,
    sampling: Sampling,
) -> Samples:
    """Samples ``num_samples`` responses to each prompt.

    Sample ``n`` of a prompt is a function of the parameters, the prompt, ``key``, its
    id and ``n`` (up to float noise in the logits): batch neighbours, batch size and
    padding do not enter. Compiled once per model, ``(B, Le)``, ``num_samples``,
    ``max_new_tokens`` and ``sampling``; ``Generator`` keeps those shapes few.

    Args:
      model: a ``jaxalign.models.T5``, or anything with its decoding methods.
      params: its parameters, on any sharding.
      encoder_input_tokens: int32 ``[B, Le]``, right-padded with 0, EOS included. A row
        of zeros is no prompt: it yields empty responses and delays nobody.
      key: a typed PRNG key.
      prompt_ids: ``[B]`` integers in ``[0, 2**32)`` that tell prompts apart.
      num_samples: ``N``.
      max_new_tokens: ``T``, EOS included.
      sampling: temperature and truncation.

    Returns:
      ``Samples``.

    Raises:
      ValueError: on a size below 1, or prompts that are not right-padded.
    """
    sizes = {"num_samples": num_samples, "max_new_tokens": max_new_tokens}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}.")
    if isinstance(encoder_input_tokens, np.ndarray):
        present = encoder_input_tokens != PAD_ID
        late = np.flatnonzero((present[:, 1:] & ~present[:, :-1]).any(axis=1))
        if late.size:
            raise ValueError(
                f"Prompt row {late[0]} has padding (0) before its last token; expected "
                "right padding. Move the tokens to the left."
            )
    prompt_ids = jnp.asarray(prompt_ids, jnp.uint32)
    return _generate(
        model,
        params,
        jnp.asarray(encoder_input_tokens, jnp.int32),
        key,
        prompt_ids,
        num_samples=int(num_samples),
        max_new_tokens=int(max_new_tokens),
        sampling=sampling,
    )


class _Carry(NamedTuple):
    """State of the loop before drawing the token at ``position``."""

    position: jax.Array  # scalar
    inputs: jax.Array  # [B, N] the token before it
    ended: jax.Array  # [B, N]
    samples: Samples
    cache: Any


@functools.partial(
    jax.jit, static_argnames=("model", "num_samples", "max_new_tokens", "sampling")
)
def _generate(
    model: Any,
    params: Any,
    encoder_input_tokens: jax.Array,
    key: jax.Array,
    prompt_ids: jax.Array,
    *,
    num_samples: int,
    max_new_tokens: int,
    sampling: Sampling,
) -> Samples:
    chex.assert_rank([encoder_input_tokens, prompt_ids], [2, 1])
    chex.assert_equal_shape_prefix([encoder_input_tokens, prompt_ids], 1)
    batch = encoder_input_tokens.shape[0]
    rows = (batch, num_samples)
    encoder_mask = (encoder_input_tokens != PAD_ID).astype(jnp.int32)

    def apply(method: str, *args):
        return model.apply({"params": params}, *args, method=method)

    encoded = apply("encode", encoder_input_tokens, encoder_mask)
    cross_kv = apply("cross_key_values", encoded)
    keys = sample_keys(key, prompt_ids, num_samples)
    fold_in = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))

    def unfinished(carry: _Carry) -> jax.Array:
        return (carry.position < max_new_tokens) & ~jnp.all(carry.ended)

    def step(carry: _Carry) -> _Carry:
        logits, cache = apply(
            "decode_step",
            carry.inputs,
            carry.position,
            carry.cache,
            cross_kv,
            encoder_mask,
        )
        draw = sample(logits, fold_in(keys, carry.position), sampling)
        alive = ~carry.ended
        tokens = jnp.where(alive, draw.tokens, PAD_ID)

        def write(array, values):
            values = jnp.where(alive, values, 0)[:, :, None].astype(array.dtype)
            start = (0, 0, carry.position)
            return jax.lax.dynamic_update_slice(array, values, start)

        samples = Samples(
            tokens=write(carry.samples.tokens, tokens),
            logps=write(carry.samples.logps, draw.logps),
            sampler_logps=write(carry.samples.sampler_logps, draw.sampler_logps),
            lengths=carry.samples.lengths + alive,
        )
        ended = carry.ended | (tokens == EOS_ID)
        return _Carry(carry.position + 1, tokens, ended, samples, cache)

    shape = (*rows, max_new_tokens)
    no_prompt = ~jnp.any(encoder_mask, axis=1, keepdims=True)
    start = _Carry(
        position=jnp.int32(0),
        inputs=jnp.full(rows, PAD_ID, jnp.int32),
        ended=jnp.broadcast_to(no_prompt, rows),
        samples=Samples(
            tokens=jnp.full(shape, PAD_ID, jnp.int32),
            logps=jnp.zeros(shape, jnp.float32),
            sampler_logps=jnp.zeros(shape, jnp.float32),
            lengths=jnp.zeros(rows, jnp.int32),
        ),
        cache=model.init_self_cache(batch, num_samples, max_new_tokens),
    )
    return jax.lax.while_loop(unfinished, step, start).samples
