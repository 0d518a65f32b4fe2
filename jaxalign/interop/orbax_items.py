"""Trees of arrays as Orbax stores them, one array at a time.

Orbax restores a tree as a whole, onto devices. Here its arrays are opened one by one,
and a tree is written of which only a few arrays are in memory at a time; Orbax reads
it as one of its own.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from jaxalign import remote
from jaxalign.files import write_atomically
from jaxalign.interop.arrays import NO_FILL, Leaves, Queue, opened
from jaxalign.interop.leaves import Leaf

METADATA, PACKED = "_METADATA", "manifest.ocdbt"
_KINDS = ("jax.Array", "np.ndarray", "scalar")
_KEY_OF_DICT = 2  # Orbax's number for it
_ZSTD = {"id": "zstd", "level": 1}  # as Orbax compresses


def leaves(folder: Path, error: type[ValueError] = ValueError, keep: int = 0) -> Leaves:
    """The arrays of a tree by their ``/``-joined path; nothing is read yet.

    Args:
      folder: with Orbax's ``_METADATA``.
      error: what is raised where it is damaged.
      keep: bytes of what was unpacked last that stay in memory, so that the layers of a
        stack, read one after the other, unpack it once.
    """
    file = folder / METADATA
    try:
        metadata = json.loads(file.read_text("utf-8"))
        entries = {
            ast.literal_eval(key): entry["value_metadata"]["value_type"]
            for key, entry in metadata["tree_metadata"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, SyntaxError) as cause:
        raise error(
            f"{file} is not readable as Orbax's description of a checkpoint "
            f"({type(cause).__name__}: {cause}). Copy the checkpoint again."
        ) from cause
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    # Older Orbax leaves out what equals the fill value.
    fill = NO_FILL if metadata.get("store_array_data_equal_to_fill_value") else {}
    kept = {}
    if keep:
        pool = {"cache_pool": {"total_bytes_limit": keep}}
        kept = {"context": ts.Context(pool), "recheck_cached_data": "open"}
    packed = (folder / PACKED).is_file()
    openers: dict[str, Callable[[], Leaf]] = {}
    for keys, kind in entries.items():
        if kind in _KINDS:
            name, stored = "/".join(map(str, keys)), ".".join(map(str, keys))
            kvstore = _packed(folder, stored) if packed else _apart(folder, stored)
            spec = {"driver": driver, "kvstore": kvstore, **fill, **kept}
            openers[name] = _opener(folder, name, spec, error)
    return Leaves(openers)


def _opener(folder: Path, *args: Any) -> Callable[[], Leaf]:
    return lambda: opened(folder, *args)


def _packed(folder: Path, stored: str) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{folder.absolute()}/"}
    return {"driver": "ocdbt", "base": base, "path": f"{stored}/"}


def _apart(folder: Path, stored: str) -> dict[str, Any]:
    return {"driver": "file", "path": f"{remote.below(folder, stored).absolute()}/"}


def write(folder: Path, tree: Mapping[str, Leaf], dtype: Any) -> str:
    """Writes arrays as a tree that Orbax restores.

    Args:
      folder: to be made.
      tree: by ``/``-joined path.
      dtype: of all.

    Returns:
      The fingerprint of what was written; see `leaves.fingerprint`.

    Raises:
      OSError: where it cannot be written.
    """
    folder.mkdir(parents=True)
    digest = hashlib.sha256()

    def seen(block: np.ndarray) -> None:
        values = block.astype(np.float32, copy=False)
        digest.update(values.reshape(-1).view(np.uint8))

    described = {}
    with Queue() as queue:
        for path, leaf in sorted(tree.items()):
            digest.update(path.encode())
            keys = tuple(path.split("/"))
            queue.write(_packed(folder, ".".join(keys)), leaf, dtype, _ZSTD, seen)
            described[str(keys)] = {
                "key_metadata": [{"key": k, "key_type": _KEY_OF_DICT} for k in keys],
                "value_metadata": {
                    "value_type": "np.ndarray",
                    "skip_deserialize": False,
                },
            }
    metadata = {
        "tree_metadata": described,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    write_atomically(folder / METADATA, json.dumps(metadata))
    return digest.hexdigest()
