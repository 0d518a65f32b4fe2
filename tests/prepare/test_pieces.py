"""Pieces of files, read apart, give the rows and numbers of the whole."""

import gzip
import json
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from jaxalign.data.jsonl import read_jsonl
from jaxalign.prepare import pieces, sources

LINES = st.one_of(
    st.sampled_from([b"", b" ", b"\r", b'{"a": 1}', b"{", b'{"a": "\xc3\xa9"}', b"[]"]),
    st.binary(max_size=12).map(lambda raw: raw.replace(b"\n", b"")),
)


def read_in_pieces(found):
    for piece in found:
        yield from pieces.rows(piece)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pieces")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(LINES, max_size=12), st.booleans())
@example([b"", b"", b"", b'{"a": 1}', b"", b""], True)
@example([b"\xef\xbb\xbf{}", b"", b"{}", b"", b"", b"{}"], False)
def test_any_split_gives_the_lines_and_numbers_of_the_whole(folder, lines, ends):
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * ends)
    # Taken for another format, whole, before any line is read.
    assume(lines[:1] not in ([b"{"], [b"["]))
    expected = [(str(path), n, row) for n, row in read_jsonl(path)]
    for size in range(1, path.stat().st_size + 2):
        found = list(pieces.cut([path], size))
        assert list(read_in_pieces(found)) == expected
        ends = [piece.stop for piece in found]
        assert [piece.start for piece in found] == [0, *ends][: len(ends)]


def test_a_line_longer_than_pieces(folder):
    path = folder / "long.jsonl"
    rows = [{"a": "x" * 100}, {"a": 1}, {"a": "y" * 500}, {"a": 2}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for size in (3, 10, 64, 1000):
        found = list(read_in_pieces(pieces.cut([path], size)))
        assert found == [(str(path), n, row) for n, row in enumerate(rows, start=1)]


def test_tables_and_zstandard_stay_whole(folder):
    (folder / "t.csv").write_text('prompt,n\n"a\nb",1\nc,2\n')
    packed = zstandard.ZstdCompressor().compress(b'{"a": 1}\n\n{"a": 2}\n')
    (folder / "z.jsonl.zst").write_bytes(packed)
    files = [folder / name for name in ("t.csv", "z.jsonl.zst")]
    found = list(pieces.cut(files, 1))
    assert [(p.start, p.stop) for p in found] == [(0, None), (0, None)]
    rows = [(line, row) for _, line, row in read_in_pieces(found)]
    assert rows[0] == (2, {"prompt": "a\nb", "n": "1"}) and rows[1][0] == 4
    assert [line for line, _ in rows[2:]] == [1, 2, 3]


def test_parquet_is_cut_into_row_groups_and_packed_files_stay_whole(folder):
    rows = [{"a": i, "b": [{"c": str(i)}]} for i in range(25)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "r.parquet", row_group_size=10)
    (folder / "r.jsonl.gz").write_bytes(
        gzip.compress(b"".join(json.dumps(row).encode() + b"\n\n" for row in rows))
    )
    (folder / "none.jsonl").write_bytes(b"")
    files = [folder / name for name in ("r.parquet", "none.jsonl", "r.jsonl.gz")]
    found = list(pieces.cut(files, 10))
    assert [(p.start, p.stop) for p in found] == [(0, 1), (1, 2), (2, 3), (0, None)]
    expected = list(sources.find_source(str(files[0])).rows())
    expected += sources.find_source(str(files[2])).rows()
    assert list(read_in_pieces(found)) == expected
    assert len(expected) == 25 + 49


def test_other_kinds_are_refused():
    with pytest.raises(ValueError, match=r"r\.tfrecord cannot .* expected \.jsonl"):
        list(pieces.cut([pathlib.Path("r.tfrecord")]))
