"""T5X checkpoints written: its legacy format, which every version of T5X restores.

A folder ``checkpoint_<step>`` with a zarr folder for each parameter and the msgpack
file ``checkpoint``, version 3; see `jaxalign.interop.t5x_formats`. It is made under
another name and renamed when all is on disk: what is interrupted never looks whole.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from flax import serialization, traverse_util

from jaxalign import remote
from jaxalign.interop.t5x_leaves import Leaf
from jaxalign.models.config import T5Shape
from jaxalign.models.stacks import PARAM_SCAN_AXIS

_VERSION = 3
_CHUNK_BYTES = 64 << 20  # as T5X's, which it reads partitioned
_DTYPES = ("float32", "bfloat16")
_STACK = re.compile(r"(encoder|decoder)/\1/(.+)")
_SLOTS = ("m", "v", "v_col", "v_row")
_MIN_DIM_TO_FACTOR = 128  # of T5X's Adafactor

Block = Callable[[slice], np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Array:
    """A parameter to be written, by rows of its first axis."""

    shape: tuple[int, ...]
    rows: Block


def save(
    folder: str | os.PathLike[str],
    params: Mapping[str, Any],
    *,
    step: int = 0,
    dtype: Any = "float32",
    shape: T5Shape | None = None,
    param_states: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Writes parameters as a checkpoint that T5X's own loaders restore.

    One parameter at a time is in the host's memory. Arrays that lie on several
    processes cannot be written from one of them.

    Args:
      folder: T5X's model directory; the checkpoint becomes ``checkpoint_<step>`` there.
      params: nested or flat by path, in either layout of layers. A leaf is an array, or
        anything with ``shape`` and ``read(index)`` such as a leaf of another
        checkpoint. What is written are T5X's names with layers apart, those of its
        ``examples/t5``.
      step: how many steps they were trained for.
      dtype: of the parameters, ``float32`` or ``bfloat16``.
      shape: of the network; written as ``config.gin`` into the checkpoint, where
        `t5x_network.describe` finds it.
      param_states: what T5X's optimizer keeps, by path and slot. By default Adafactor's
        as it begins, zeros, without which T5X's trainer restores nothing.

    Returns:
      The checkpoint's folder.

    Raises:
      FileExistsError: there is a checkpoint of that step.
      OSError: the folder cannot be written; nothing is left in it.
      ValueError: another dtype, or parameters that this process does not have.
    """
    if jnp.dtype(dtype).name not in _DTYPES:
        raise ValueError(f"dtype must be one of {list(_DTYPES)}, got {dtype!r}.")
    arrays = dict(_arrays(params))
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
        _write(temporary, arrays, step, jnp.dtype(dtype), shape, param_states)
        os.rename(temporary, final)
        _sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _write(
    folder: Path,
    arrays: Mapping[str, _Array],
    step: int,
    dtype: np.dtype,
    shape: T5Shape | None,
    param_states: Mapping[str, Mapping[str, Any]] | None,
) -> None:
    target = {path: _zarr(folder, path, a, dtype) for path, a in arrays.items()}
    if param_states is None:
        states = {path: _fresh(array.shape) for path, array in arrays.items()}
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


def _arrays(params: Mapping[str, Any]) -> Iterator[tuple[str, _Array]]:
    """Every parameter, layers apart, by T5X's name."""
    for path, leaf in traverse_util.flatten_dict(dict(params), sep="/").items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ValueError(
                f"{path} lies on several processes; write a checkpoint of the run, and "
                "convert that in one process."
            )
        match = _STACK.fullmatch(path)
        if not match:
            yield path, _Array(tuple(leaf.shape), _rows(leaf))
            continue
        stack, rest = match.groups()
        axis = PARAM_SCAN_AXIS
        shape = (*leaf.shape[:axis], *leaf.shape[axis + 1 :])
        for number in range(leaf.shape[axis]):
            name = f"{stack}/layers_{number}/{rest}"
            yield name, _Array(shape, _rows(leaf, number))


def _rows(leaf: Any, number: int | None = None) -> Block:
    """Reads rows of an array, or those of one of the layers stacked in it."""

    def rows(part: slice) -> np.ndarray:
        if hasattr(leaf, "read"):
            index = [slice(0, size) for size in leaf.shape]
            index[0] = part
            if number is not None:
                index[PARAM_SCAN_AXIS] = slice(number, number + 1)
            found = leaf.read(tuple(index))
        else:
            middle = slice(None) if number is None else slice(number, number + 1)
            # Of an array on devices, only the part that is written comes to the host.
            found = leaf[(part, middle)] if len(leaf.shape) > 1 else leaf[part]
        found = np.asarray(found)
        return found if number is None else found.squeeze(PARAM_SCAN_AXIS)

    return rows


def _zarr(folder: Path, path: str, array: _Array, dtype: np.dtype) -> dict[str, Any]:
    """Writes a parameter, and returns the specification that stands for it."""
    stored = "target." + path.replace("/", ".")
    chunks = _chunks(array.shape, _CHUNK_BYTES // dtype.itemsize)
    metadata = {
        "shape": list(array.shape),
        "chunks": list(chunks),
        "compressor": {"id": "gzip", "level": 1},
    }
    spec = {"driver": "zarr", "dtype": dtype.name, "metadata": metadata}
    where = {"driver": "file", "path": f"{remote.below(folder, stored)}/"}
    try:
        store = ts.open({**spec, "kvstore": where}, create=True, open=True).result()
        for start in range(0, array.shape[0], chunks[0]):
            part = slice(start, min(start + chunks[0], array.shape[0]))
            store[part].write(array.rows(part).astype(dtype, copy=False)).result()
    except ValueError as error:  # what TensorStore raises for a full disk, too
        raise OSError(f"{where['path']} cannot be written: {error}") from error
    return {**spec, "kvstore": {"driver": "file", "path": f"{stored}/"}}


def _chunks(shape: Sequence[int], elements: int) -> tuple[int, ...]:
    """The largest chunks of so many elements that divide a shape evenly."""
    chunks = list(shape)
    while math.prod(chunks) > elements:
        axis = max(range(len(chunks)), key=chunks.__getitem__)
        size = chunks[axis]
        chunks[axis] = next(n for n in range(size - 1, 0, -1) if size % n == 0)
    return tuple(chunks)


def _fresh(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Adafactor's slots of a parameter before its first step, as T5X lays them out."""
    slots = {slot: np.zeros(1, np.float32) for slot in _SLOTS}
    order = np.argsort(shape, kind="stable")
    if len(shape) < 2 or shape[order[-2]] < _MIN_DIM_TO_FACTOR:
        slots["v"] = np.zeros(shape, np.float32)
    else:
        slots["v_row"] = np.zeros(np.delete(shape, order[-1]), np.float32)
        slots["v_col"] = np.zeros(np.delete(shape, order[-2]), np.float32)
    return slots


def _slots(slots: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {
        slot: value.read() if isinstance(value, Leaf) else np.asarray(value)
        for slot, value in slots.items()
    }


def _gin(shape: T5Shape) -> str:
    """A network as T5X's model gin files say it."""
    fields = {field.name: getattr(shape, field.name) for field in _GIN_FIELDS}
    lines = ["from __gin__ import dynamic_registration", ""]
    lines += ["from t5x.examples.t5 import network", ""]
    lines += ["network.Transformer.config = @network.T5Config()", "network.T5Config:"]
    return "\n".join([*lines, *(f"  {k} = {v!r}" for k, v in fields.items()), ""])


# Fields of T5X's T5Config; it has constants where this one has more.
_GIN_FIELDS = [
    field
    for field in dataclasses.fields(T5Shape)
    if not field.name.startswith("relative_")
]


def _sync(folder: Path) -> None:
    """The names in a folder are on disk, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
