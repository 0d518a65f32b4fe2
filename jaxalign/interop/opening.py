"""A checkpoint of another project by its path alone, whatever its format."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign import remote
from jaxalign.interop import folders, huggingface, peft, t5x
from jaxalign.interop.folders import Foreign
from jaxalign.models import networks
from jaxalign.vocabularies import ByteVocabulary, SentencePieceVocabulary, Vocabulary

FORMATS = (
    "a jaxalign run",
    "a Hugging Face folder",
    "an adapter of PEFT",
    "a T5X checkpoint",
)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint that was opened; nothing of its parameters is read yet.

    Attributes:
      format: ``"hf"``, ``"peft"`` or ``"t5x"``.
      path: the local folder.
      foreign: what it holds.
      step: how many steps it was trained for, if it says so.
    """

    format: str
    path: Path
    foreign: Foreign
    step: int | None = None

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
          like: a tree of ``ShapeDtypeStruct`` with shardings, layers stacked or apart.
        """

        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
        scanned = "encoder" in like.get("encoder", {})
        return folders.place(self.foreign.leaves, shardings, scan_layers=scanned)

    def fingerprint(self) -> str:
        """SHA-256 over names and float32 values, as a jaxalign checkpoint's.

        A conversion thus has the fingerprint of what it was made from.
        """
        digest = hashlib.sha256()
        for name, leaf in sorted(self.foreign.leaves.items()):
            digest.update(name.encode())
            values = np.ascontiguousarray(folders.whole(leaf), np.float32)
            digest.update(values.reshape(-1).view(np.uint8))
        return digest.hexdigest()


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
    foreign = Foreign(
        kind=told.kind,
        shape=told.shape,
        vocabulary=_vocabulary(told.vocabulary),
        names={},
        leaves=told.leaves,
        left_over=told.left_over,
    )
    return Opened("t5x", found.path, foreign, told.step)


def _copied(url: str) -> Path | None:
    if remote.holds(url, "checkpoint") or remote.holds(url, "state/_METADATA"):
        return remote.copy_folder(url, t5x.of_parameters)
    return None


def _vocabulary(told: Mapping[str, Any] | None) -> Vocabulary | None:
    """What a gin file names, where it is at hand."""
    kind = str((told or {}).get("class", "")).rsplit(".", 1)[-1]
    extra = {"extra_ids": told["extra_ids"]} if told and "extra_ids" in told else {}
    if kind == "ByteVocabulary":
        return ByteVocabulary(**extra)
    file = str((told or {}).get("sentencepiece_model_file", ""))
    if kind == "SentencePieceVocabulary" and os.path.isfile(file):
        return SentencePieceVocabulary(file, **extra)
    return None
