"""A network with a scalar head: values of prompts, values and rewards of responses."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.batch import Batch, prompt_of_tokens, sum_by_response
from jaxalign.models import soft_prompt
from jaxalign.models.config import T5Config
from jaxalign.models.layers import Embed
from jaxalign.models.networks import register
from jaxalign.models.stacks import Decoder, Encoder

READS = ("prompt_mean", "response_mean", "response_last")


class AffineHead(nn.Module):
    """An affine map ``[..., E] -> [..., outputs]`` in float32: kernel and bias."""

    outputs: int = 1

    @nn.compact
    def __call__(self, states: jax.Array) -> jax.Array:
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(
                nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
                ("embed", "scalar"),
            ),
            (states.shape[-1], self.outputs),
            jnp.float32,
        )
        bias = self.param(
            "bias",
            nn.with_logical_partitioning(nn.initializers.zeros, ("scalar",)),
            (self.outputs,),
            jnp.float32,
        )
        return states.astype(jnp.float32) @ kernel + bias


class ScalarHead(AffineHead):
    """The same with one output, ``[..., E] -> [...]``."""

    def __call__(self, states: jax.Array) -> jax.Array:
        return super().__call__(states)[..., 0]


@register
class ScalarModel(nn.Module):
    """One number per prompt or response: a T5 without its vocabulary head.

    The trunk's parameters have the names they have in `T5`, so that one starts from a
    policy by `models.graft`.

    Attributes:
      config: the network's.
      read: where the number is read. ``"prompt_mean"``, ``V(x)``: the mean of a
        prompt's encoder states; there is no decoder. ``"response_mean"``: the mean over
        a response's decoder positions of the head on each. ``"response_last"``,
        ``r(x, y)``: a response's last decoder position; inputs are shifted right, so it
        has seen all of the response but its last token, EOS unless it was cut.
      trunk: False leaves the head alone, for another network's states.
    """

    config: T5Config
    read: str = "response_last"
    trunk: bool = True

    def setup(self):
        if self.read not in READS:
            raise ValueError(
                f"ScalarModel.read must be one of {READS}, got {self.read!r}."
            )
        if self.trunk:
            self.token_embedder = Embed(self.config)
            self.encoder = Encoder(self.config)
            if self.read != "prompt_mean":
                self.decoder = Decoder(self.config)
        self.value_head = ScalarHead()

    def __call__(
        self,
        batch: Batch,
        states: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """The numbers of a batch.

        Args:
          batch: a response batch.
          states: what a head alone reads, encoder ``[B, Le, E]`` or decoder states
            ``[B, K, Ld, E]``; zeros by default, which is enough to make parameters.
          deterministic: no dropout.

        Returns:
          Float32 ``[B, P]`` or ``[B, R]``; 0 where there is no such prompt or response.
        """
        if self.trunk:
            states = self._states(batch, deterministic)
        if self.read == "prompt_mean":
            segments = batch["encoder_segment_ids"]
            if states is None:
                states = jnp.zeros((*segments.shape, self.config.emb_dim))
            return _of_prompts(self.value_head, batch, states)
        segments, size = batch["decoder_segment_ids"], batch["response_mask"].shape[1]
        if states is None:
            states = jnp.zeros((*segments.shape, self.config.emb_dim))
        values = self.value_head(states)
        if self.read == "response_last":
            following = jnp.pad(segments[..., 1:], ((0, 0), (0, 0), (0, 1)))
            values = jnp.where(segments != following, values, 0.0)
            return sum_by_response(values, segments, size)
        count = sum_by_response(jnp.ones(segments.shape), segments, size)
        return sum_by_response(values, segments, size) / jnp.maximum(count, 1.0)

    def _states(self, batch: Batch, deterministic: bool) -> jax.Array:
        of_encoder = batch["encoder_segment_ids"]
        encoded = soft_prompt.encode(
            self.token_embedder,
            self.encoder,
            batch["encoder_input_tokens"],
            of_encoder,
            batch["prompt_mask"].shape[1],
            deterministic,
        )
        if self.read == "prompt_mean":
            return encoded
        segments = batch["decoder_segment_ids"]
        return self.decoder(
            self.token_embedder(batch["decoder_input_tokens"]),
            encoded,
            segments,
            prompt_of_tokens(segments, batch["response_prompt"]),
            soft_prompt.segments(self.token_embedder, of_encoder, encoded.shape[1]),
            deterministic,
        )


def _of_prompts(head: ScalarHead, batch: Batch, states: jax.Array) -> jax.Array:
    """``[B, P]``: the head on the mean of the encoder states of a prompt's tokens."""
    states = states[:, : batch["encoder_segment_ids"].shape[1]]
    prompts = jnp.arange(1, batch["prompt_mask"].shape[1] + 1)
    member = (batch["encoder_segment_ids"][..., None] == prompts).astype(jnp.float32)
    count = jnp.sum(member, axis=1)
    total = jnp.einsum("ble,blp->bpe", states.astype(jnp.float32), member)
    values = head(total / jnp.maximum(count, 1.0)[..., None])
    return jnp.where(count > 0, values, 0.0)
