"""T5X checkpoints as arrays by name, each opened when it is looked at.

See `jaxalign.interop.t5x_formats` for the formats, `t5x_leaves` for reading by blocks.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from jaxalign import remote
from jaxalign.interop import leaves as leaf_views
from jaxalign.interop import t5x_formats, t5x_msgpack
from jaxalign.interop.leaves import Leaf
from jaxalign.interop.t5x_formats import MESH_TF, ORBAX, Found, T5XError, detect

_VERSIONS = (2, 3)  # 2 keeps bfloat16 as uint16 in zarr
_NO_FILL = {"fill_missing_data_reads": False}  # a lost chunk is an error, not zeros


class Leaves(Mapping[str, Leaf]):
    """The arrays of a checkpoint by name; each is opened when it is looked at."""

    def __init__(self, openers: Mapping[str, Callable[[], Leaf]]):
        self._openers, self._open = dict(openers), {}

    def __getitem__(self, name: str) -> Leaf:
        if name not in self._open:
            self._open[name] = self._openers[name]()
        return self._open[name]

    def __contains__(self, name: object) -> bool:
        return name in self._openers

    def __iter__(self) -> Iterator[str]:
        return iter(self._openers)

    def __len__(self) -> int:
        return len(self._openers)


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
    openers = _orbax(found) if found.format == ORBAX else _flax(found)
    if not any(name.startswith("target/") for name in openers):
        raise T5XError(f"{found.path} holds no parameters; its arrays: {[*openers]}.")
    return Checkpoint(found, Leaves(openers))


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
    leaf = _zarr(folder, name, {"driver": "zarr", "kvstore": kvstore, **_NO_FILL})
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


def _orbax(found: Found) -> dict[str, Callable[[], Leaf]]:
    folder = found.file.parent
    try:
        metadata = json.loads(found.file.read_text("utf-8"))
        entries = {
            ast.literal_eval(key): entry["value_metadata"]["value_type"]
            for key, entry in metadata["tree_metadata"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, SyntaxError) as error:
        raise T5XError(
            f"{found.file} is not readable as Orbax's description of a checkpoint "
            f"({type(error).__name__}: {error}). Copy the checkpoint again."
        ) from error
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    # Older Orbax leaves out what equals the fill value.
    no_fill = metadata.get("store_array_data_equal_to_fill_value", False)
    packed = (folder / "manifest.ocdbt").is_file()
    openers: dict[str, Callable[[], Leaf]] = {}
    for keys, kind in entries.items():
        name, stored = "/".join(map(str, keys)), ".".join(map(str, keys))
        kvstore: dict[str, Any] = {"driver": "file"}
        if packed:
            base = f"{folder.absolute()}/"
            kvstore = {"driver": "ocdbt", "base": {**kvstore, "path": base}}
            kvstore["path"] = f"{stored}/"
        else:
            kvstore["path"] = f"{remote.below(folder, stored).absolute()}/"
        spec = {"driver": driver, "kvstore": kvstore, **(_NO_FILL if no_fill else {})}
        if kind in ("jax.Array", "np.ndarray", "scalar"):
            openers[name] = _opener(_zarr, folder, name, spec)
    return openers


def _zarr(folder: Path, name: str, spec: dict[str, Any]) -> Leaf:
    def damaged(error: Exception) -> T5XError:
        said = str(error).split(" [", 1)[0].splitlines()[0]
        return T5XError(
            f"{folder}: the array {name!r} cannot be read: the checkpoint is damaged "
            f"or incomplete ({said}). Copy it again."
        )

    try:
        store = ts.open(spec, open=True, read=True).result()
    except (ValueError, OSError) as error:
        raise damaged(error) from error

    def block(index: leaf_views.Index) -> np.ndarray:
        try:
            return store[index].read().result()
        except (ValueError, OSError) as error:
            raise damaged(error) from error

    return Leaf(tuple(store.shape), store.dtype.numpy_dtype, block, (name,))
