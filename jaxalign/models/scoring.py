"""Log-probabilities of responses: the primitive every objective shares."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jaxalign.batch import Batch, prompt_of_tokens, sum_by_response
from jaxalign.models.t5 import T5, Params, project


def _target_logps(
    states: jax.Array, kernel: jax.Array, targets: jax.Array
) -> jax.Array:
    logits = project(states, kernel)
    # A masked sum instead of a gather: elementwise forward and backward, and local to
    # each device where the vocabulary is sharded.
    hit = targets[..., None] == jnp.arange(logits.shape[-1])
    chosen = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def target_logps(
    states: jax.Array, kernel: jax.Array, targets: jax.Array, *, chunk: int = 0
) -> jax.Array:
    """``log softmax(states @ kernel)[targets]``, in float32.

    Args:
      states: ``[..., L, E]`` final decoder states.
      kernel: float32 ``[E, V]``.
      targets: int32 ``[..., L]``.
      chunk: positions of the ``L`` axis whose logits exist at once, forward and
        backward; 0 for all. The numbers are the same, the head product is computed
        once more in the backward pass.

    Returns:
      ``[..., L]`` float32.

    >>> jnp.exp(target_logps(jnp.zeros((1, 2)), jnp.zeros((2, 4)), jnp.array([3])))
    Array([0.25], dtype=float32)
    """
    chex.assert_shape(targets, states.shape[:-1])
    length = states.shape[-2]
    if chunk == 0 or chunk >= length:
        return _target_logps(states, kernel, targets)
    # Chunks of the length axis, not of the flattened tokens: the batch axis keeps its
    # sharding over devices.
    padding = -length % chunk
    leading = targets.ndim - 1

    def split(x: jax.Array) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[leading] = (0, padding)
        x = jnp.pad(x, widths)
        shape = (*x.shape[:leading], -1, chunk, *x.shape[leading + 1 :])
        return jnp.moveaxis(x.reshape(shape), leading, 0)

    score = jax.checkpoint(_target_logps, prevent_cse=False)
    _, logps = jax.lax.scan(
        lambda carry, x: (carry, score(x[0], kernel, x[1])),
        None,
        (split(states), split(targets)),
    )
    logps = jnp.moveaxis(logps, 0, leading)
    return logps.reshape(*targets.shape[:-1], -1)[..., :length]


def token_logps(
    model: T5,
    params: Params,
    batch: Batch,
    *,
    prompt: jax.Array | None = None,
    deterministic: bool = True,
    dropout_key: jax.Array | None = None,
    encoded: jax.Array | None = None,
) -> jax.Array:
    """``log p(target_t | prompt, targets before t)`` of every target token.

    Logits at step t predict target t: the inputs are shifted already.

    Args:
      model: the network.
      params: its parameters.
      batch: a response batch.
      prompt: int32 ``[B, R]``, the prompt each response is scored under instead of
        ``batch["response_prompt"]`` (KTO's mismatched prompts); negative: none.
      deterministic: no dropout.
      dropout_key: needed where ``deterministic=False``.
      encoded: encoder states of this batch ``[B, Le, E]``, to score several pairings
        with one encoder pass; computed here by default.

    Returns:
      ``[B, K, Ld]`` float32; 0 at padding and where a response has no prompt.

    Raises:
      ValueError: dropout without a key.
    """
    rngs = {}
    if not deterministic and model.config.dropout_rate > 0.0:
        if dropout_key is None:
            raise ValueError(
                f"deterministic=False with dropout_rate={model.config.dropout_rate} "
                "needs dropout_key; pass a PRNG key or deterministic=True."
            )
        rngs = {"dropout": dropout_key}
    if prompt is None:
        prompt = batch["response_prompt"]
    asked = prompt_of_tokens(batch["decoder_segment_ids"], prompt)

    def forward(module: T5) -> tuple[jax.Array, jax.Array]:
        states = encoded
        if states is None:
            states = module.encode(
                batch["encoder_input_tokens"],
                batch["encoder_segment_ids"],
                deterministic=deterministic,
            )
        states = module.decode(
            states,
            batch["encoder_segment_ids"],
            batch["decoder_input_tokens"],
            batch["decoder_segment_ids"],
            asked,
            deterministic=deterministic,
        )
        return module.head(states)

    states, kernel = model.apply({"params": params}, method=forward, rngs=rngs)
    logps = target_logps(
        states, kernel, batch["decoder_target_tokens"], chunk=model.config.logits_chunk
    )
    return jnp.where(asked > 0, logps, 0.0)


def response_logps(
    model: T5,
    params: Params,
    batch: Batch,
    *,
    prompt: jax.Array | None = None,
    deterministic: bool = True,
    dropout_key: jax.Array | None = None,
    encoded: jax.Array | None = None,
) -> jax.Array:
    """``log p(response | prompt)``: :func:`token_logps` summed, EOS included.

    Returns:
      ``[B, R]`` float32 sums over the tokens that ``decoder_loss_weights`` counts; 0
      where a response or its prompt is absent. Divide by
      ``jaxalign.batch.response_lengths`` for means.
    """
    logps = token_logps(
        model,
        params,
        batch,
        prompt=prompt,
        deterministic=deterministic,
        dropout_key=dropout_key,
        encoded=encoded,
    )
    return sum_by_response(
        logps * batch["decoder_loss_weights"],
        batch["decoder_segment_ids"],
        batch["response_mask"].shape[1],
    )
