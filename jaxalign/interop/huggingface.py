"""Hugging Face folders of T5s: what they hold, and one written from parameters.

Covers T5 1.0 and 1.1 (LM-adapted, Flan-T5, T0, Tk-Instruct), mT5 (Aya-101, MetricX),
umT5, ByT5, UL2, MADLAD-400, CodeT5 and CodeT5+ up to 770M, and the encoders Sentence-T5
and GTR. Importing this module needs neither PyTorch nor transformers.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxalign import remote
from jaxalign.interop import huggingface_config as configs
from jaxalign.interop import tensor_files, tokenizer_files
from jaxalign.interop.folders import Foreign, Source, place, unstack
from jaxalign.interop.leaves import Leaf
from jaxalign.interop.new_folder import new_folder
from jaxalign.interop.tensor_files import read_json
from jaxalign.models import networks
from jaxalign.models.config import T5Config, T5Shape
from jaxalign.vocabularies import Vocabulary

CONFIG, GENERATION, MODULES = "config.json", "generation_config.json", "modules.json"
_DENSE = "linear.weight"
_ROWS = 4096  # of two embeddings, compared at a time


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path, local or in a bucket, is a model folder of Hugging Face."""
    if remote.is_remote(path):
        return remote.holds(os.fspath(path), CONFIG, MODULES)
    return any(Path(path, name).is_file() for name in (CONFIG, MODULES))


def open_folder(path: str | os.PathLike[str]) -> Foreign:
    """What a folder holds; of its tensors, names and shapes are read and checked.

    Args:
      path: with ``config.json``, ``*.safetensors`` and a tokenizer's files, or a
        Sentence-Transformers folder with ``modules.json``. Of one in a bucket a local
        copy is taken.

    Raises:
      FileNotFoundError: no such folder, or no safetensors in it.
      ValueError: another architecture, tensors that do not fit ``config.json``, a
        tokenizer that does not fit the embedding, damaged files.
    """
    folder = remote.copy_folder(path, _wanted)
    modules = _modules(folder)
    folder = modules.get("Transformer", folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} must be a local Hugging Face model folder with a config.json; "
            "download it first (hf download NAME --local-dir FOLDER)."
        )
    config = read_json(folder / CONFIG)
    shape = configs.shape_of(config)
    generation = folder / GENERATION
    generation = read_json(generation) if generation.is_file() else {}
    ids = tokenizer_files.ids_of(config, generation)
    kind, options = "T5", {}
    architectures = config.get("architectures") or [""]
    if modules or architectures[0].endswith("EncoderModel"):
        kind, options = "EmbeddingModel", {"normalize": "Normalize" in modules}
    elif config.get("is_encoder_decoder") is False:
        raise ValueError(
            f"{folder}: config.json must have is_encoder_decoder=true, or name an "
            f"EncoderModel among its architectures, got {architectures}."
        )
    encoder_only = kind == "EmbeddingModel"
    names = dict(configs.names_of(shape, encoder_only))
    tensors = tensor_files.read_folder(folder)
    if "Dense" in modules:
        dense = _dense(modules["Dense"], shape)
        options["features"] = dense.shape[0]
        names["projection/kernel"] = Source(_DENSE, True)
        tensors[_DENSE] = dense
    shared = configs.head_is_shared(config)
    tensors, left_over = _resolved(tensors, shape, encoder_only, shared)
    model = networks.KINDS[kind](config=T5Config(**vars(shape)), **options)
    return Foreign(
        kind=kind,
        shape=shape,
        vocabulary=tokenizer_files.read(folder, config, ids),
        names=names,
        leaves=_leaves(folder, tensors, names, model, left_over),
        options=options,
        left_over=left_over,
    )


def read(
    path: str | os.PathLike[str],
    shardings: Any = None,
    dtype: Any = None,
    *,
    scan_layers: bool = False,
) -> dict[str, Any]:
    """The parameters of a folder, each read straight onto its devices; see `place`."""
    leaves = open_folder(path).leaves
    return place(leaves, shardings, dtype, scan_layers=scan_layers)


def _wanted(name: str) -> bool:
    return name.endswith((".json", ".safetensors", ".txt", tokenizer_files.SPIECE))


def _modules(folder: Path) -> dict[str, Path]:
    """The parts of a Sentence-Transformers folder by kind; empty for other folders."""
    file = folder / MODULES
    if not file.is_file():
        return {}
    try:
        listed = json.loads(file.read_text("utf-8"))
        parts = [(str(m["type"]).split(".")[-1], m["path"]) for m in listed]
    except (ValueError, TypeError, KeyError) as error:
        raise tensor_files.DamagedFolderError(f"{file} is damaged: {error}") from error
    known = {"Transformer", "Pooling", "Dense", "Normalize"}
    found = {k: remote.below(folder, p) if p else folder for k, p in parts}
    pooling = found.get("Pooling")
    how = read_json(pooling / CONFIG) if pooling else {}
    modes = sorted(k for k, on in how.items() if k.startswith("pooling_mode") and on)
    mean = modes == ["pooling_mode_mean_tokens"] or how.get("pooling_mode") == "mean"
    if not set(found) <= known or len(parts) != len(found) or not mean:
        raise ValueError(
            f"{file} must list a Transformer, Pooling by the mean, and at most one "
            f"Dense and Normalize, got {[k for k, _ in parts]} with {modes or how}."
        )
    return found


def _dense(folder: Path, shape: T5Shape) -> Leaf:
    """The weight ``[features, E]`` of a projection without bias or activation."""
    config = read_json(folder / CONFIG)
    activation = str(config.get("activation_function", "Identity")).split(".")[-1]
    tensors = tensor_files.read_folder(folder)
    if activation != "Identity" or config.get("bias") or set(tensors) != {_DENSE}:
        raise ValueError(
            f"{folder} must be a projection without bias or activation, got "
            f"{activation} and the tensors {sorted(tensors)}."
        )
    if tensors[_DENSE].shape[1:] != (shape.emb_dim,):
        raise ValueError(
            f"{folder}: {_DENSE} must have shape [features, {shape.emb_dim}], got "
            f"{tensors[_DENSE].shape}."
        )
    return tensors[_DENSE]


def _resolved(
    tensors: Mapping[str, Leaf], shape: T5Shape, encoder_only: bool, shared: bool
) -> tuple[dict[str, Leaf], tuple[str, ...]]:
    """Tensors with one embedding under its own name, and those no parameter takes."""
    tensors, embedding = dict(tensors), "shared.weight"
    aliases = [*configs.ALIASES, *["lm_head.weight"] * shape.logits_via_embedding]
    held = [name for name in (embedding, *aliases) if name in tensors]
    if held:
        tensors.setdefault(embedding, tensors[held[0]])
        if shared and not shape.logits_via_embedding and not encoder_only:
            # A head that is tied but not scaled is stored once.
            tensors.setdefault("lm_head.weight", tensors[embedding])
    for name in held[1:]:
        if not _same(tensors[name], tensors[embedding]):
            raise ValueError(
                f"{name!r} differs from 'shared.weight', of which this network takes "
                "it for another name, and would be lost; does the config belong to "
                "this checkpoint? (tie_word_embeddings, scale_decoder_outputs)"
            )
    dropped = [n for n in (*aliases, configs.UNREAD) if n in tensors]
    if encoder_only:  # the encoder of a whole T5 is one, too
        whole = ("decoder.", "lm_head.")
        dropped += [n for n in tensors if n.startswith(whole) and n not in dropped]
    return {n: x for n, x in tensors.items() if n not in dropped}, tuple(dropped)


def _same(a: Leaf, b: Leaf) -> bool:
    def rows(leaf, start):
        return leaf.read((slice(start, start + _ROWS), slice(None)))

    return (
        a is b
        or a.shape == b.shape
        and all(
            np.array_equal(rows(a, i), rows(b, i)) for i in range(0, a.shape[0], _ROWS)
        )
    )


def _leaves(
    folder: Path,
    tensors: Mapping[str, Leaf],
    names: Mapping[str, Source],
    model: nn.Module,
    left_over: tuple[str, ...],
) -> dict[str, Leaf]:
    """A leaf for each parameter; every name and shape is checked."""
    wanted = unstack(networks.shapes(model))
    hint = f"does {CONFIG} belong to these tensors?"
    leaves = {}
    for path, (name, transposed) in names.items():
        if name not in tensors:
            near = difflib.get_close_matches(name, tensors, n=1)
            near = f"; nearest: {near[0]!r}" if near else ""
            raise ValueError(f"{folder} lacks {name!r} (for {path}){near}; {hint}")
        leaf = tensors[name].transposed if transposed else tensors[name]
        if leaf.shape != wanted[path].shape:
            raise ValueError(
                f"{path} must have shape {wanted[path].shape}, but {name!r} gives "
                f"{leaf.shape}; {hint}"
            )
        leaves[path] = leaf
    unknown = sorted(set(tensors) - {source.name for source in names.values()})
    if unknown:
        raise ValueError(
            f"{folder} has {len(unknown)} tensors that this network has no place for, "
            f"such as {unknown[:3]}; {hint}"
        )
    return leaves


def write(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    model: nn.Module,
    vocabulary: Vocabulary | None,
    *,
    dtype: Any = None,
    card: str = "",
    shard: int = 5 << 30,
) -> None:
    """Writes a folder that ``from_pretrained`` reads, tensor by tensor.

    It gets its name when it is whole. Of several processes all have to call this, and
    the first writes.

    Args:
      path: that does not exist or is an empty folder; it may be in a bucket.
      params: nested, or flat by path, in either layout; arrays or `leaves.Leaf`.
      model: a ``T5`` or an ``EmbeddingModel``.
      vocabulary: whose tokenizer and ids are written; None writes a T5's ids and no
        tokenizer.
      dtype: of the tensors, ``"float32"`` or ``"bfloat16"``; None keeps each one's.
      card: Markdown, written as ``README.md``.
      shard: bytes of a file before another is begun.

    Raises:
      FileExistsError: where something is there already.
      OSError: where the folder cannot be written.
      ValueError: for a network that Hugging Face has no architecture of.
    """
    kind = type(model).__name__
    if kind not in ("T5", "EmbeddingModel"):
        raise ValueError(
            f"A network of the kind {kind!r} has no Hugging Face architecture; those "
            "of the kinds 'T5' and 'EmbeddingModel' have."
        )
    if dtype is not None and str(np.dtype(dtype)) not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}.")
    shape, alone = model.config, kind == "EmbeddingModel"
    config = configs.config_of(shape, alone)
    leaves, names = unstack(params), dict(configs.names_of(shape, alone))
    dense = leaves.pop("projection/kernel", None)
    if set(leaves) != set(names):
        raise ValueError(
            f"The parameters are not those of {networks.describe(model)}: "
            f"{sorted(set(leaves) ^ set(names))[:4]} differ."
        )
    tensors = {
        names[path].name: leaf.transposed if names[path].transposed else leaf
        for path, leaf in leaves.items()
    }
    ids = {
        "pad_token_id": vocabulary.pad_id if vocabulary else 0,
        "eos_token_id": vocabulary.eos_id if vocabulary else 1,
        "decoder_start_token_id": vocabulary.start_id if vocabulary else 0,
    }
    if jax.process_index():
        for leaf in (*tensors.values(), *([dense] if dense else ())):
            leaf.read()  # the first process gathers it
        return
    with new_folder(path, CONFIG) as folder:
        tensor_files.write_folder(folder, tensors, dtype, shard)
        if alone:
            _write_modules(folder, model, dense, dtype)
        else:
            _write_json(folder / GENERATION, ids)
        if vocabulary is not None:
            tokenizer_files.write(folder, vocabulary, config["model_type"])
        if card:
            (folder / "README.md").write_text(card, "utf-8")
        _write_json(folder / CONFIG, config | ids)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def _write_modules(folder: Path, model: Any, dense: Leaf | None, dtype: Any) -> None:
    """What Sentence-Transformers reads of an encoder, beside its weights."""
    kinds = ["Transformer", "Pooling", *["Dense"] * bool(dense)]
    kinds += ["Normalize"] * model.normalize
    places = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
    width = model.config.emb_dim
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    _write_json(folder / places[1] / CONFIG, pooling)
    if dense is not None:
        settings = {
            "in_features": width,
            "out_features": model.features,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
        _write_json(folder / places[2] / CONFIG, settings)
        one = {_DENSE: dense.transposed}
        tensor_files.write_folder(folder / places[2], one, dtype)
    if model.normalize:
        (folder / places[-1]).mkdir()
    package = "sentence_transformers.models"
    listed = [
        {"idx": i, "name": str(i), "path": place, "type": f"{package}.{kind}"}
        for i, (kind, place) in enumerate(zip(kinds, places, strict=True))
    ]
    _write_json(folder / MODULES, listed)
