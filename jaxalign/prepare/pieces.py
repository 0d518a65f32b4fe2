"""Files cut into pieces that can be read apart, and give the rows of the whole.

JSON Lines are cut behind a line that is not blank: whether a blank line is a row
depends on what follows it. Parquet is cut into its row groups. Packed files and tables,
whose cells may hold line breaks, cannot be entered in the middle and stay whole.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator

from jaxalign.data import packed
from jaxalign.data.jsonl import parse_lines
from jaxalign.data.tables import DELIMITERS
from jaxalign.prepare.sources import RawRow, read_parquet, reader

# Some seconds of tokenising: small enough to share out evenly among many workers,
# large enough that starting on one costs nothing beside it.
PIECE_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive rows of one file.

    Attributes:
      file: its path.
      start: the first byte of JSON Lines, the first row group of Parquet.
      stop: the first that is not in it; None stands for the end of a file that is
        read as a whole.
      before: how many lines of the file, or rows of Parquet, stand before it.
    """

    file: str
    start: int
    stop: int | None
    before: int = 0


def cut(files: Iterable[pathlib.Path], size: int | None = None) -> Iterator[Piece]:
    """The pieces of files, in order; JSON Lines are read once to count their lines.

    Args:
      files: JSON Lines, CSV and TSV, each packed or not, and ``.parquet``.
      size: bytes of a piece of JSON Lines at least; None: ``PIECE_BYTES``.

    Raises:
      ValueError: for a file of another kind.
    """
    for path in files:
        table = packed.kind(path).lower() in DELIMITERS
        if table or path.suffix in packed.PACKED:
            yield Piece(str(path), 0, None)
        elif path.suffix == ".parquet":
            yield from _row_groups(str(path))
        elif path.suffix in (".jsonl", ".json", ".ndjson"):
            yield from _ranges(str(path), size or PIECE_BYTES)
        else:
            raise ValueError(
                f"{path} cannot be prepared in pieces: expected .jsonl, .csv, .tsv "
                "(also .gz, .zst) or .parquet, got another kind. Leave out "
                "beam_options, or convert it."
            )


def _row_groups(file: str) -> Iterator[Piece]:
    import pyarrow.parquet

    before = 0
    with pyarrow.parquet.ParquetFile(file) as opened:
        for i in range(opened.metadata.num_row_groups):
            yield Piece(file, i, i + 1, before)
            before += opened.metadata.row_group(i).num_rows


def _ranges(file: str, size: int) -> Iterator[Piece]:
    start = stop = before = 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            stop += len(line)
            if stop - start >= size and line.strip():
                yield Piece(file, start, stop, before)
                start, before = stop, number
    if stop > start:
        yield Piece(file, start, stop, before)


def rows(piece: Piece) -> Iterator[RawRow]:
    """The rows of a piece, as reading the whole file gives them."""
    if piece.stop is None:
        numbered = reader(piece.file)(piece.file)
    elif piece.file.endswith(".parquet"):
        numbered = read_parquet(piece.file, [piece.start], piece.before)
    else:
        numbered = parse_lines(piece.file, _lines(piece))
    for line, row in numbered:
        yield piece.file, line, row


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    with open(piece.file, "rb") as file:
        position = file.seek(piece.start)
        for number, line in enumerate(file, start=piece.before + 1):
            yield number, line
            position += len(line)
            if position >= piece.stop:
                return
