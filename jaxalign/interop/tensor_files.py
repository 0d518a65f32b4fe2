"""safetensors files, read in parts and written tensor by tensor.

The format is a header's length (8 bytes, little-endian), the header (JSON: dtype, shape
and place of each tensor) and the tensors' bytes without gaps. The package of that name
maps a whole file into memory and writes from arrays that are all there; here memory
holds one tensor at most.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxalign import remote
from jaxalign.interop.leaves import Index, Leaf

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(jnp.bfloat16),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # the format's own limit
# What holds weights as pickles, or for another framework.
_OTHER = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")


class DamagedFolderError(ValueError):
    """Files that are not what their own headers say."""


def read_folder(folder: Path) -> dict[str, Leaf]:
    """The tensors of a folder by name; headers are read, and checked against the files.

    Args:
      folder: with ``model.safetensors.index.json`` and the files that it names, or one
        file.

    Raises:
      FileNotFoundError: no such file. Pickles are named and never opened.
      DamagedFolderError: a file cut short, overwritten, or not as the index says.
      ValueError: an index that names a file outside the folder.
    """
    index = folder / INDEX
    if not index.is_file():
        return read_file(_only_file(folder))
    named = read_json(index).get("weight_map")
    if not isinstance(named, Mapping) or not named:
        raise DamagedFolderError(f"{index} must hold a weight_map of tensors to files.")
    paths = {name: remote.below(folder, name) for name in set(named.values())}
    missing = sorted(name for name, path in paths.items() if not path.is_file())
    if missing:
        raise FileNotFoundError(
            f"{index} names {missing[0]!r}, which is not in the folder ({len(missing)} "
            f"of {len(paths)} files are missing): download the folder again."
        )
    files = {name: read_file(path) for name, path in paths.items()}
    for tensor, name in named.items():
        if tensor not in files[name]:
            raise DamagedFolderError(
                f"{index} has {tensor!r} in {name}, which lacks it."
            )
    return {tensor: files[name][tensor] for tensor, name in named.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a folder; `DamagedFolderError` where it is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise DamagedFolderError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DamagedFolderError(f"{path} must hold a JSON object.")
    return found


def _only_file(folder: Path) -> Path:
    if (folder / SINGLE).is_file():
        return folder / SINGLE
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise FileNotFoundError(
            f"{folder} has {len(found)} *.safetensors files and neither {SINGLE} nor "
            f"{INDEX}, which say what belongs together."
        )
    others = sorted(p.name for pattern in _OTHER for p in folder.glob(pattern))
    if others:
        raise FileNotFoundError(
            f"{folder} has no *.safetensors file, only {others[0]}. Pickles can run "
            "code and are not opened; where you trust this one, convert it with "
            "transformers: AutoModelForSeq2SeqLM.from_pretrained(folder)"
            ".save_pretrained(new_folder)."
        )
    raise FileNotFoundError(f"{folder} has no *.safetensors file.")


class _Place(NamedTuple):
    path: Path
    begin: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, at: Index) -> np.ndarray:
        """Reads the rows that an index touches, in one piece, and cuts those."""
        if not self.shape:
            return self._items(0, 1).reshape(())
        first, last, _ = at[0].indices(self.shape[0])
        width = math.prod(self.shape[1:])
        rows = self._items(first * width, max(last - first, 0) * width)
        return rows.reshape(-1, *self.shape[1:])[(slice(None), *at[1:])]

    def _items(self, first: int, count: int) -> np.ndarray:
        offset = self.begin + first * self.dtype.itemsize
        items = np.fromfile(self.path, self.dtype, count, offset=offset)
        if items.size != count:  # it has shrunk since its header was read
            raise DamagedFolderError(f"{self.path} ends too early.")
        return items


def read_file(path: Path) -> dict[str, Leaf]:
    """The tensors of one file by name; see `read_folder`."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise DamagedFolderError(
                f"{path} is not a safetensors file, or cut off within its header: "
                f"{size} bytes, of which the header would be {length}."
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        places = sorted(
            (*map(int, entry["data_offsets"]), name, str(entry["dtype"]),
             tuple(map(int, entry["shape"])))
            for name, entry in header.items()
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedFolderError(f"{path}: its header is damaged ({error}).") from error
    found, end = {}, 0
    for begin, stop, name, code, shape in places:
        if code not in _DTYPES:
            raise DamagedFolderError(
                f"{path}: {name!r} has the dtype {code}; expected one of "
                f"{sorted(_DTYPES)} (quantised weights are not read)."
            )
        dtype = _DTYPES[code]
        if begin != end or min(shape, default=0) < 0:
            raise DamagedFolderError(f"{path}: {name!r} does not begin at byte {end}.")
        if stop - begin != math.prod(shape) * dtype.itemsize:
            raise DamagedFolderError(
                f"{path}: {name!r} of shape {shape} has {stop - begin} bytes."
            )
        place, end = _Place(path, 8 + length + begin, shape, dtype), stop
        found[name] = Leaf(shape, dtype, place.read, (name,))
    if size != 8 + length + end:
        raise DamagedFolderError(
            f"{path} has {size:,} bytes; its header speaks of {8 + length + end:,}: "
            "it was cut off or changed. Download it again."
        )
    return found


def write_folder(
    folder: Path, tensors: Mapping[str, Leaf], dtype: Any = None, shard: int = 5 << 30
) -> None:
    """Writes tensors one after the other, into one file or several with an index.

    Args:
      folder: exists.
      tensors: by name, in the order in which they are read.
      dtype: of all; None keeps each one's own.
      shard: bytes of a file before another is begun.
    """
    dtypes = {n: np.dtype(dtype or leaf.dtype) for n, leaf in tensors.items()}
    sizes = {n: math.prod(x.shape) * dtypes[n].itemsize for n, x in tensors.items()}
    files: list[list[str]] = [[]]
    for name in tensors:
        if files[-1] and sum(sizes[n] for n in files[-1]) + sizes[name] > shard:
            files.append([])
        files[-1].append(name)
    names = [SINGLE]
    if len(files) > 1:
        count = f"{len(files):05d}"
        names = [f"model-{i + 1:05d}-of-{count}.safetensors" for i in range(len(files))]
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {
                tensor: name
                for name, held in zip(names, files, strict=True)
                for tensor in held
            },
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    for name, held in zip(names, files, strict=True):
        _write_file(folder / name, ((n, tensors[n], dtypes[n]) for n in held))


def _write_file(path: Path, tensors: Iterable[tuple[str, Leaf, np.dtype]]) -> None:
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, leaf, dtype in tensors:
        begin, end = end, end + math.prod(leaf.shape) * dtype.itemsize
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(leaf.shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for _, leaf, dtype in tensors:
            leaf.read().astype(dtype, copy=False).tofile(file)
        file.flush()
        os.fsync(file.fileno())
