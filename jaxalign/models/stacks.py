"""The encoder and decoder stacks, layer scan and rematerialisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.models.attention import Attention, KeyValues, write_cache
from jaxalign.models.attention_paths import Segments
from jaxalign.models.config import T5Config
from jaxalign.models.layers import (
    MLP_INIT,
    Dropout,
    MlpBlock,
    RelativePositionBias,
    RMSNorm,
    constrain,
    parameter,
)
from jaxalign.models.products import WITH_KERNEL

# The axis of every parameter on which scanned layers are stacked, T5X's
# param_scan_axis; see jaxalign.models.conversion.
PARAM_SCAN_AXIS = 1

# Where scanned layers stand in the decode arrays: after the axes [B] and [B, N],
# which decoding gathers and reorders.
CROSS_SCAN_AXIS = 1
CACHE_SCAN_AXIS = 2

_REMAT = {
    "minimal": jax.checkpoint_policies.save_only_these_names(WITH_KERNEL),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each normed before and added after."""

    config: T5Config

    def setup(self):
        cfg = self.config
        self.pre_attention_layer_norm = RMSNorm(cfg.activation_dtype)
        self.attention = Attention(cfg)
        self.pre_mlp_layer_norm = RMSNorm(cfg.activation_dtype)
        self.mlp = MlpBlock(cfg)
        self.dropout = Dropout(cfg.dropout_rate)
        if cfg.relative_bias_per_layer:
            self.relpos_bias = RelativePositionBias(cfg, bidirectional=True)

    def __call__(
        self, x: jax.Array, segments: Segments, bias: jax.Array, deterministic: bool
    ) -> jax.Array:
        """``x [B, L, E]``, ``bias [1, H, L, L]``."""
        h = self.pre_attention_layer_norm(x)
        key_values = self.attention.key_values(h)
        h = self.attention.attend(h, key_values, segments, bias, deterministic)
        x = x + self.dropout(h, deterministic)
        h = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        x = x + self.dropout(h, deterministic)
        return constrain(x, "batch", "length", "embed")


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward over K rows per prompt row."""

    config: T5Config

    def setup(self):
        cfg = self.config
        self.pre_self_attention_layer_norm = RMSNorm(cfg.activation_dtype)
        self.self_attention = Attention(cfg)
        self.pre_cross_attention_layer_norm = RMSNorm(cfg.activation_dtype)
        self.encoder_decoder_attention = Attention(cfg)
        self.pre_mlp_layer_norm = RMSNorm(cfg.activation_dtype)
        self.mlp = MlpBlock(cfg)
        self.dropout = Dropout(cfg.dropout_rate)
        if cfg.relative_bias_per_layer:
            self.relpos_bias = RelativePositionBias(cfg, bidirectional=False)

    def cross_key_values(self, encoded: jax.Array) -> KeyValues:
        """Keys and values ``[B, H, Le, D]`` of the encoder states, for `step`."""
        pair = self.encoder_decoder_attention.key_values(encoded)
        return tuple(jnp.swapaxes(x, 1, 2) for x in pair)

    def __call__(
        self,
        y: jax.Array,
        encoded: jax.Array,
        own: Segments,
        prompts: Segments,
        bias: jax.Array,
        deterministic: bool,
    ) -> jax.Array:
        """Teacher-forced ``y [B, K, L, E]`` on ``encoded [B, Le, E]``.

        ``own`` are the responses of ``B * K`` rows, ``prompts`` what their
        ``[B, K * L]`` tokens answer; ``bias`` is ``[1, H, L, L]``.
        """
        b, k, length, e = y.shape
        # Rows of one prompt do not see each other: K is a batch axis here ...
        h = self.pre_self_attention_layer_norm(y).reshape(b * k, length, e)
        key_values = self.self_attention.key_values(h)
        h = self.self_attention.attend(h, key_values, own, bias, deterministic)
        y = y + self.dropout(h.reshape(y.shape), deterministic)
        # ... and a longer query axis here: cross-attention has no positions, so all
        # rows share one set of keys and values.
        h = self.pre_cross_attention_layer_norm(y).reshape(b, k * length, e)
        attention = self.encoder_decoder_attention
        key_values = attention.key_values(encoded)
        h = attention.attend(h, key_values, prompts, None, deterministic)
        y = y + self.dropout(h.reshape(y.shape), deterministic)
        h = self.mlp(self.pre_mlp_layer_norm(y), deterministic)
        y = y + self.dropout(h, deterministic)
        return constrain(y, "batch", None, "length", "embed")

    def step(
        self,
        y: jax.Array,
        cache: KeyValues,
        cross_kv: KeyValues,
        position: jax.Array,
        self_mask: jax.Array,
        cross_mask: jax.Array,
        bias: jax.Array,
    ) -> tuple[jax.Array, KeyValues]:
        """One token ``y [B, N, E]`` of each of N continuations; also the new cache.

        ``cache`` holds their own keys and values ``[B, N, H, T, D]``, ``cross_kv`` the
        prompt's ``[B, H, Le, D]``. ``position`` is a scalar or ``[B, N]``,
        ``self_mask`` bool ``[B or 1, N or 1, T]``, ``cross_mask`` bool ``[B, 1, Le]``
        and ``bias`` float32 ``[B or 1, N or 1, H, T]``.
        """
        h = self.pre_self_attention_layer_norm(y)
        new = self.self_attention.key_values(h)
        cache = tuple(
            write_cache(old, x, position) for old, x in zip(cache, new, strict=True)
        )
        y = y + self.self_attention.attend_step(h, cache, self_mask, bias)
        h = self.pre_cross_attention_layer_norm(y)
        y = y + self.encoder_decoder_attention.attend_step(
            h, cross_kv, cross_mask, None
        )
        return y + self.mlp(self.pre_mlp_layer_norm(y), True), cache


def _run(
    layers: nn.Module | list[nn.Module],
    config: T5Config,
    body: Callable[..., tuple[Any, Any]],
    carry: Any,
    *xs: Any,
    in_axes: Any = (),
    out_axes: Any = 0,
    remat: bool = False,
) -> tuple[Any, Any]:
    """Runs ``body(layer, carry, *x) -> (carry, y)`` over a stack's layers.

    ``layers`` is a list of layers, with each of ``xs`` and ``ys`` a tuple over them, or
    one scanned layer, with these stacked on ``in_axes`` and ``out_axes``.
    """
    if remat and config.remat_policy != "none":
        # A scan's own loop already keeps XLA from merging the recomputation away.
        body = nn.remat(
            body,
            policy=_REMAT[config.remat_policy],
            prevent_cse=not config.scan_layers,
        )
    if isinstance(layers, nn.Module):
        scan = nn.scan(
            body,
            variable_axes={"params": PARAM_SCAN_AXIS},
            split_rngs={"params": True, "dropout": True},
            in_axes=in_axes,
            out_axes=out_axes,
            length=config.num_encoder_layers
            if isinstance(layers, EncoderLayer)
            else config.num_decoder_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(layers, carry, *xs)
    ys = []
    for layer, *x in zip(layers, *xs, strict=True):
        carry, y = body(layer, carry, *x)
        ys.append(y)
    return carry, tuple(ys)


def _bias_of(
    stack: nn.Module, look_up: Callable[[RelativePositionBias], jax.Array]
) -> Callable[[nn.Module], jax.Array]:
    """The bias of a layer: looked up once for its stack, or in a table of its own."""
    if stack.config.relative_bias_per_layer:
        return lambda layer: look_up(layer.relpos_bias)
    bias = look_up(stack.relpos_bias)
    return lambda layer: bias


class Encoder(nn.Module):
    """The encoder stack; ``layers_0 ...``, or ``encoder`` when scanned (T5X names)."""

    config: T5Config

    def setup(self):
        cfg = self.config
        if not cfg.relative_bias_per_layer:
            self.relpos_bias = RelativePositionBias(cfg, bidirectional=True)
        if cfg.scan_layers:
            self.encoder = EncoderLayer(cfg)
        else:
            self.layers = [EncoderLayer(cfg) for _ in range(cfg.num_encoder_layers)]
        self.encoder_norm = RMSNorm(cfg.activation_dtype)
        self.dropout = Dropout(cfg.dropout_rate)

    def __call__(
        self, embedded: jax.Array, segment_ids: jax.Array, deterministic: bool
    ) -> jax.Array:
        """``embedded [B, L, E]``, ``segment_ids [B, L]`` -> states ``[B, L, E]``."""
        cfg = self.config
        segments = Segments(segment_ids, segment_ids)
        bias_of = _bias_of(self, lambda table: table(segment_ids.shape[1]))

        def body(layer, x):
            return layer(x, segments, bias_of(layer), deterministic), None

        x = self.dropout(embedded, deterministic)
        x, _ = _run(
            self.encoder if cfg.scan_layers else self.layers,
            cfg,
            body,
            constrain(x, "batch", "length", "embed"),
            remat=True,
        )
        return self.dropout(self.encoder_norm(x), deterministic)


class LogitsDense(nn.Module):
    """The untied vocabulary head's kernel ``[E, V]``."""

    config: T5Config

    @nn.compact
    def __call__(self) -> jax.Array:
        shape = (self.config.emb_dim, self.config.vocab_size)
        return parameter(self, "kernel", MLP_INIT, ("embed", "vocab"), shape)


class Decoder(nn.Module):
    """The decoder stack; ``layers_0 ...``, or ``decoder`` when scanned (T5X names)."""

    config: T5Config

    def setup(self):
        cfg = self.config
        if not cfg.relative_bias_per_layer:
            self.relpos_bias = RelativePositionBias(cfg, bidirectional=False)
        if cfg.scan_layers:
            self.decoder = DecoderLayer(cfg)
        else:
            self.layers = [DecoderLayer(cfg) for _ in range(cfg.num_decoder_layers)]
        self.decoder_norm = RMSNorm(cfg.activation_dtype)
        self.dropout = Dropout(cfg.dropout_rate)
        if not cfg.logits_via_embedding:
            self.logits_dense = LogitsDense(cfg)

    def _layers(self) -> nn.Module | list[nn.Module]:
        return self.decoder if self.config.scan_layers else self.layers

    def __call__(
        self,
        embedded: jax.Array,
        encoded: jax.Array,
        segment_ids: jax.Array,
        prompt_segment_ids: jax.Array,
        encoder_segment_ids: jax.Array,
        deterministic: bool,
    ) -> jax.Array:
        """Teacher-forced states ``[B, K, L, E]``; see ``T5.decode``."""
        b, k, length, _ = embedded.shape
        rows = segment_ids.reshape(b * k, length)
        own = Segments(rows, rows, causal=True)
        asked = prompt_segment_ids.reshape(b, k * length)
        prompts = Segments(asked, encoder_segment_ids)
        bias_of = _bias_of(self, lambda table: table(length))

        def body(layer, y):
            y = layer(y, encoded, own, prompts, bias_of(layer), deterministic)
            return y, None

        y = self.dropout(embedded, deterministic)
        y = constrain(y, "batch", None, "length", "embed")
        y, _ = _run(self._layers(), self.config, body, y, remat=True)
        return self.dropout(self.decoder_norm(y), deterministic)

    def cross_key_values(self, encoded: jax.Array) -> Any:
        """Every layer's cross-attention keys and values; see ``T5``."""
        _, key_values = _run(
            self._layers(),
            self.config,
            lambda layer, carry: (carry, layer.cross_key_values(encoded)),
            None,
            out_axes=CROSS_SCAN_AXIS,
        )
        return key_values

    def step(
        self,
        embedded: jax.Array,
        position: jax.Array,
        cache: Any,
        cross_kv: Any,
        encoder_mask: jax.Array,
        cursor: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """States ``[B, N, E]`` of the tokens at ``position`` and the new cache."""
        length = jax.tree.leaves(cache)[0].shape[-2]

        def rows(bias):
            return bias[None, None] if bias.ndim == 2 else bias

        if cursor is None:
            # [T] for a scalar position, [B, N, T] for one per continuation.
            self_mask = jnp.arange(length) <= position[..., None]
            at = position
            bias_of = _bias_of(self, lambda table: rows(table.at(at, length)))
        else:
            # A ring: the column behind the cursor by `age` holds the token that many
            # positions before the query, in every row. T5's bias depends on that
            # distance only, so rows at different positions share the write and bias.
            age = jnp.mod(cursor - jnp.arange(length), length)
            self_mask = age <= position[..., None]
            bias_of = _bias_of(self, lambda table: rows(table.by_distance(-age)))
            position = jnp.mod(cursor, length)
        if self_mask.ndim == 1:
            self_mask = self_mask[None, None]
        cross_mask = (encoder_mask != 0)[:, None]

        def body(layer, y, own, cross):
            bias = bias_of(layer)
            return layer.step(y, own, cross, position, self_mask, cross_mask, bias)

        y, cache = _run(
            self._layers(),
            self.config,
            body,
            embedded,
            cache,
            cross_kv,
            in_axes=(CACHE_SCAN_AXIS, CROSS_SCAN_AXIS),
            out_axes=CACHE_SCAN_AXIS,
        )
        return self.decoder_norm(y), cache
