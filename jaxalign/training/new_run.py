"""A run directory made of parameters alone, for what reads checkpoints.

It has one checkpoint, of one network, without an optimizer's state: runs start from it,
and everything of `jaxalign.inference` reads it; no run goes on in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from jaxalign import models, vocabularies
from jaxalign.files import file_sha256, write_atomically
from jaxalign.interop import orbax_items
from jaxalign.interop.folders import flat
from jaxalign.interop.new_folder import new_folder
from jaxalign.training import damage, remote_checkpoints, run_directory

# Of a run's ``meta``: what stays true of its parameters wherever they are.
KEPT = ("objective", "seed", "batch_size", "data_fingerprint", "feature_lengths")
KEPT += ("reward_stats", "score_stats", "parents", "chat_template")


def write(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    model: nn.Module,
    vocabulary: vocabularies.Vocabulary,
    *,
    name: str = "policy",
    dtype: str = "float32",
    meta: Mapping[str, Any] | None = None,
    made_from: str = "parameters in memory",
) -> None:
    """Writes a run directory, parameter by parameter; it gets its name at the end.

    Args:
      path: that does not exist or is an empty folder; it may be in a bucket.
      params: nested or flat by path; arrays or `Leaf`.
      model: their network, in their layout.
      vocabulary: of the network.
      name: of the network in the checkpoint.
      dtype: on disk; networks are float32 in memory always.
      meta: of the checkpoint that they come from; what stays true of them is kept.
      made_from: for the manifest.

    Raises:
      FileExistsError: where something is there already.
      OSError: where the folder cannot be written.
    """
    meta = meta or {}
    step = int(meta.get("step") or 0)
    checkpoint = f"{remote_checkpoints.FOLDER}/{step}"
    with new_folder(path, f"{checkpoint}.json") as folder:
        own = folder / checkpoint
        fingerprint = orbax_items.write(own / name, flat(params), dtype)
        told = {
            "parents": {},
            **{key: meta[key] for key in KEPT if meta.get(key) is not None},
            "format": 3,
            "identity": {"objective": f"none: converted from {made_from}"},
            "step": step,
            "main": name,
            "networks": {name: {**models.stored(model), "fingerprint": fingerprint}},
            "vocabulary": vocabulary.to_json(),
            "vocabulary_fingerprint": vocabulary.fingerprint,
        }
        damage.write_meta(own, told)
        vocabulary.save(folder)
        run_directory.update_manifest(
            folder,
            status="converted",
            converted_from=made_from,
            **told,
            model=model.config.architecture(),
            **run_directory.environment(),
        )
        # What makes a checkpoint one in a bucket, by whatever means it gets there.
        content = damage.read_meta(own)["files"]
        content[damage.META_FILE] = file_sha256(own / damage.META_FILE)
        text = json.dumps({"sha256": content}, indent=1) + "\n"
        write_atomically(own.with_name(f"{step}.json"), text)
