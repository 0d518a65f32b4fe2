"""T5 encoder-decoders: 1.0, 1.1, mT5, ByT5, Flan-T5.

One network for training, scoring and decoding. Shapes: ``B`` rows of prompts, ``K``
decoder rows beside each, ``Le`` / ``Ld`` their lengths, ``N`` continuations while
decoding, ``T`` cache length, ``E`` emb_dim, ``H`` heads, ``D`` head_dim, ``V``
vocabulary.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.batch import Batch, prompt_of_tokens
from jaxalign.models import soft_prompt
from jaxalign.models.config import T5Config
from jaxalign.models.layers import Embed
from jaxalign.models.networks import register
from jaxalign.models.stacks import CACHE_SCAN_AXIS, Decoder, Encoder
from jaxalign.models.vocabulary import project


@register
class T5(nn.Module):
    """A T5 encoder-decoder over the response batch's layout.

    Parameter names, shapes and logical axes are T5X's. Methods are called with
    ``model.apply({"params": params}, ..., method="encode")``; pass
    ``rngs={"dropout": key}`` where ``deterministic=False``.
    """

    config: T5Config

    def setup(self):
        self.token_embedder = Embed(self.config)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def encode(
        self,
        input_tokens: jax.Array,
        segment_ids: jax.Array,
        *,
        deterministic: bool = True,
        prompts: int | None = None,
    ) -> jax.Array:
        """Final-normed states ``[B, Le, E]`` of packed prompts, blind to each other.

        Tokens and segments are int32 ``[B, Le]``; segment 0 is padding. With a soft
        prompt, say how many ``prompts`` a row has room for; the states of what is
        before them follow (`jaxalign.models.soft_prompt`).
        """
        chex.assert_rank([input_tokens, segment_ids], 2)
        chex.assert_equal_shape([input_tokens, segment_ids])
        return soft_prompt.encode(
            self.token_embedder,
            self.encoder,
            input_tokens,
            segment_ids,
            prompts,
            deterministic,
        )

    def decode(
        self,
        encoded: jax.Array,
        encoder_segment_ids: jax.Array,
        decoder_input_tokens: jax.Array,
        decoder_segment_ids: jax.Array,
        prompt_segment_ids: jax.Array,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Runs the decoder over ``K`` rows of packed responses per encoder row.

        Self-attention is causal within a response. A token attends to the encoder
        tokens of the one prompt its response answers; keys and values are computed
        once per encoder row and shared by its ``K`` rows.

        Args:
          encoded: ``[B, Le, E]`` from :meth:`encode`.
          encoder_segment_ids: ``[B, Le]``, those of tokens.
          decoder_input_tokens: ``[B, K, Ld]``, targets shifted right.
          decoder_segment_ids: ``[B, K, Ld]``; 0 is padding.
          prompt_segment_ids: ``[B, K, Ld]``, the encoder segment each token may look
            at, 0 for none (``jaxalign.batch.prompt_of_tokens``).
          deterministic: no dropout.

        Returns:
          Final-normed states ``[B, K, Ld, E]``; meaningless, but finite, at padding.
        """
        chex.assert_rank([encoded, decoder_input_tokens], [3, 3])
        encoder_segment_ids = soft_prompt.segments(
            self.token_embedder, encoder_segment_ids, encoded.shape[1]
        )
        chex.assert_shape(encoder_segment_ids, encoded.shape[:2])
        chex.assert_equal_shape(
            [decoder_input_tokens, decoder_segment_ids, prompt_segment_ids]
        )
        return self.decoder(
            self.token_embedder(decoder_input_tokens),
            encoded,
            decoder_segment_ids,
            prompt_segment_ids,
            encoder_segment_ids,
            deterministic,
        )

    def head(self, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The two factors of the logits: states ``[..., E]`` and kernel ``[E, V]``.

        The kernel is float32; multiply in the dtype of the states and accumulate in
        float32, as ``jaxalign.models.vocabulary.project`` does.
        """
        if self.config.logits_via_embedding:
            # T5 1.0 was trained in Mesh TensorFlow with this factor on the states.
            scale = jnp.asarray(1.0 / math.sqrt(self.config.emb_dim), states.dtype)
            return states * scale, self.token_embedder.embedding.T
        return states, self.decoder.logits_dense()

    def logits(self, states: jax.Array) -> jax.Array:
        """Float32 logits ``[..., V]`` of final states ``[..., E]``."""
        return project(*self.head(states))

    def __call__(self, batch: Batch, *, deterministic: bool = True) -> jax.Array:
        """Float32 logits ``[B, K, Ld, V]``; `token_logps` does without all at once."""
        encoded = self.encode(
            batch["encoder_input_tokens"],
            batch["encoder_segment_ids"],
            deterministic=deterministic,
            **soft_prompt.settings(self.variables.get("params", {}), batch),
        )
        states = self.decode(
            encoded,
            batch["encoder_segment_ids"],
            batch["decoder_input_tokens"],
            batch["decoder_segment_ids"],
            prompt_of_tokens(batch["decoder_segment_ids"], batch["response_prompt"]),
            deterministic=deterministic,
        )
        return self.logits(states)

    def cross_key_values(self, encoded: jax.Array) -> Any:
        """Every decoder layer's cross-attention keys and values, for decoding.

        A tuple over layers of ``(keys, values)``, each ``[B, H, Le, D]``. With
        ``scan_layers`` one such pair, stacked: ``[B, layers, H, Le, D]``.
        """
        return self.decoder.cross_key_values(encoded)

    def init_self_cache(self, batch: int, n: int, length: int) -> Any:
        """An empty self-attention cache for ``T = length``; needs no parameters.

        A tuple over layers of ``(keys, values)``, each ``[B, N, H, T, D]``. With
        ``scan_layers`` one such pair, stacked: ``[B, N, layers, H, T, D]``. Axes 0 and
        1 are prompt and continuation in both, so that beams and particles can be
        gathered with one ``tree.map``.
        """
        cfg, pairs = self.config, self.config.num_decoder_layers
        shape = [batch, n, cfg.num_heads, length, cfg.head_dim]
        if cfg.scan_layers:
            shape.insert(CACHE_SCAN_AXIS, pairs)
            pairs = 1
        zeros = functools.partial(jnp.zeros, shape, cfg.activation_dtype)
        cache = tuple((zeros(), zeros()) for _ in range(pairs))
        return cache[0] if cfg.scan_layers else cache

    def decode_step_states(
        self,
        tokens: jax.Array,
        position: jax.Array | int,
        self_cache: Any,
        cross_kv: Any,
        encoder_mask: jax.Array,
        cursor: jax.Array | int | None = None,
    ) -> tuple[jax.Array, Any]:
        """Final states ``[B, N, E]`` of one position's ``tokens``, and the new cache.

        Feeding a response's inputs token by token gives :meth:`decode`'s states. Keys
        and values after ``position`` are ignored: a cache may be reused as it is.

        Args:
          tokens: int32 ``[B, N]``, the input tokens at ``position``; the first is the
            start token 0.
          position: int32 scalar, or ``[B, N]`` where continuations differ in length;
            smaller than the cache's ``T``.
          self_cache: from :meth:`init_self_cache` or the last step.
          cross_kv: from :meth:`cross_key_values`.
          encoder_mask: ``[B, Le]``, non-zero at the prompt's tokens.
          cursor: int32 scalar, with ``position [B, N]``: use the cache as a ring, in
            which step ``cursor`` writes the column ``cursor % T`` for all rows at
            once, whatever their positions. Increase it by 1 a step and never mix it
            with calls without; a continuation may start at any step.
        """
        position = jnp.asarray(position, jnp.int32)
        chex.assert_rank([tokens, encoder_mask], 2)
        if position.ndim != 0:
            chex.assert_equal_shape([tokens, position])
        if cursor is not None:
            cursor = jnp.asarray(cursor, jnp.int32)
        embedded = self.token_embedder(tokens)
        encoder_mask = soft_prompt.segments(
            self.token_embedder,
            jnp.asarray(encoder_mask != 0, jnp.int32),
            jax.tree.leaves(cross_kv)[0].shape[-2],
        )
        return self.decoder.step(
            embedded, position, self_cache, cross_kv, encoder_mask, cursor
        )

    def decode_step(self, *arguments: Any, **named: Any) -> tuple[jax.Array, Any]:
        """:meth:`decode_step_states` with float32 logits ``[B, N, V]`` for states."""
        states, cache = self.decode_step_states(*arguments, **named)
        return self.logits(states), cache
