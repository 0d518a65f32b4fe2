"""Flax's msgpack files, whose arrays are left where they lie until they are read.

``flax.serialization`` unpacks a whole file at once. A T5X checkpoint of the oldest kind
is one such file with the whole model in it: here an array becomes a view of the
mapped file, and only the parts that are asked for are ever brought into memory.
"""

from __future__ import annotations

import gzip
import math
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

GZIP = b"\x1f\x8b"

_ARRAY, _SCALAR = 1, 3  # extension types of flax.serialization
_CHUNKED = "__msgpack_chunked_array__"

# The first byte of a value -> (kind, struct format of its length or value).
_TYPES = {
    0xC4: ("bin", ">B"),
    0xC5: ("bin", ">H"),
    0xC6: ("bin", ">I"),
    0xC7: ("ext", ">B"),
    0xC8: ("ext", ">H"),
    0xC9: ("ext", ">I"),
    0xCA: ("number", ">f"),
    0xCB: ("number", ">d"),
    0xCC: ("number", ">B"),
    0xCD: ("number", ">H"),
    0xCE: ("number", ">I"),
    0xCF: ("number", ">Q"),
    0xD0: ("number", ">b"),
    0xD1: ("number", ">h"),
    0xD2: ("number", ">i"),
    0xD3: ("number", ">q"),
    0xD9: ("str", ">B"),
    0xDA: ("str", ">H"),
    0xDB: ("str", ">I"),
    0xDC: ("list", ">H"),
    0xDD: ("list", ">I"),
    0xDE: ("map", ">H"),
    0xDF: ("map", ">I"),
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_FIXED_EXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


class ChunkedArray:
    """An array that flax wrote in pieces, because it has more than 2**30 bytes."""

    def __init__(self, shape: tuple[int, ...], pieces: list[np.ndarray]):
        self.shape, self.pieces = shape, pieces
        self.dtype = pieces[0].dtype
        if sum(piece.size for piece in pieces) != math.prod(shape):
            raise ValueError(
                f"The pieces of an array of shape {shape} hold "
                f"{sum(piece.size for piece in pieces)} numbers."
            )

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """The part that slices name; rows of the first axis are gathered alone."""
        first, *rest = index
        start, stop, _ = first.indices(self.shape[0])
        width = math.prod(self.shape[1:])
        wanted, at, found = range(start * width, stop * width), 0, []
        for piece in self.pieces:
            low, high = max(wanted.start - at, 0), min(wanted.stop - at, piece.size)
            if low < high:
                found.append(piece.reshape(-1)[low:high])
            at += piece.size
        rows = np.concatenate(found) if found else np.empty(0, self.dtype)
        return rows.reshape(stop - start, *self.shape[1:])[(slice(None), *rest)]


def load(path: Path) -> Any:
    """The tree in a file; arrays are read-only views of the mapped file.

    A gzip'd file is unpacked into memory.

    Raises:
      ValueError: when the file is cut short or is not msgpack.
    """
    with open(path, "rb") as file:
        if file.read(2) == GZIP:
            file.seek(0)
            try:
                data: Any = gzip.decompress(file.read())
            except (EOFError, OSError) as error:
                raise ValueError(f"{path} is damaged: {error}") from error
        elif file.seek(0, 2) == 0:
            raise ValueError(f"{path} is empty; expected flax's msgpack.")
        else:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        reader = _Reader(memoryview(data))
        tree = reader.value()
        if reader.at != len(reader.data):
            raise ValueError(f"{len(reader.data) - reader.at} bytes follow the tree")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not the msgpack file that T5X writes, or is cut short "
            f"({error}). Copy it again."
        ) from error
    return tree


class _Reader:
    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def take(self, count: int) -> memoryview:
        found = self.data[self.at : self.at + count]
        if len(found) != count:
            raise ValueError(f"it ends at byte {len(self.data)} inside a value")
        self.at += count
        return found

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def value(self) -> Any:
        first = self.number(">B")
        if first in _CONSTANTS:
            return _CONSTANTS[first]
        if first < 0x80:
            return first
        if first >= 0xE0:
            return first - 0x100
        if first < 0x90:
            return self.map(first & 0x0F)
        if first < 0xA0:
            return [self.value() for _ in range(first & 0x0F)]
        if first < 0xC0:
            return str(self.take(first & 0x1F), "utf-8")
        if first in _FIXED_EXT:
            return self.extension(_FIXED_EXT[first])
        if first not in _TYPES:
            raise ValueError(f"byte {first:#x} begins no value")
        kind, form = _TYPES[first]
        count = self.number(form)
        if kind == "list":
            return [self.value() for _ in range(count)]
        return count if kind == "number" else self.of[kind](self, count)

    def map(self, count: int) -> Any:
        found = {}
        for _ in range(count):
            key = self.value()
            found[key if isinstance(key, str) else bytes(key).decode()] = self.value()
        return _chunked(found) if found.get(_CHUNKED) is True else found

    def text(self, count: int) -> str:
        return str(self.take(count), "utf-8")

    def extension(self, count: int) -> Any:
        kind = self.number(">b")
        inside = _Reader(self.take(count))
        if kind not in (_ARRAY, _SCALAR):
            raise ValueError(f"extension type {kind} is no array of flax's")
        shape, dtype, buffer = inside.value()
        name = dtype if isinstance(dtype, str) else bytes(dtype).decode()
        return np.frombuffer(buffer, jnp.dtype(name)).reshape(shape)

    of: dict[str, Callable[[_Reader, int], Any]] = {
        "map": map,
        "str": text,
        "bin": take,
        "ext": extension,
    }


def _chunked(tree: dict[str, Any]) -> ChunkedArray:
    """Flax writes lists as maps of their indices."""

    def ordered(found: dict[str, Any]) -> list[Any]:
        return [found[str(i)] for i in range(len(found))]

    shape, pieces = ordered(tree["shape"]), ordered(tree["chunks"])
    return ChunkedArray(tuple(int(size) for size in shape), pieces)
