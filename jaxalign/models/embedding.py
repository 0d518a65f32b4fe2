"""A T5 encoder whose mean state is a text's embedding: Sentence-T5, GTR."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.batch import Batch
from jaxalign.models import soft_prompt
from jaxalign.models.config import T5Config
from jaxalign.models.layers import Dense, Embed
from jaxalign.models.networks import register
from jaxalign.models.stacks import Encoder


@register
class EmbeddingModel(nn.Module):
    """One vector per prompt: the mean of its encoder states, projected, of length 1.

    The trunk's parameters have the names they have in `T5`; there is no decoder. Ni et
    al. 2021 (Sentence-T5, arXiv 2108.08877; GTR, arXiv 2112.07899).

    Attributes:
      config: the network's; `num_decoder_layers` is not used.
      features: width of the projection ``projection/kernel [E, features]``, which has
        no bias; 0 leaves the mean as it is.
      normalize: divide each vector by its length.
    """

    config: T5Config
    features: int = 0
    normalize: bool = True

    def setup(self):
        self.token_embedder = Embed(self.config)
        self.encoder = Encoder(self.config)
        if self.features:
            self.projection = Dense(self.features, ("embed", "mlp"), jnp.float32)

    def __call__(self, batch: Batch, *, deterministic: bool = True) -> jax.Array:
        """Float32 ``[B, P, features or E]``; 0 where there is no such prompt."""
        segments = batch["encoder_segment_ids"]
        size = batch["prompt_mask"].shape[1]
        tokens = batch["encoder_input_tokens"]
        states = soft_prompt.encode(
            self.token_embedder, self.encoder, tokens, segments, size, deterministic
        )[:, : tokens.shape[1]]
        prompts = jnp.arange(1, size + 1)
        member = (segments[..., None] == prompts).astype(jnp.float32)
        total = jnp.einsum("ble,blp->bpe", states.astype(jnp.float32), member)
        vectors = total / jnp.maximum(jnp.sum(member, axis=1), 1.0)[..., None]
        if self.features:
            vectors = self.projection(vectors)
        if self.normalize:
            length = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
            vectors = vectors / jnp.maximum(length, 1e-12)
        return vectors
