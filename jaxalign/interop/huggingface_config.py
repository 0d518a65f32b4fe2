"""What a ``config.json`` of Hugging Face says of a T5, and the names of its tensors.

PyTorch keeps a linear layer's weight as ``[out, in]``, this library as ``[in, out]``;
the embedding is the same in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jaxalign.interop.folders import Source
from jaxalign.models.config import T5Shape

# feed_forward_proj -> mlp_activations. T5's "gelu" is "gelu_new", the tanh form.
_ACTIVATIONS = {
    "relu": ("relu",),
    "gelu_new": ("gelu",),
    "silu": ("silu",),
    "gated-gelu": ("gelu", "linear"),
    "gated-relu": ("relu", "linear"),
    "gated-silu": ("silu", "linear"),
}

# What this network always does, by config.json's key: any other value is another
# function.
_FIXED = {
    "layer_norm_epsilon": 1e-6,
    "is_decoder": False,
    "tie_encoder_decoder": False,
}

# T5Shape field -> key of config.json.
_FIELDS = {
    "vocab_size": "vocab_size",
    "emb_dim": "d_model",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "mlp_dim": "d_ff",
    "num_encoder_layers": "num_layers",
    "num_decoder_layers": "num_decoder_layers",
    "relative_attention_num_buckets": "relative_attention_num_buckets",
    "relative_attention_max_distance": "relative_attention_max_distance",
}

_KINDS = ("t5", "mt5", "umt5")
_REASONS = {
    "longt5": "its encoder attends locally",
    "switch_transformers": "its layers are mixtures of experts",
    "codet5p": "CodeT5+ of 2B and more is not a T5; 220M and 770M are",
}

# Names of shared.weight that old checkpoints repeat, and a bias that they store and no
# model reads.
ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNREAD = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

_ENCODER_BLOCK = (("SelfAttention", "attention", "pre_attention_layer_norm"),)
_DECODER_BLOCK = (
    ("SelfAttention", "self_attention", "pre_self_attention_layer_norm"),
    ("EncDecAttention", "encoder_decoder_attention", "pre_cross_attention_layer_norm"),
)


def shape_of(config: Mapping[str, Any]) -> T5Shape:
    """The network of a ``config.json``.

    Args:
      config: the parsed file. ``tie_word_embeddings``, true by default, means a tied
        and scaled vocabulary head (T5 1.0) where transformers 4 wrote it; transformers
        5 says ``scale_decoder_outputs``, and never scales for an mT5. A umT5's head is
        never scaled; transformers 5 does so, whatever the file says.

    Raises:
      ValueError: another architecture, a key that is missing, or one whose value asks
        for another function than this network's.

    >>> shape_of(dict(vocab_size=384, d_model=64, num_heads=4, d_kv=16, d_ff=128,
    ...     num_layers=2, feed_forward_proj="relu")).mlp_activations
    ('relu',)
    """
    kind = config.get("model_type", "t5")
    if kind not in _KINDS:
        reason = _REASONS.get(kind, "other architectures have other parameters")
        raise ValueError(
            f"config.json must have a model_type of {_KINDS}, got {kind!r}: {reason}."
        )
    values = {
        "num_decoder_layers": config.get("num_layers"),
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
    }
    for field, key in _FIELDS.items():
        if config.get(key) is not None:
            values[field] = config[key]
        elif values.get(field) is None:
            raise ValueError(f"config.json lacks {key!r}; it has {sorted(config)}.")
    proj = config.get("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu")
    if proj not in _ACTIVATIONS:
        raise ValueError(
            f"feed_forward_proj must be one of {sorted(_ACTIVATIONS)}, got {proj!r}."
        )
    values["mlp_activations"] = _ACTIVATIONS[proj]
    values["logits_via_embedding"] = _scales(config, kind)
    values["relative_bias_per_layer"] = kind == "umt5"
    implied = {
        **_FIXED,
        "is_gated_act": len(values["mlp_activations"]) == 2,
        "dense_act_fn": "gelu_new" if proj == "gated-gelu" else proj.split("-")[-1],
    }
    for key, value in implied.items():
        if config.get(key) not in (None, value):
            of = "" if key in _FIXED else f" with feed_forward_proj={proj!r}"
            raise ValueError(
                f"config.json must have {key}={value!r}{of}, got {config[key]!r}: it "
                "would be another function than the one this network computes."
            )
    return T5Shape(**values)


def _scales(config: Mapping[str, Any], kind: str) -> bool:
    """Whether the head is the embedding, its inputs scaled by ``d_model ** -0.5``."""
    if kind == "umt5":
        return False
    if config.get("scale_decoder_outputs") is not None:
        return bool(config["scale_decoder_outputs"])
    version = str(config.get("transformers_version") or "4").split(".")[0]
    if kind == "mt5" and version.isdecimal() and int(version) >= 5:
        return False  # it writes tie_word_embeddings=true whatever it was
    return bool(config.get("tie_word_embeddings", kind == "t5"))


def head_is_shared(config: Mapping[str, Any]) -> bool:
    """Whether a file without ``lm_head.weight`` may be whole: the embedding serves."""
    return bool(
        config.get("tie_word_embeddings", config.get("model_type", "t5") == "t5")
    )


def config_of(shape: T5Shape, encoder_only: bool = False) -> dict[str, Any]:
    """The contents of a ``config.json`` for a network, without the ids of a vocabulary.

    Every network without a bias in each layer is a "t5" there: what mT5, ByT5, UL2 and
    MADLAD-400 compute is what a T5 1.1 of their sizes does.
    """
    names = {activations: name for name, activations in _ACTIVATIONS.items()}
    if shape.mlp_activations not in names:
        raise ValueError(
            f"mlp_activations {shape.mlp_activations} has no Hugging Face name; "
            f"these have: {sorted(names)}."
        )
    kind = "umt5" if shape.relative_bias_per_layer else "t5"
    if kind == "umt5" and shape.logits_via_embedding:
        raise ValueError(
            "A network with relative_bias_per_layer has a Hugging Face architecture "
            "(umT5) only with logits_via_embedding=False."
        )
    task = "EncoderModel" if encoder_only else "ForConditionalGeneration"
    return {
        "architectures": [kind.upper() + task],
        "model_type": kind,
        **{key: getattr(shape, field) for field, key in _FIELDS.items()},
        **_FIXED,
        "is_encoder_decoder": not encoder_only,
        "feed_forward_proj": names[shape.mlp_activations],
        "tie_word_embeddings": shape.logits_via_embedding,
        "dropout_rate": shape.dropout_rate,
    }


def names_of(
    shape: T5Shape, encoder_only: bool = False
) -> Iterator[tuple[str, Source]]:
    """Yields each parameter's path, layers apart, and the tensor it comes from."""
    yield "token_embedder/embedding", Source("shared.weight")
    if not shape.logits_via_embedding and not encoder_only:
        yield "decoder/logits_dense/kernel", Source("lm_head.weight", True)
    wi = ["wi"] if len(shape.mlp_activations) == 1 else ["wi_0", "wi_1"]
    stacks = [("encoder", shape.num_encoder_layers, _ENCODER_BLOCK)]
    if not encoder_only:
        stacks.append(("decoder", shape.num_decoder_layers, _DECODER_BLOCK))
    for stack, depth, block in stacks:
        yield f"{stack}/{stack}_norm/scale", Source(f"{stack}.final_layer_norm.weight")
        if not shape.relative_bias_per_layer:
            yield f"{stack}/relpos_bias/rel_embedding", _bias(f"{stack}.block.0.layer")
        for i in range(depth):
            ours, theirs = f"{stack}/layers_{i}", f"{stack}.block.{i}.layer"
            if shape.relative_bias_per_layer:
                yield f"{ours}/relpos_bias/rel_embedding", _bias(theirs)
            names = [("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")]
            parts = [(*part, names) for part in block]
            dense = [(name, name) for name in (*wi, "wo")]
            parts.append(("DenseReluDense", "mlp", "pre_mlp_layer_norm", dense))
            for j, (their_part, our_part, norm, names) in enumerate(parts):
                yield f"{ours}/{norm}/scale", Source(f"{theirs}.{j}.layer_norm.weight")
                for our, their in names:
                    kernel = f"{theirs}.{j}.{their_part}.{their}.weight"
                    yield f"{ours}/{our_part}/{our}/kernel", Source(kernel, True)


def _bias(layer: str) -> Source:
    return Source(f"{layer}.0.SelfAttention.relative_attention_bias.weight", True)
