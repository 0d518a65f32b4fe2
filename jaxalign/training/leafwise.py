"""A network of a checkpoint of any format, whose parameters are read one at a time.

`jaxalign.training.checkpoints.load` puts a network onto devices; this opens it for what
takes its parameters one after the other: conversion, and starts with a part of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from jaxalign import models, vocabularies
from jaxalign.interop import leaves as views
from jaxalign.interop import merging, orbax_items
from jaxalign.interop.folders import flat, unstack
from jaxalign.interop.leaves import Leaf
from jaxalign.training import checkpoints, damage, foreign
from jaxalign.training.damage import DamagedCheckpointError
from jaxalign.training.partition import Partition


@dataclasses.dataclass(frozen=True)
class Stored:
    """A network that lies on disk.

    Attributes:
      format: ``"jaxalign"``, ``"hf"`` or ``"t5x"``.
      path: of the local checkpoint.
      name: of the network in it.
      model: the module, in the layout of `leaves`.
      leaves: the parameters by path, not read.
      vocabulary: None where there is none at hand.
      meta: of the checkpoint; another project's says what that does.
      vocabulary_told: what a checkpoint says of a vocabulary that is not at hand.
      left_over: arrays of the checkpoint that the network does not use.
    """

    format: str
    path: Path
    name: str
    model: nn.Module
    leaves: Mapping[str, Leaf]
    vocabulary: vocabularies.Vocabulary | None
    meta: dict[str, Any]
    vocabulary_told: Mapping[str, Any] | None = None
    left_over: tuple[str, ...] = ()


def opened(path: str | Path, network: str | None = None) -> Stored:
    """Opens a network; its files are compared with what was written.

    An adapter is merged into its base as the kernels are read.

    Args:
      path: as of `checkpoints.load`.
      network: its name; None: the checkpoint's main one.

    Raises:
      DamagedCheckpointError: naming the file.
      FileNotFoundError: when there is no checkpoint, or the base of an adapter is gone.
      ValueError: when there is no such network, with those there are, or the base of an
        adapter is another one now.
    """
    if other := foreign.opened(path):
        meta = foreign.about(other)
        name = network or other.name
        checkpoints.description(meta, name, path)
        return Stored(
            other.format,
            other.path,
            name,
            other.model(),
            other.foreign.leaves,
            other.foreign.vocabulary,
            meta,
            other.vocabulary_told,
            other.foreign.left_over,
        )
    meta = checkpoints.read_meta(path)
    name = network or meta["main"]
    about = checkpoints.description(meta, name, path)
    if "from" in about:
        start = about["from"]
        source = checkpoints.source(checkpoints.read_meta(start), name)
        return opened(start, source)  # a network that no step changed
    folder = checkpoints.resolve(path)
    damage.check_files(folder, meta, name)
    model = models.restored(about)
    partition = Partition.restored(name, about)
    like = checkpoints.on_mesh(model, None, partition)
    if "base" in about:
        like = partition.split({name: like})[0][name]
    leaves = _read(folder / name, like, model)
    if damage.NEW_KEYS[1] not in meta:  # no list of files: older checkpoints
        found = views.fingerprint(leaves)
        damage.compare(folder, meta, name, about.get("fingerprint"), found)
    if partition.adapter is not None:
        base: Mapping[str, Leaf] = {}
        if "base" in about:
            base = opened(*checkpoints.base(path, name, about["base"])).leaves
        config = dataclasses.replace(model.config, scan_layers=False)
        model = model.clone(config=config)
        own = unstack(leaves)
        leaves = merging.merged(partition.adapter, unstack(base), own)
    vocabulary = vocabularies.from_json(meta["vocabulary"], folder.parents[1])
    return Stored("jaxalign", folder, name, model, leaves, vocabulary, meta)


def _read(where: Path, like: Any, model: nn.Module) -> dict[str, Leaf]:
    """The arrays of a checkpoint's item, which has to hold those of `like`."""
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like)]
    keep = int(1.1 * max(sizes)) if model.config.scan_layers else 0
    leaves = dict(orbax_items.leaves(where, DamagedCheckpointError, keep))
    _check(where, leaves, flat(like), model)
    return leaves


def _check(
    where: Path, leaves: Mapping[str, Leaf], like: Mapping[str, Leaf], model: nn.Module
) -> None:
    """Refuses arrays that are not those of the network that ``meta`` names."""
    found = {path: leaf.shape for path, leaf in leaves.items()}
    wanted = {path: leaf.shape for path, leaf in like.items()}
    if found != wanted:
        differing = sorted(dict(found.items() ^ wanted.items()))
        raise DamagedCheckpointError(
            f"{where} does not hold the parameters of {models.describe(model)}: "
            f"{differing[:4]} differ."
        )
