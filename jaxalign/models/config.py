"""The shape and numerics of a T5 network, under T5X's names."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.models.attention_paths import PATHS

DTYPES = ("float32", "bfloat16")
ACTIVATIONS = ("gelu", "linear", "relu", "silu")
REMAT_POLICIES = ("none", "minimal", "full")

_SIZES = (
    "vocab_size",
    "emb_dim",
    "num_heads",
    "head_dim",
    "mlp_dim",
    "num_encoder_layers",
    "num_decoder_layers",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
)


def _one_of(field: str, value: object, allowed: Sequence[str]) -> None:
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"T5Config.{field} must be one of {list(allowed)}, got {value!r}.{hint}"
    )


@dataclasses.dataclass(frozen=True)
class T5Shape:
    """Which function the parameters of a T5 compute; field names are T5X's.

    The defaults are those of T5 1.1: gated GELU, an untied vocabulary head. T5 1.0 has
    ``mlp_activations=("relu",)`` and ``logits_via_embedding=True``.

    Attributes:
      vocab_size: rows of the embedding (``V``), padding rows included.
      emb_dim: width of the residual stream (``E``).
      num_heads: attention heads (``H``).
      head_dim: width of one head (``D``); ``H * D`` need not equal ``E``.
      mlp_dim: hidden width of the feed-forward block (``F``).
      num_encoder_layers: encoder depth.
      num_decoder_layers: decoder depth.
      mlp_activations: one activation per input projection; two make a gated block.
      dropout_rate: in [0, 1); only used where ``deterministic=False``.
      logits_via_embedding: tie the vocabulary head to the embedding (T5 1.0).
      relative_attention_num_buckets: of the position bias, at least 4.
      relative_attention_max_distance: beyond which positions share a bucket; more
        than half the buckets.
      relative_bias_per_layer: every layer has a position bias of its own (umT5), where
        a T5's share their stack's.
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.0
    logits_via_embedding: bool = False
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    relative_bias_per_layer: bool = False

    def __post_init__(self):
        # A gin list must not make the configuration unhashable.
        if isinstance(self.mlp_activations, str):
            raise ValueError(
                "T5Config.mlp_activations must be a sequence of names such as "
                f"('gelu', 'linear'), got the string {self.mlp_activations!r}."
            )
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for field in _SIZES:
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"T5Config.{field} must be a positive integer, got {value!r}."
                )
        buckets = self.relative_attention_num_buckets
        if buckets < 4:
            raise ValueError(
                "T5Config.relative_attention_num_buckets must be at least 4 (an "
                "encoder parts them into two directions, and each into near and far), "
                f"got {buckets}."
            )
        if self.relative_attention_max_distance <= buckets // 2:
            raise ValueError(
                "T5Config.relative_attention_max_distance must exceed half of the "
                f"{buckets} buckets, which hold one distance each and leave the rest "
                f"for farther ones: at least {buckets // 2 + 1}, got "
                f"{self.relative_attention_max_distance}."
            )
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ValueError(
                f"T5Config.dropout_rate must be in [0, 1), got {self.dropout_rate!r}."
            )
        if not self.mlp_activations:
            raise ValueError("T5Config.mlp_activations must name an activation.")
        for name in self.mlp_activations:
            _one_of("mlp_activations", name, ACTIVATIONS)


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a network is computed, not which function it is: no part of its identity.

    A checkpoint remembers it, and can be used under another.

    Attributes:
      dtype: of the activations, ``"float32"`` or ``"bfloat16"``. Parameters,
        softmax, logits and losses are float32 always.
      scan_layers: store the layers stacked on the second axis of each parameter and
        run them with ``nn.scan``; compiles in constant time in the depth.
      remat_policy: what the backward pass recomputes: ``"none"``, ``"minimal"``
        (everything but the matrix products) or ``"full"`` (each layer).
      logits_chunk: decoder positions whose logits exist at once while scoring; 0 for
        all of them. A smaller number trades a second head product for memory.
      attention: how scores of training and scoring are computed: ``"whole"``, all at
        once; ``"chunked"``, 128 queries at a time, for rows of more than a few hundred
        tokens; ``"pallas"``, by a kernel that only TPUs run. See
        ``jaxalign.models.attention_paths``.
    """

    dtype: str = "float32"
    scan_layers: bool = False
    remat_policy: str = "none"
    logits_chunk: int = 0
    attention: str = "whole"

    def __post_init__(self):
        if self.logits_chunk < 0:
            raise ValueError(
                "T5Config.logits_chunk must be 0 (no chunks) or a number of decoder "
                f"positions, got {self.logits_chunk}."
            )
        if str(self.dtype) in ("float16", "fp16", "half"):
            raise ValueError(
                "T5Config.dtype 'float16' is refused: T5's feed-forward activations "
                "exceed 65504, float16's largest number, and turn into inf and NaN. "
                "Use 'bfloat16' (same size, float32's range) or 'float32'."
            )
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("remat_policy", self.remat_policy, REMAT_POLICIES)
        _one_of("attention", self.attention, tuple(PATHS))


@dataclasses.dataclass(frozen=True)
class T5Config(Execution, T5Shape):
    """A T5 network: its `T5Shape`, and its `Execution` on this machine.

    >>> T5Config(384, 64, 4, 16, 128, 2, 2, dtype="bfloat16").scan_layers
    False
    """

    def __post_init__(self):
        T5Shape.__post_init__(self)
        Execution.__post_init__(self)

    def architecture(self) -> dict[str, Any]:
        """The fields of the shape, as JSON.

        >>> config = T5Config(384, 16, 2, 8, 32, 1, 1, attention="chunked")
        >>> "attention" in config.architecture(), config.execution()["attention"]
        (False, 'chunked')
        """
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(T5Shape)}
        if not self.relative_bias_per_layer:  # checkpoints older than the field lack it
            del found["relative_bias_per_layer"]
        return {**found, "mlp_activations": list(self.mlp_activations)}

    def execution(self) -> dict[str, Any]:
        """The fields of the execution, as JSON."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(Execution)}

    @classmethod
    def stored(
        cls, architecture: Mapping[str, Any], execution: Mapping[str, Any]
    ) -> T5Config:
        """The network of a checkpoint, computed as there where this machine can.

        Args:
          architecture: as `architecture` gives it. Older checkpoints hold execution
            fields among them.
          execution: as `execution` gives it; may lack any of its fields.

        Returns:
          The network with the stored layout (``scan_layers``), numbers (``dtype``) and
          saving of memory. Nothing is rematerialised, which only training needs, and a
          kernel of TPUs gives way to ``"chunked"`` elsewhere.
        """
        fields = {**architecture, **execution, "remat_policy": "none"}
        if fields.get("attention") == "pallas" and jax.default_backend() != "tpu":
            fields["attention"] = "chunked"
        return cls(**fields)

    @property
    def activation_dtype(self) -> jnp.dtype:
        """The ``jnp`` dtype of the activations."""
        return jnp.dtype(self.dtype)
