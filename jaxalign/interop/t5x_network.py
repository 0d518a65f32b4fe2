"""The network in a T5X checkpoint, told from its arrays and its gin file."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from jaxalign.interop import t5x_gin
from jaxalign.interop.leaves import Leaf
from jaxalign.interop.t5x_files import Checkpoint
from jaxalign.interop.t5x_formats import T5XError
from jaxalign.interop.t5x_layouts import find
from jaxalign.models import networks
from jaxalign.models.config import T5Config, T5Shape
from jaxalign.models.t5 import T5

TARGET = "target/"

_log = logging.getLogger(__name__)
_FIRST = "encoder/layers_0"
_PER_LAYER = "relative_bias_per_layer"
_UL2 = [4096, 16384, 32]  # emb_dim, mlp_dim, layers: gated by SiLU, not by GELU


@dataclasses.dataclass(frozen=True)
class Description:
    """What a T5X checkpoint holds, before any of its parameters is read.

    Attributes:
      kind: the network's class, a name in ``models.networks.KINDS``.
      shape: of the network.
      sources: where each field of the shape comes from: ``"arrays"``, ``"argument"``,
        the name of a gin file, or ``"assumed"``.
      leaves: the parameters by path, layers apart (``encoder/layers_0/...``).
      left_over: arrays of parameters that the network does not use.
      step: how many steps it was trained for, if it says so.
      vocabulary: what a gin file says of the vocabulary, such as
        ``{"class": "seqio.SentencePieceVocabulary", "sentencepiece_model_file": ...}``.
    """

    kind: str
    shape: T5Shape
    sources: Mapping[str, str]
    leaves: Mapping[str, Leaf] = dataclasses.field(repr=False)
    left_over: tuple[str, ...]
    step: int | None
    vocabulary: Mapping[str, Any] | None


def describe(
    checkpoint: Checkpoint,
    gin_files: Sequence[str | Path] | None = None,
    **fields: Any,
) -> Description:
    """The network of a checkpoint, from its arrays, its gin file and arguments.

    Sizes are told from the arrays: the heads from the table of position biases. What is
    not in them, the activations of the feed-forward block, is taken from ``config.gin``
    in the checkpoint or in its model directory, where T5X leaves it; without one they
    are assumed, with a note in the log: ReLU where the block is not gated (T5 1.0),
    tanh GELU where it is (T5 1.1).

    Args:
      checkpoint: an opened one.
      gin_files: to read in place of those beside the checkpoint.
      **fields: of `T5Shape`, where they are known better; what contradicts the arrays
        is refused.

    Raises:
      T5XError: a parameter is missing or has another shape; the message names it.
      ValueError: a field that cannot be told and was not given, or a contradiction.
    """
    known = {field.name for field in dataclasses.fields(T5Shape)}
    if unknown := sorted(set(fields) - known):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise ValueError(
            f"{unknown[0]!r} is no field of T5Shape."
            + (f" Did you mean {near[0]!r}?" if near else "")
        )
    where = checkpoint.found.path
    told = t5x_gin.read(where, gin_files)
    values, sources = _from_arrays(checkpoint, {**told.network, **fields})
    for given, source in ((told.network, told.source), (fields, "argument")):
        for field, value in given.items():
            value = tuple(value) if isinstance(value, list) else value
            if sources.get(field) == "arrays" and values[field] != value:
                raise ValueError(
                    f"{field} is {value!r} by {source}, but the arrays of {where} say "
                    f"{values[field]!r}. Is it another checkpoint's?"
                )
            if field in known and sources.get(field) != "arrays":
                values[field], sources[field] = value, source
    _activations(checkpoint, values, sources)
    shape = T5Shape(**values)
    leaves, left_over = _check(checkpoint, shape)
    vocabulary = told.vocabulary
    return Description(
        "T5", shape, sources, leaves, left_over, checkpoint.step, vocabulary
    )


def _from_arrays(
    checkpoint: Checkpoint, given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The fields that the arrays tell, and that they do."""
    where = checkpoint.found.path
    values: dict[str, Any] = {}
    embedding = _shape(checkpoint, "token_embedder/embedding", 2)
    values["vocab_size"], values["emb_dim"] = embedding
    for stack in ("encoder", "decoder"):
        depth = 0
        while _has(checkpoint, f"{stack}/layers_{depth}/pre_mlp_layer_norm/scale"):
            depth += 1
        if not depth:
            raise T5XError(
                f"{where} has no {stack}: expected its layers as "
                f"target/{stack}/layers_0/... or target/{stack}/{stack}/... It is no "
                "encoder-decoder of T5X's."
            )
        values[f"num_{stack}_layers"] = depth
    values |= _bias(checkpoint)
    width = _shape(checkpoint, f"{_FIRST}/attention/query/kernel", 2)[1]
    heads = values.get("num_heads", given.get("num_heads"))
    if heads is None:
        raise ValueError(
            f"num_heads cannot be told from the arrays of {where}: it has no "
            f"encoder/relpos_bias/rel_embedding, and its attention is {width} wide. "
            "Give num_heads, or the gin file of the model."
        )
    if width % heads:
        raise ValueError(
            f"num_heads is {heads}, but the attention of {where} is {width} wide, "
            "which it does not divide."
        )
    values["head_dim"] = width // heads
    values["mlp_dim"] = _shape(checkpoint, f"{_FIRST}/mlp/wo/kernel", 2)[0]
    values["logits_via_embedding"] = not _has(checkpoint, "decoder/logits_dense/kernel")
    return values, dict.fromkeys(values, "arrays")


def _bias(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the table of position biases tells, or kernels with their heads apart."""
    name = "relpos_bias/rel_embedding"
    shared, own = f"encoder/{name}", f"{_FIRST}/{name}"
    values: dict[str, Any] = {}
    if _has(checkpoint, own):
        if _PER_LAYER not in T5Shape.__dataclass_fields__:
            raise T5XError(
                f"{checkpoint.found.path} has a position bias in every layer (umT5's "
                "layout); this network's layers share one for each stack."
            )
        values[_PER_LAYER] = True
    if _has(checkpoint, own) or _has(checkpoint, shared):
        table = _shape(checkpoint, own if values else shared, 2)
        return {
            **values,
            "num_heads": table[0],
            "relative_attention_num_buckets": table[1],
        }
    for layer, rank in ((_FIRST, 3), ("encoder/encoder", 4)):
        kernel = checkpoint.leaves.get(f"{TARGET}{layer}/attention/query/kernel")
        if kernel is not None and len(kernel.shape) == rank:
            return {"num_heads": kernel.shape[-2]}
    return {}


def _has(checkpoint: Checkpoint, path: str) -> bool:
    return find(checkpoint.leaves, TARGET + path) is not None


def _shape(checkpoint: Checkpoint, path: str, rank: int) -> tuple[int, ...]:
    leaf = find(checkpoint.leaves, TARGET + path)
    if leaf is None:
        raise missing(checkpoint, [path])
    if len(leaf.shape) != rank:
        raise T5XError(
            f"{path} must have {rank} axes, but {leaf.names[0]!r} in "
            f"{checkpoint.found.path} has the shape {leaf.shape}."
        )
    return leaf.shape


def _activations(
    checkpoint: Checkpoint, values: dict[str, Any], sources: dict[str, str]
) -> None:
    """Assumes the activations that no gin file and no argument gives; checks others."""
    where = checkpoint.found.path
    wi = "target/encoder/layers_0/mlp/wi/kernel"
    count = 1 if find(checkpoint.leaves, wi) is not None else 2
    given = values.get("mlp_activations")
    if given is not None:
        if len(given) != count:
            has = "is not gated" if count == 1 else "is gated"
            raise ValueError(
                f"mlp_activations is {given!r} by {sources['mlp_activations']}, but "
                f"the feed-forward block of {where} {has}: it takes {count}."
            )
        return
    sizes = [values[name] for name in ("emb_dim", "mlp_dim", "num_encoder_layers")]
    if count == 2 and sizes == _UL2:
        raise ValueError(
            f"{where} has UL2's sizes, and no gin file that says which activation "
            "gates its feed-forward block. Give mlp_activations=('silu', 'linear') for "
            "UL2 and Flan-UL2, or ('gelu', 'linear')."
        )
    assumed, model = (("relu",), "1.0") if count == 1 else (("gelu", "linear"), "1.1")
    values["mlp_activations"], sources["mlp_activations"] = assumed, "assumed"
    _log.info("%s: activations assumed to be T5 %s's, %s.", where, model, assumed)


def _check(
    checkpoint: Checkpoint, shape: T5Shape
) -> tuple[dict[str, Leaf], tuple[str, ...]]:
    """The leaf of every parameter, layers apart; all problems before any is read."""
    config = T5Config(**dataclasses.asdict(shape))
    wanted = traverse_util.flatten_dict(networks.shapes(T5(config)), sep="/")
    found = {path: find(checkpoint.leaves, TARGET + path) for path in wanted}
    if absent := [path for path, leaf in found.items() if leaf is None]:
        raise missing(checkpoint, absent)
    leaves = {path: leaf for path, leaf in found.items() if leaf is not None}
    for path, leaf in leaves.items():
        check_leaf(checkpoint, path, leaf, wanted[path].shape)
    used = {name for leaf in leaves.values() for name in leaf.names}
    stored = (name for name in checkpoint.leaves if name.startswith(TARGET))
    return leaves, tuple(sorted(set(stored) - used))


def check_leaf(
    checkpoint: Checkpoint, path: str, leaf: Leaf, shape: tuple[int, ...]
) -> None:
    """Refuses an array of another shape than its parameter, or that is no number."""
    if leaf.shape != tuple(shape):
        raise T5XError(
            f"{path} must have shape {tuple(shape)}, but {leaf.names[0]!r} in "
            f"{checkpoint.found.path} gives {leaf.shape}."
        )
    if not np.issubdtype(leaf.dtype, np.floating) and leaf.dtype.name != "bfloat16":
        raise T5XError(
            f"{path} must be of floats, but {leaf.names[0]!r} in "
            f"{checkpoint.found.path} is {leaf.dtype}."
        )


def missing(checkpoint: Checkpoint, names: Sequence[str]) -> T5XError:
    """The error for parameters that a checkpoint lacks, with the nearest name."""
    stored = [name for name in checkpoint.leaves if name.startswith(TARGET)]
    name = TARGET + names[0].removeprefix(TARGET)
    near = difflib.get_close_matches(name, stored, n=1)
    more = f" and {len(names) - 1} more" * (len(names) > 1)
    return T5XError(
        f"{checkpoint.found.path} lacks {name}{more}"
        + (f"; the nearest name it has is {near[0]}." if near else ".")
    )
