"""Files cut into pieces that can be read apart, and give the rows of the whole.

JSON Lines are cut by bytes wherever the size says, also inside a line: a line belongs
to the piece that holds its first byte. Parquet is cut into its row groups. Packed JSON
Lines cannot be entered in the middle and stay whole. What a row is called by, its line
number, is found again from how many lines the pieces before hold.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from jaxalign.data.jsonl import parse_lines, read_jsonl
from jaxalign.prepare.sources import RawRow, read_parquet

# Some seconds of tokenising: small enough to share out evenly among many workers,
# large enough that starting on one costs nothing beside it.
PIECE_BYTES = 16 * 2**20
_LINES = (".jsonl", ".json", ".ndjson")
_BLOCK = 2**20


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive rows of one file.

    Attributes:
      file: its path.
      start: the first byte of JSON Lines, the first row group of Parquet.
      stop: the first that is not in it; None stands for the end of a packed file.
    """

    file: str
    start: int
    stop: int | None


def cut(files: Iterable[pathlib.Path], size: int | None = None) -> list[Piece]:
    """The pieces of files, in order.

    Args:
      files: ``.jsonl``, ``.jsonl.gz`` (or ``.json``, ``.ndjson``) and ``.parquet``.
      size: bytes of a piece of JSON Lines; None: ``PIECE_BYTES``.

    Raises:
      ValueError: for a file of another kind.

    Example::

        pieces = cut([pathlib.Path("rows.jsonl")])
        before = 0
        for piece in pieces:
            for file, line, row in rows(piece, before):
                ...
            before += count(piece)
    """
    size = size or PIECE_BYTES
    found = []
    for path in files:
        file = str(path)
        if path.suffix == ".gz":
            found.append(Piece(file, 0, None))
        elif path.suffix == ".parquet":
            groups = _parquet_metadata(file).num_row_groups
            found += [Piece(file, i, i + 1) for i in range(groups)]
        elif path.suffix in _LINES:
            end = path.stat().st_size
            found += [Piece(file, i, min(i + size, end)) for i in range(0, end, size)]
        else:
            raise ValueError(
                f"{file} cannot be prepared in pieces: expected .jsonl, .jsonl.gz or "
                ".parquet, got another kind. Leave out beam_options, or convert it."
            )
    return found


def count(piece: Piece) -> int:
    """What a piece adds to the numbers of the rows after it in its file.

    Of Parquet its rows, of JSON Lines the newlines from the byte before it to the one
    before its last: the sum over all pieces before one is how many lines end before the
    line that holds the byte in front of it.
    """
    if piece.stop is None:
        return 0
    if piece.file.endswith(".parquet"):
        metadata = _parquet_metadata(piece.file)
        return metadata.row_group(piece.start).num_rows
    newlines = 0
    with open(piece.file, "rb") as file:
        start = max(piece.start - 1, 0)
        file.seek(start)
        left = piece.stop - 1 - start
        while left > 0 and (block := file.read(min(left, _BLOCK))):
            newlines += block.count(b"\n")
            left -= len(block)
    return newlines


def rows(piece: Piece, before: int) -> Iterator[RawRow]:
    """The rows of a piece, as reading the whole file gives them.

    Args:
      before: the sum of :func:`count` over the pieces of its file before it.
    """
    if piece.stop is None:
        numbered: Iterator[tuple[int, Any]] = read_jsonl(piece.file)
    elif piece.file.endswith(".parquet"):
        groups = range(piece.start, piece.stop)
        numbered = read_parquet(piece.file, list(groups), before)
    else:
        numbered = _read_range(piece, before)
    for line, row in numbered:
        yield piece.file, line, row


def _read_range(piece: Piece, before: int) -> Iterator[tuple[int, Any]]:
    last = 0

    def lines() -> Iterator[tuple[int, bytes]]:
        """The piece's lines, and where the last is blank those up to one that is not.

        Whether a blank line is a row depends on whether anything follows it.
        """
        nonlocal last
        with open(piece.file, "rb") as file:
            number, position = before, 0
            if piece.start:
                # The line in progress is the piece's before; it may end right here.
                file.seek(piece.start - 1)
                position = piece.start - 1 + len(file.readline())
                number += 1
            blank = False
            for line in file:
                inside = position < piece.stop
                if not inside and not blank:
                    return
                number += 1
                position += len(line)
                last = number if inside else last
                blank = not line.strip()
                yield number, line

    for number, row in parse_lines(piece.file, lines()):
        if number > last:
            return
        yield number, row


def _parquet_metadata(file: str) -> Any:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as opened:
        return opened.metadata
