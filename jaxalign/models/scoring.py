"""Log-probabilities of responses: the primitive every objective shares."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.batch import Batch, prompt_of_tokens, sum_by_response
from jaxalign.models import soft_prompt
from jaxalign.models.networks import EncoderDecoder, Params
from jaxalign.models.vocabulary import head_outputs


def encode(model: EncoderDecoder, params: Params, batch: Batch) -> jax.Array:
    """Encoder states ``[B, Le, E]`` of a batch's prompts, without dropout.

    Those of a soft prompt, if there is one, follow the tokens'.
    """
    return model.apply(
        {"params": params},
        batch["encoder_input_tokens"],
        batch["encoder_segment_ids"],
        method="encode",
        **soft_prompt.settings(params, batch),
    )


def final_states(
    model: EncoderDecoder,
    params: Params,
    batch: Batch,
    *,
    prompt: jax.Array | None = None,
    deterministic: bool = True,
    dropout_key: jax.Array | None = None,
    encoded: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Decoder states of every target token, and the head they are for.

    Args:
      prompt: int32 ``[B, R]``, the prompt each response is scored under instead of
        ``batch["response_prompt"]`` (KTO's mismatched prompts); negative: none.
      dropout_key: needed where ``deterministic=False``.
      encoded: of `encode`, to score several pairings of prompts and responses with one
        encoder pass; computed here by default.

    Returns:
      States ``[B, K, Ld, E]``, the head's kernel ``[E, V]``, and the encoder segment
      that each token attends to, ``[B, K, Ld]``, 0 for none.
    """
    rngs = {}
    if not deterministic:
        if dropout_key is not None:  # an adapter may drop where the network does not
            rngs = {"dropout": dropout_key}
        elif model.config.dropout_rate > 0.0:
            raise ValueError(
                f"deterministic=False with dropout_rate={model.config.dropout_rate} "
                "needs dropout_key; pass a PRNG key or deterministic=True."
            )
    if prompt is None:
        prompt = batch["response_prompt"]
    asked = prompt_of_tokens(batch["decoder_segment_ids"], prompt)

    def forward(module: EncoderDecoder) -> tuple[jax.Array, jax.Array]:
        states = encoded
        if states is None:
            states = module.encode(
                batch["encoder_input_tokens"],
                batch["encoder_segment_ids"],
                deterministic=deterministic,
                **soft_prompt.settings(params, batch),
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
    return states, kernel, asked


def token_logps(
    model: EncoderDecoder, params: Params, batch: Batch, **settings: Any
) -> jax.Array:
    """``log p(target_t | prompt, targets before t)`` of every target token.

    Logits at step t predict target t: the inputs are shifted already.

    Args:
      **settings: of `final_states`.

    Returns:
      ``[B, K, Ld]`` float32; 0 at padding and where a response has no prompt.
    """
    states, kernel, asked = final_states(model, params, batch, **settings)
    targets, chunk = batch["decoder_target_tokens"], model.config.logits_chunk
    logps = head_outputs(states, kernel, targets, chunk=chunk).logps
    return jnp.where(asked > 0, logps, 0.0)


def response_logps(
    model: EncoderDecoder, params: Params, batch: Batch, **settings: Any
) -> jax.Array:
    """``log p(response | prompt)``: :func:`token_logps` summed, EOS included.

    Args:
      **settings: of `final_states`.

    Returns:
      ``[B, R]`` float32 sums over the tokens that ``decoder_loss_weights`` counts; 0
      where a response or its prompt is absent. Divide by
      ``jaxalign.batch.response_lengths`` for means.
    """
    logps = token_logps(model, params, batch, **settings)
    return sum_by_response(
        logps * batch["decoder_loss_weights"],
        batch["decoder_segment_ids"],
        batch["response_mask"].shape[1],
    )
