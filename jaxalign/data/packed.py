"""Lines of files of rows, unpacked on the way: plain, gzip and Zstandard."""

from __future__ import annotations

import gzip
import io
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from jaxalign import remote

# How packed files begin, by what their names end in; the format's name.
_BEGINS = {
    ".gz": (b"\x1f\x8b", "gzip"),
    ".zst": (b"\x28\xb5\x2f\xfd", "Zstandard"),
}
PACKED = tuple(_BEGINS)
# Unpacked at a time: a few bytes may stand for many.
_CHUNK = 2**13


class _Damaged(Exception):
    """What the unpacker says of bytes that are none of its own."""


def kind(path: str | pathlib.PurePath) -> str:
    """What a file's name ends in, the packing apart.

    >>> kind("part-0.jsonl.zst"), kind("rows.csv")
    ('.jsonl', '.csv')
    """
    name = pathlib.PurePath(path)
    return pathlib.PurePath(name.stem).suffix if name.suffix in PACKED else name.suffix


def check(path: str | pathlib.PurePath) -> pathlib.Path:
    """A local file for a path; refuses folders, and what cannot be unpacked here."""
    local = remote.copy(path)
    if local.is_dir():
        raise ValueError(
            f"{path} is a folder: name a data file in it, or where DATA is asked for "
            f"all of them with a glob, '{path}/*.jsonl'."
        )
    if local.suffix == ".zst":
        _zstandard(local)
    return local


def opened(local: pathlib.Path) -> BinaryIO:
    """The unpacked bytes of a local file."""
    if local.suffix == ".gz":
        return gzip.open(local, "rb")
    if local.suffix == ".zst":
        return io.BufferedReader(cast(Any, _Unpacked(local)))
    return open(local, "rb")


# What opening or reading a packed file raises where its bytes are at fault.
DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error, _Damaged)


def lines(name: str, local: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """``(number, line)`` of a file, which messages call ``name``.

    Raises:
      ValueError: with the line where packed data is cut or damaged.
    """
    number = 0
    try:
        with opened(local) as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except DAMAGE as error:
        begins, packing = _BEGINS[local.suffix]
        what = f"the {packing} data is cut or damaged ({error}): copy or pack it again"
        with open(local, "rb") as file:
            if file.read(len(begins)) != begins:
                what = (
                    f"this is no {packing} file: take {local.suffix} off its name, or "
                    "pack it"
                )
        raise ValueError(f"{name}:{number + 1}: {what}.") from None


class _Unpacked(io.RawIOBase):
    """The content of a Zstandard file, which may be several frames."""

    def __init__(self, path: pathlib.Path):
        self._library = _zstandard(path)
        self._file = open(path, "rb")
        self._frame: Any = None
        self._packed = self._ready = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(_CHUNK)
            if not self._packed:
                # The library takes the end of a file for the end of its frame.
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(self._packed)
            except self._library.ZstdError as error:
                raise _Damaged(str(error)) from None
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _zstandard(path: pathlib.Path) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(
            f"{path} is packed with Zstandard, which needs a package that is not "
            "installed here: pip install 'jaxalign[zstd]'. Or unpack it: zstd -d "
            f"{path.name}."
        ) from error
    return zstandard
