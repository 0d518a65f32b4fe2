"""Hugging Face T5 checkpoints: names, layouts and folders, in both directions.

Covers T5, T5 1.1, Flan-T5, ByT5 and mT5, whose layers share one relative bias per
stack; not umT5, whose layers have their own. PyTorch keeps a linear layer's weight as
``[out, in]``, this library as ``[in, out]``; the embedding is the same in both.

Importing this module needs neither PyTorch nor transformers.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from flax import traverse_util

from jaxalign.models import networks
from jaxalign.models.config import T5Config
from jaxalign.models.conversion import stack_layers, unstack_layers
from jaxalign.models.networks import Params
from jaxalign.models.t5 import T5

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
    "decoder_start_token_id": 0,
    "is_encoder_decoder": True,
    "is_decoder": False,
    "tie_encoder_decoder": False,
}

# T5Config field -> key of Hugging Face's config.json.
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

# Names of shared.weight that old checkpoints repeat, and a bias that they store and no
# model reads.
_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_UNREAD = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

_ENCODER_BLOCK = (("SelfAttention", "attention", "pre_attention_layer_norm"),)
_DECODER_BLOCK = (
    ("SelfAttention", "self_attention", "pre_self_attention_layer_norm"),
    ("EncDecAttention", "encoder_decoder_attention", "pre_cross_attention_layer_norm"),
)


def config_from_huggingface(config: Mapping[str, Any], **overrides: Any) -> T5Config:
    """A :class:`T5Config` from the contents of a ``config.json``.

    Args:
      config: the parsed file. ``tie_word_embeddings``, true by default, means a tied
        and scaled vocabulary head (T5 1.0) where transformers 4 wrote it; transformers
        5 says ``scale_decoder_outputs``, and never scales for an mT5.
      **overrides: ``T5Config`` fields such as ``dtype`` or ``scan_layers``. Dropout
        is 0 unless given.

    Returns:
      The configuration.

    Raises:
      ValueError: another architecture, a key that is missing, or one whose value asks
        for another function than this network's.

    >>> config_from_huggingface(dict(vocab_size=384, d_model=64, num_heads=4, d_kv=16,
    ...     d_ff=128, num_layers=2, feed_forward_proj="relu")).mlp_activations
    ('relu',)
    """
    kind = config.get("model_type", "t5")
    if kind not in ("t5", "mt5"):
        raise ValueError(
            f"config.json must have model_type 't5' or 'mt5', got {kind!r}; other "
            "architectures, umT5's per-layer biases included, have other parameters."
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
    return T5Config(**{**values, **overrides})


def _scales(config: Mapping[str, Any], kind: str) -> bool:
    """Whether the head is the embedding, its inputs scaled by ``d_model ** -0.5``."""
    if config.get("scale_decoder_outputs") is not None:
        return bool(config["scale_decoder_outputs"])
    version = str(config.get("transformers_version") or "4").split(".")[0]
    if kind == "mt5" and version.isdecimal() and int(version) >= 5:
        return False  # it writes tie_word_embeddings=true whatever it was
    return bool(config.get("tie_word_embeddings", kind == "t5"))


def config_to_huggingface(config: T5Config) -> dict[str, Any]:
    """The contents of a ``config.json`` for ``T5ForConditionalGeneration``."""
    names = {activations: name for name, activations in _ACTIVATIONS.items()}
    if config.mlp_activations not in names:
        raise ValueError(
            f"mlp_activations {config.mlp_activations} has no Hugging Face name; "
            f"these have: {sorted(names)}."
        )
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        **{key: getattr(config, field) for field, key in _FIELDS.items()},
        **_FIXED,
        "feed_forward_proj": names[config.mlp_activations],
        "tie_word_embeddings": config.logits_via_embedding,
        "dropout_rate": config.dropout_rate,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def parameter_names(config: T5Config) -> Iterator[tuple[str, str, bool]]:
    """Yields ``(our name, Hugging Face name, transposed)`` for every parameter.

    Our names are those of the unscanned layout, joined by ``/``.
    """
    yield "token_embedder/embedding", "shared.weight", False
    if not config.logits_via_embedding:
        yield "decoder/logits_dense/kernel", "lm_head.weight", True
    wi = ["wi"] if len(config.mlp_activations) == 1 else ["wi_0", "wi_1"]
    for stack, depth, block in (
        ("encoder", config.num_encoder_layers, _ENCODER_BLOCK),
        ("decoder", config.num_decoder_layers, _DECODER_BLOCK),
    ):
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield f"{stack}/relpos_bias/rel_embedding", bias, True
        yield f"{stack}/{stack}_norm/scale", f"{stack}.final_layer_norm.weight", False
        for i in range(depth):
            ours, theirs = f"{stack}/layers_{i}", f"{stack}.block.{i}.layer"
            names = [("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")]
            parts = [(*part, names) for part in block]
            dense = [(name, name) for name in (*wi, "wo")]
            parts.append(("DenseReluDense", "mlp", "pre_mlp_layer_norm", dense))
            for j, (their_part, our_part, norm, names) in enumerate(parts):
                yield f"{ours}/{norm}/scale", f"{theirs}.{j}.layer_norm.weight", False
                for our, their in names:
                    kernel = f"{ours}/{our_part}/{our}/kernel"
                    yield kernel, f"{theirs}.{j}.{their_part}.{their}.weight", True


def params_from_huggingface(
    state: Mapping[str, np.ndarray], config: T5Config
) -> Params:
    """Turns a ``T5ForConditionalGeneration`` state dict into parameters.

    Args:
      state: arrays by name, any float dtype.
      config: the network's; with ``scan_layers`` the result is stacked.

    Returns:
      Float32 numpy parameters in ``init_params``'s structure.

    Raises:
      ValueError: a name that is missing or unknown, a shape that does not fit, or a
        second embedding or head that this network would leave unused.
    """
    unscanned = T5(dataclasses.replace(config, scan_layers=False))
    shapes = traverse_util.flatten_dict(networks.shapes(unscanned), sep="/")
    state = dict(state)
    aliases = _ALIASES
    if config.logits_via_embedding:
        aliases = (*aliases, "lm_head.weight")
    # What files hold in place of shared.weight, or beside it.
    embedding = next(
        (state[n] for n in ("shared.weight", *aliases) if n in state), None
    )
    if embedding is not None:
        state.setdefault("shared.weight", embedding)
        if not config.logits_via_embedding:  # a tied but unscaled head is stored once
            state.setdefault("lm_head.weight", embedding)
    for name in aliases:
        if name in state and not np.array_equal(
            np.asarray(state[name]), np.asarray(state["shared.weight"])
        ):
            raise ValueError(
                f"{name!r} differs from 'shared.weight', of which this network takes "
                "it for another name, and would be lost; does the config belong to "
                "this checkpoint? (tie_word_embeddings, scale_decoder_outputs)"
            )
    flat, used = {}, {*aliases, _UNREAD}
    for ours, theirs, transposed in parameter_names(config):
        if theirs not in state:
            near = difflib.get_close_matches(theirs, state, n=1)
            hint = f"; nearest: {near[0]!r}" if near else ""
            raise ValueError(f"The state dict lacks {theirs!r} (for {ours}){hint}.")
        value = np.asarray(state[theirs]).astype(np.float32)
        value = value.T if transposed else value
        if value.shape != shapes[ours].shape:
            raise ValueError(
                f"{ours} must have shape {shapes[ours].shape}, but {theirs!r} gives "
                f"{value.shape}; does the config belong to this checkpoint?"
            )
        flat[ours] = np.ascontiguousarray(value)
        used.add(theirs)
    unknown = sorted(set(state) - used)
    if unknown:
        raise ValueError(
            f"The state dict has {len(unknown)} names that this T5 has no place for, "
            f"such as {unknown[:3]}; does the config belong to this checkpoint?"
        )
    params = traverse_util.unflatten_dict(flat, sep="/")
    return stack_layers(params) if config.scan_layers else params


def params_to_huggingface(params: Params, config: T5Config) -> dict[str, np.ndarray]:
    """The inverse of :func:`params_from_huggingface`.

    Returns:
      Float32 arrays by Hugging Face name, aliases of ``shared.weight`` left out.
    """
    if config.scan_layers:
        params = unstack_layers(params)
    flat = traverse_util.flatten_dict(params, sep="/")
    out = {}
    for ours, theirs, transposed in parameter_names(config):
        value = np.asarray(flat[ours], np.float32)
        out[theirs] = np.ascontiguousarray(value.T if transposed else value)
    return out


def load_huggingface(
    folder: str | pathlib.Path, **overrides: Any
) -> tuple[T5Config, Params]:
    """Reads a local Hugging Face model folder.

    Args:
      folder: holds ``config.json`` and ``*.safetensors`` or ``pytorch_model*.bin``
        files, sharded or not. safetensors files win where both are there.
      **overrides: ``T5Config`` fields, e.g. ``dtype="bfloat16"``.

    Returns:
      The configuration and float32 numpy parameters.

    Raises:
      FileNotFoundError: no such folder, or no weights in it.
      ImportError: without PyTorch, which reads ``.bin`` files.
    """
    folder = pathlib.Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} must be a local Hugging Face model folder with a config.json; "
            "download it first (huggingface-cli download NAME --local-dir FOLDER)."
        )
    config = config_from_huggingface(json.loads(path.read_text("utf-8")), **overrides)
    state: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= safetensors.numpy.load_file(file)
    if not state:
        state = _read_torch(sorted(folder.glob("pytorch_model*.bin")))
    if not state:
        raise FileNotFoundError(
            f"{folder} has no *.safetensors and no pytorch_model*.bin file."
        )
    return config, params_from_huggingface(state, config)


def save_huggingface(
    folder: str | pathlib.Path, config: T5Config, params: Params
) -> None:
    """Writes ``config.json`` and ``model.safetensors``; see :func:`load_huggingface`.

    ``T5ForConditionalGeneration.from_pretrained(folder)`` reads the result.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config_to_huggingface(config), indent=2) + "\n"
    (folder / "config.json").write_text(text, "utf-8")
    safetensors.numpy.save_file(
        params_to_huggingface(params, config),
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def _read_torch(paths: list[pathlib.Path]) -> dict[str, np.ndarray]:
    if not paths:
        return {}
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"Reading {paths[0].name} needs PyTorch: pip install torch (or convert it "
            "to safetensors elsewhere)"
        ) from error
    state = {}
    for path in paths:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        # numpy has no bfloat16.
        state.update({name: x.float().numpy() for name, x in tensors.items()})
    return state
