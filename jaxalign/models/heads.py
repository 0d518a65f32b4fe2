"""Models with a scalar head: values of prompts, rewards of responses."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.batch import Batch, prompt_of_tokens, sum_by_response
from jaxalign.models.config import T5Config
from jaxalign.models.layers import Embed
from jaxalign.models.stacks import Decoder, Encoder


class ScalarHead(nn.Module):
    """An affine map ``[..., E] -> [...]`` in float32; parameters kernel and bias."""

    @nn.compact
    def __call__(self, states: jax.Array) -> jax.Array:
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(
                nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
                ("embed", "scalar"),
            ),
            (states.shape[-1], 1),
            jnp.float32,
        )
        bias = self.param(
            "bias",
            nn.with_logical_partitioning(nn.initializers.zeros, ("scalar",)),
            (1,),
            jnp.float32,
        )
        return (states.astype(jnp.float32) @ kernel + bias)[..., 0]


class ValueModel(nn.Module):
    """``V(x)``, one scalar per prompt: encoder, mean over the prompt's tokens, linear.

    It owns its encoder; in DRO-V sharing one with the policy costs most of the gain
    (Richemond et al. 2024, ablation). The encoder's parameters have the names they
    have in ``T5``, so ``{**value_params, "token_embedder": p["token_embedder"],
    "encoder": p["encoder"]}`` starts it from a policy's parameters ``p``.

    Attributes:
      config: the network's; the decoder fields are not used.
    """

    config: T5Config

    def setup(self):
        self.token_embedder = Embed(self.config)
        self.encoder = Encoder(self.config)
        self.value_head = ScalarHead()

    def __call__(self, batch: Batch, *, deterministic: bool = True) -> jax.Array:
        """Float32 values ``[B, P]``; 0 where a row has no such prompt."""
        embedded = self.token_embedder(batch["encoder_input_tokens"])
        states = self.encoder(embedded, batch["encoder_segment_ids"], deterministic)
        return _of_prompts(self.value_head, batch, states)


def _of_prompts(head: ScalarHead, batch: Batch, states: jax.Array) -> jax.Array:
    """``[B, P]``: the head on the mean of each prompt's encoder states."""
    segments = batch["encoder_segment_ids"]
    prompts = jnp.arange(1, batch["prompt_mask"].shape[1] + 1)
    member = (segments[..., None] == prompts).astype(jnp.float32)
    count = jnp.sum(member, axis=1)
    total = jnp.einsum("ble,blp->bpe", states.astype(jnp.float32), member)
    values = head(total / jnp.maximum(count, 1.0)[..., None])
    return jnp.where(count > 0, values, 0.0)


def _of_responses(head: ScalarHead, batch: Batch, states: jax.Array) -> jax.Array:
    """``[B, R]``: the mean over a response's positions of the head on them."""
    segments, size = batch["decoder_segment_ids"], batch["response_mask"].shape[1]
    total = sum_by_response(head(states), segments, size)
    count = sum_by_response(jnp.ones(segments.shape), segments, size)
    return total / jnp.maximum(count, 1.0)


class ValueHead(nn.Module):
    """A scalar head alone, for values read off another network's states.

    Attributes:
      config: that network's.
    """

    config: T5Config

    def setup(self):
        self.value_head = ScalarHead()

    def __call__(self, batch: Batch, states: jax.Array | None = None) -> jax.Array:
        """Float32 values ``[B, P]`` from encoder states ``[B, Le, E]``.

        Without states, zeros stand in, which is enough to make the parameters.
        """
        if states is None:
            shape = batch["encoder_segment_ids"].shape
            states = jnp.zeros((*shape, self.config.emb_dim))
        return _of_prompts(self.value_head, batch, states)

    def of_responses(self, batch: Batch, states: jax.Array) -> jax.Array:
        """Float32 values ``[B, R]`` from decoder states ``[B, K, Ld, E]``."""
        return _of_responses(self.value_head, batch, states)


class TokenValueModel(nn.Module):
    """A value of each decoder position, averaged over a response.

    Attributes:
      config: the network's; it has no vocabulary head.
    """

    config: T5Config

    def setup(self):
        self.token_embedder = Embed(self.config)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.value_head = ScalarHead()

    def __call__(self, batch: Batch, *, deterministic: bool = True) -> jax.Array:
        """Float32 values ``[B, R]``; 0 where a row has no such response."""
        return _of_responses(
            self.value_head, batch, _decoded(self, batch, deterministic)
        )


def _decoded(module: nn.Module, batch: Batch, deterministic: bool) -> jax.Array:
    """``[B, K, Ld, E]`` states of a module with a whole encoder-decoder."""
    segments = batch["decoder_segment_ids"]
    encoded = module.encoder(
        module.token_embedder(batch["encoder_input_tokens"]),
        batch["encoder_segment_ids"],
        deterministic,
    )
    return module.decoder(
        module.token_embedder(batch["decoder_input_tokens"]),
        encoded,
        segments,
        prompt_of_tokens(segments, batch["response_prompt"]),
        batch["encoder_segment_ids"],
        deterministic,
    )


class RewardModel(nn.Module):
    """``r(x, y)``, one scalar per response, read at its last decoder position.

    The decoder's inputs are the targets shifted right, so the state there has seen
    the whole response but its last token, which is EOS unless the response was cut.

    Attributes:
      config: the network's; it has no vocabulary head.
    """

    config: T5Config

    def setup(self):
        self.token_embedder = Embed(self.config)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.reward_head = ScalarHead()

    def __call__(self, batch: Batch, *, deterministic: bool = True) -> jax.Array:
        """Float32 rewards ``[B, R]``; 0 where a row has no such response."""
        segments = batch["decoder_segment_ids"]
        states = _decoded(self, batch, deterministic)
        following = jnp.pad(segments[..., 1:], ((0, 0), (0, 0), (0, 1)))
        last = jnp.where(segments != following, self.reward_head(states), 0.0)
        return sum_by_response(last, segments, batch["response_mask"].shape[1])
