"""T5X checkpoints as arrays by name, each opened when it is looked at.

See `jaxalign.interop.t5x_formats` for the formats, `leaves` for reading by blocks.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxalign import remote
from jaxalign.interop import leaves as leaf_views
from jaxalign.interop import orbax_items, t5x_formats, t5x_msgpack
from jaxalign.interop.arrays import NO_FILL, Leaves, opened
from jaxalign.interop.leaves import Leaf
from jaxalign.interop.t5x_formats import MESH_TF, ORBAX, Found, T5XError, detect

_VERSIONS = (2, 3)  # 2 keeps bfloat16 as uint16 in zarr


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
      found: its format and place.
      leaves: all of its arrays, by T5X's names (``target/encoder/...``).
    """

    found: Found
    leaves: Leaves = dataclasses.field(repr=False)

    @property
    def step(self) -> int | None:
        """How many steps it was trained for; None where it does not say."""
        if "state/step" in self.leaves:
            return int(self.leaves["state/step"].read())
        named = t5x_formats.STEP.fullmatch(self.found.path.name)
        return int(named[1]) if named else None

    def param_states(self) -> dict[str, dict[str, Leaf]]:
        """What the optimizer keeps of each parameter, by its name and T5X's slot.

        Adafactor's slots are ``m``, ``v``, ``v_row`` and ``v_col``; one that is not in
        use holds a single 0.
        """
        prefix, states = "state/param_states/", {}
        for name in self.leaves:
            if name.startswith(prefix):
                parameter, _, slot = name.removeprefix(prefix).rpartition("/")
                states.setdefault(parameter, {})[slot] = self.leaves[name]
        return states


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a checkpoint of any of T5X's formats; see `t5x_formats.detect` for `path`.

    Raises:
      FileNotFoundError: nothing is there, or nothing of T5X's: the message says what.
      T5XError: it is of a version or kind that is not read, or is damaged.
    """
    found = detect(path)
    if found is None:
        raise FileNotFoundError(
            f"No T5X checkpoint at {path}: expected a folder with the msgpack file "
            "'checkpoint' or Orbax's folder 'state', or a folder of checkpoint_<step>; "
            f"{t5x_formats.contents(Path(path))}."
        )
    if found.format == MESH_TF:
        raise T5XError(
            f"{found.path} is a checkpoint of Mesh TensorFlow, not of T5X. Convert it "
            "with T5X's convert_tf_checkpoint, or take the one that T5X's list of "
            "public models names."
        )
    leaves = _arrays(found)
    if not any(name.startswith("target/") for name in leaves):
        raise T5XError(f"{found.path} holds no parameters; its arrays: {[*leaves]}.")
    return Checkpoint(found, leaves)


def _arrays(found: Found) -> Leaves:
    if found.format == ORBAX:
        return orbax_items.leaves(found.file.parent, T5XError)
    return Leaves(_flax(found))


def _flax(found: Found) -> dict[str, Callable[[], Leaf]]:
    """The arrays of a msgpack file and of the zarr folders that it names."""
    tree = t5x_msgpack.load(found.file)
    version = tree.get("version")
    if version is not None and version not in _VERSIONS:
        raise T5XError(
            f"{found.file} says version {version!r}; known are {list(_VERSIONS)}. A "
            "newer T5X may have written it: save it again in Orbax's format."
        )
    for key in ("optimizer", "_optimizer"):
        tree = tree.get(key, tree)
    if not isinstance(tree, dict) or "target" not in tree:
        kind = sorted(tree) if isinstance(tree, dict) else type(tree).__name__
        raise T5XError(f"{found.file} must hold a tree with 'target', got {kind}.")
    openers: dict[str, Callable[[], Leaf]] = {}
    folder = found.file.parent
    for name, value in t5x_formats.flatten(tree).items():
        if t5x_formats.is_placeholder(value):  # Orbax's, before it wrote _METADATA
            path = value.removeprefix(t5x_formats.PLACEHOLDER)
            value = {"driver": "zarr", "kvstore": {"path": path}, "metadata": {}}
        if t5x_formats.is_spec(value):
            openers[name] = _opener(_beside, folder, name, value, version == 2)
        elif isinstance(value, int | float) or hasattr(value, "shape"):
            array = value if hasattr(value, "shape") else np.asarray(value)
            openers[name] = _opener(leaf_views.of_array, array, name)
    return openers


def _opener(make: Callable[..., Leaf], *args: Any) -> Callable[[], Leaf]:
    return lambda: make(*args)


def _beside(folder: Path, name: str, spec: Mapping[str, Any], as_uint16: bool) -> Leaf:
    """The zarr folder that a specification names, wherever it was written.

    Its driver may be that of another file system and its path is relative; chunks and
    compressor are what the folder itself says.
    """
    store = spec["kvstore"] if isinstance(spec["kvstore"], Mapping) else {}
    path = store.get("path") or spec.get("path")
    if spec["driver"] != "zarr" or not isinstance(path, str):
        raise T5XError(
            f"{folder}: {name!r} must be a zarr folder, got the specification {spec}."
        )
    where = remote.below(folder, path.rstrip("/"))
    if not (where / ".zarray").is_file():
        raise T5XError(
            f"{folder} lacks the array {name!r}: {where.name}/.zarray is not there. "
            "Was the whole folder copied, hidden files too?"
        )
    kvstore = {"driver": "file", "path": f"{where.absolute()}/"}
    where_it_is = {"driver": "zarr", "kvstore": kvstore, **NO_FILL}
    leaf = opened(folder, name, where_it_is, T5XError)
    shape = spec["metadata"].get("shape", leaf.shape)
    if tuple(shape) != leaf.shape:
        raise T5XError(
            f"{folder}: 'checkpoint' says that {name!r} has shape {tuple(shape)}, but "
            f"{where.name} has {leaf.shape}. They are of two checkpoints."
        )
    if as_uint16 and leaf.dtype == np.uint16:
        whole, bits = jnp.dtype("bfloat16"), leaf.block
        return dataclasses.replace(
            leaf, dtype=whole, block=lambda index: bits(index).view(whole)
        )
    return leaf
