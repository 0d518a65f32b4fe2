"""T5X checkpoints written: its legacy format, which every version of T5X restores.

A folder ``checkpoint_<step>`` with a zarr folder for each parameter and the msgpack
file ``checkpoint``, version 3; see `jaxalign.interop.t5x_formats`. It is made under
another name and renamed when all is on disk: what is interrupted never looks whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import serialization, traverse_util

from jaxalign import remote
from jaxalign.interop import t5x_layouts, t5x_slots
from jaxalign.interop.arrays import Queue
from jaxalign.interop.leaves import Leaf
from jaxalign.models.config import T5Shape
from jaxalign.vocabularies import Vocabulary

VOCABULARY = "vocabulary.json"
_VERSION = 3
_GZIP = {"id": "gzip", "level": 1}
_DTYPES = ("float32", "bfloat16")
_CONSTANTS = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}


def save(
    folder: str | os.PathLike[str],
    params: Mapping[str, Any],
    *,
    step: int = 0,
    dtype: Any = "float32",
    shape: T5Shape | None = None,
    param_states: Mapping[str, Mapping[str, Any]] | None = None,
    vocabulary: Vocabulary | None = None,
) -> Path:
    """Writes parameters as a checkpoint that T5X's own loaders restore.

    A few parameters at a time are in the host's memory. Arrays that lie on several
    processes cannot be written from one of them.

    Args:
      folder: T5X's model directory; the checkpoint becomes ``checkpoint_<step>`` there.
      params: nested or flat by path, in either layout of layers. A leaf is an array, or
        anything with ``shape``, ``dtype`` and ``read(index)``, such as a leaf of
        another checkpoint. Written are the names of T5X's ``examples/t5``, or those of
        its ``examples/scalable_t5`` where every layer has a position bias.
      step: how many steps they were trained for.
      dtype: of the parameters, ``float32`` or ``bfloat16``.
      shape: of the network; written as ``config.gin`` into the checkpoint, where
        `t5x_network.describe` finds it.
      param_states: what T5X's optimizer keeps, by path and slot. By default Adafactor's
        as it begins, zeros, without which T5X's trainer restores nothing.
      vocabulary: written beside the arrays, with its description as `VOCABULARY`. T5X
        has no place for it: name the file in T5X's own gin.

    Returns:
      The checkpoint's folder.

    Raises:
      FileExistsError: there is a checkpoint of that step.
      OSError: the folder cannot be written; nothing is left in it.
      ValueError: another dtype, a network that T5X cannot compute, or parameters that
        this process does not have.
    """
    if jnp.dtype(dtype).name not in _DTYPES:
        raise ValueError(f"dtype must be one of {list(_DTYPES)}, got {dtype!r}.")
    if shape is not None:
        _check_constants(shape)
    arrays = t5x_layouts.written(params)
    if not arrays:
        raise ValueError("params must hold at least one parameter.")
    folder = remote.local_only(folder, "A T5X checkpoint").absolute()
    final = folder / f"checkpoint_{step}"
    if final.exists():
        raise FileExistsError(
            f"{final} exists; give another folder or step, or remove it."
        )
    temporary = final.with_name(f"{final.name}.tmp-{time.time_ns()}")
    try:
        temporary.mkdir(parents=True)
        if vocabulary is not None:
            text = json.dumps(vocabulary.to_json(), indent=1) + "\n"
            (temporary / VOCABULARY).write_text(text, "utf-8")
            vocabulary.save(temporary)
        _write(temporary, arrays, step, jnp.dtype(dtype), shape, param_states)
        os.rename(temporary, final)
        _sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _write(
    folder: Path,
    arrays: Mapping[str, Leaf],
    step: int,
    dtype: np.dtype,
    shape: T5Shape | None,
    param_states: Mapping[str, Mapping[str, Any]] | None,
) -> None:
    target = {}
    with Queue() as queue:
        for path, leaf in arrays.items():
            stored = "target." + path.replace("/", ".")
            where = f"{remote.below(folder, stored)}/"
            spec = queue.write({"driver": "file", "path": where}, leaf, dtype, _GZIP)
            target[path] = {**spec, "kvstore": {"driver": "file", "path": f"{stored}/"}}
    if param_states is None:
        states = {
            path: t5x_slots.fresh(path, leaf.shape) for path, leaf in arrays.items()
        }
    else:
        states = {path: _slots(slots) for path, slots in param_states.items()}
    tree = {
        "version": _VERSION,
        "optimizer": {
            "target": traverse_util.unflatten_dict(target, sep="/"),
            "state": {
                "step": np.asarray(step, np.int32),
                "param_states": traverse_util.unflatten_dict(states, sep="/"),
            },
        },
    }
    if shape is not None:
        (folder / "config.gin").write_text(_gin(shape), "utf-8")
    with open(folder / "checkpoint", "wb") as file:
        file.write(serialization.msgpack_serialize(tree))
        file.flush()
        os.fsync(file.fileno())
    _sync(folder)


def _slots(slots: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {
        slot: value.read() if isinstance(value, Leaf) else np.asarray(value)
        for slot, value in slots.items()
    }


def _check_constants(shape: T5Shape) -> None:
    """Refuses a network that T5X would compute as another one."""
    for field, value in _CONSTANTS.items():
        if getattr(shape, field) != value:
            raise ValueError(
                f"T5X's networks have {field}={value}, which no setting of theirs "
                f"changes; this one has {getattr(shape, field)}."
            )


def _gin(shape: T5Shape) -> str:
    """A network as T5X's model gin files say it."""
    fields = {
        field.name: getattr(shape, field.name)
        for field in dataclasses.fields(T5Shape)
        if field.name not in (*_CONSTANTS, "relative_bias_per_layer")
    }
    scanned = getattr(shape, "relative_bias_per_layer", False)
    package = "scalable_t5" if scanned else "t5"
    lines = ["from __gin__ import dynamic_registration", ""]
    lines += [f"from t5x.examples.{package} import network", ""]
    lines += ["network.Transformer.config = @network.T5Config()", "network.T5Config:"]
    lines += [f"  {name} = {value!r}" for name, value in fields.items()]
    return "\n".join([*lines, *["  scan_layers = True"] * scanned, ""])


def _sync(folder: Path) -> None:
    """The names in a folder are on disk, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
