"""A checkpoint of another project by its path alone, whatever its format."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util

from jaxalign import remote
from jaxalign.interop import folders, huggingface, leaves, peft, t5x, tensor_files
from jaxalign.interop.folders import Foreign
from jaxalign.models import adapted, networks
from jaxalign.vocabularies import (
    ByteVocabulary,
    SentencePieceVocabulary,
    Vocabulary,
    from_json,
)

_T5X = ("checkpoint", "state/_METADATA")
_STEP = re.compile(r".*/checkpoint_(\d+)(?=/)")


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint that was opened; nothing of its parameters is read yet.

    Attributes:
      format: ``"hf"``, ``"peft"`` or ``"t5x"``.
      path: the local folder.
      foreign: what it holds.
      step: how many steps it was trained for, if it says so.
      vocabulary_told: what it says of a vocabulary that is not at hand.
    """

    format: str
    path: Path
    foreign: Foreign
    step: int | None = None
    vocabulary_told: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """What the network is called in a jaxalign checkpoint."""
        kind = networks.KINDS[self.foreign.kind]
        return "policy" if hasattr(kind, "decode") else "encoder"

    def model(self, **execution: Any) -> Any:
        """The network, unscanned unless `execution` says otherwise."""
        return self.foreign.model(**execution)

    def params(self, like: Any) -> Any:
        """The parameters, read leaf by leaf onto the shardings of `like`.

        Args:
          like: a tree of ``ShapeDtypeStruct`` with shardings, layers stacked or apart,
            of the network; a soft prompt that is beside it comes to all devices.
        """
        own = self.foreign.leaves
        beside = {path: leaf for path, leaf in own.items() if adapted.is_adapter(path)}
        own = {path: leaf for path, leaf in own.items() if path not in beside}
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
        scanned = "encoder" in like.get("encoder", {})
        params = folders.place(own, shardings, scan_layers=scanned)
        if beside:
            one = jax.tree.leaves(shardings)[0]
            if isinstance(one, jax.sharding.NamedSharding):
                one = one.update(spec=jax.sharding.PartitionSpec())
            there = traverse_util.unflatten_dict(dict.fromkeys(beside, one), sep="/")
            params = adapted.overlay(params, folders.place(beside, there))
        return params

    def fingerprint(self) -> str:
        """SHA-256 over names and values; see `leaves.fingerprint`."""
        return leaves.fingerprint(self.foreign.leaves)


def open_foreign(path: str | os.PathLike[str]) -> Opened | None:
    """Opens a Hugging Face folder or a T5X checkpoint, told by its content.

    An adapter of PEFT is opened as the network that it adapts, with it merged in.

    Args:
      path: local, or in a bucket, of which a local copy is taken.

    Returns:
      None for anything else.

    Raises:
      ValueError: for one that is damaged, or of another architecture.
    """
    if peft.is_folder(path):
        adapted = peft.open_folder(path)
        local = remote.copy_path(os.fspath(path)) if remote.is_remote(path) else path
        return Opened("peft", Path(local), adapted.merged())
    if huggingface.is_folder(path):
        folder = Path(os.fspath(path)) if not remote.is_remote(path) else None
        foreign = huggingface.open_folder(path)
        return Opened("hf", folder or remote.copy_path(os.fspath(path)), foreign)
    local = Path(path) if not remote.is_remote(path) else _copied(os.fspath(path))
    found = t5x.detect(local) if local is not None else None
    if found is None:
        return None
    checkpoint = t5x.open_checkpoint(found.path)
    told = t5x.describe(checkpoint)
    vocabulary = _vocabulary(found.path, told.vocabulary)
    foreign = Foreign(
        kind=told.kind,
        shape=told.shape,
        vocabulary=vocabulary,
        names={},
        leaves=told.leaves,
        left_over=told.left_over,
    )
    missing = None if vocabulary else told.vocabulary
    return Opened("t5x", found.path, foreign, told.step, missing)


def _copied(url: str) -> Path | None:
    """A copy of a T5X checkpoint in a bucket, or of a model directory's newest."""
    if not remote.holds(url, *_T5X):
        found = [
            at for name in _T5X for at in remote.expand(f"{url}/checkpoint_*/{name}")
        ]
        steps = {int(m[1]): m[0] for at in found if (m := _STEP.match(at))}
        if not steps:
            return None
        url = steps[max(steps)]
    return remote.copy_folder(url, t5x.of_parameters)


def _vocabulary(folder: Path, told: Mapping[str, Any] | None) -> Vocabulary | None:
    """What lies in the checkpoint, or what a gin file names and is at hand."""
    beside = folder / t5x.VOCABULARY
    if beside.is_file():
        return from_json(tensor_files.read_json(beside), folder)
    kind = str((told or {}).get("class", "")).rsplit(".", 1)[-1]
    extra = {"extra_ids": told["extra_ids"]} if told and "extra_ids" in told else {}
    if kind == "ByteVocabulary":
        return ByteVocabulary(**extra)
    file = str((told or {}).get("sentencepiece_model_file", ""))
    if kind == "SentencePieceVocabulary" and os.path.isfile(file):
        return SentencePieceVocabulary(file, **extra)
    return None
