"""Pieces of files, read apart, give the rows and numbers of the whole."""

import gzip
import json
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from jaxalign.data.jsonl import read_jsonl
from jaxalign.prepare import pieces, sources

LINES = st.one_of(
    st.sampled_from([b"", b" ", b"\r", b'{"a": 1}', b"{", b'{"a": "\xc3\xa9"}', b"[]"]),
    st.binary(max_size=12).map(lambda raw: raw.replace(b"\n", b"")),
)


def read_in_pieces(found):
    before = {}
    for piece in found:
        yield from pieces.rows(piece, before.get(piece.file, 0))
        before[piece.file] = before.get(piece.file, 0) + pieces.count(piece)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pieces")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(LINES, max_size=12), st.booleans(), st.data())
@example([b"", b"", b"", b'{"a": 1}', b"", b""], True, None)
@example([b"\xef\xbb\xbf{}", b"", b"{}", b"", b"", b"{}"], False, None)
def test_any_split_gives_the_lines_and_numbers_of_the_whole(folder, lines, ends, data):
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * ends)
    # Taken for another format, whole, before any line is read.
    assume(lines[:1] not in ([b"{"], [b"["]))
    expected = [(str(path), n, row) for n, row in read_jsonl(path)]
    size = path.stat().st_size
    assert list(read_in_pieces(pieces.cut([path], 1))) == expected
    if data is None or not size:
        return
    at = data.draw(st.sets(st.integers(1, size)))
    ends = [0, *sorted(at | {size})]
    found = [
        pieces.Piece(str(path), start, stop)
        for start, stop in zip(ends, ends[1:], strict=False)
    ]
    assert list(read_in_pieces(found)) == expected


def test_a_line_longer_than_pieces_and_blocks(folder, monkeypatch):
    monkeypatch.setattr(pieces, "_BLOCK", 7)
    path = folder / "long.jsonl"
    rows = [{"a": "x" * 100}, {"a": 1}, {"a": "y" * 500}, {"a": 2}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for size in (3, 10, 64, 1000):
        found = list(read_in_pieces(pieces.cut([path], size)))
        assert found == [(str(path), n, row) for n, row in enumerate(rows, start=1)]


def test_parquet_is_cut_into_row_groups_and_packed_files_stay_whole(folder):
    rows = [{"a": i, "b": [{"c": str(i)}]} for i in range(25)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "r.parquet", row_group_size=10)
    (folder / "r.jsonl.gz").write_bytes(
        gzip.compress(b"".join(json.dumps(row).encode() + b"\n\n" for row in rows))
    )
    (folder / "none.jsonl").write_bytes(b"")
    files = [folder / name for name in ("r.parquet", "none.jsonl", "r.jsonl.gz")]
    found = pieces.cut(files, 10)
    assert [(p.start, p.stop) for p in found] == [(0, 1), (1, 2), (2, 3), (0, None)]
    expected = list(sources.find_source(str(files[0])).rows())
    expected += sources.find_source(str(files[2])).rows()
    assert list(read_in_pieces(found)) == expected
    assert len(expected) == 25 + 49


def test_other_kinds_are_refused():
    with pytest.raises(ValueError, match=r"r\.tfrecord cannot .* expected \.jsonl"):
        pieces.cut([pathlib.Path("r.tfrecord")])
