"""CSV and TSV, and packed files: read strictly, every fault told with its line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data import jsonl, packed, records
from jaxalign.data.bad_rows import BadRow
from jaxalign.data.tables import Cell, parse_table, read_table


def parsed(content, delimiter=","):
    lines = enumerate(io.BytesIO(content.encode()), start=1)
    return [*parse_table("t.csv", lines, delimiter)]


CELLS = st.text('ab é"\n\r\t,;', max_size=6)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.tuples(CELLS, CELLS), max_size=6), st.sampled_from(",\t"))
def test_what_the_writer_of_tables_wrote_is_read_back(rows, delimiter):
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([("prompt", "completion"), *rows])
    found = parsed(text.getvalue(), delimiter)
    assert [(r["prompt"] or "", r["completion"] or "") for _, r in found] == rows
    # A row's number is that of the line it begins on.
    lines = text.getvalue().encode().split(b"\n")
    for (line, _), (prompt, _) in zip(found, rows, strict=True):
        first = lines[line - 1].decode()
        assert first.startswith('"' + prompt.split("\n")[0].replace('"', '""'))


def test_numbers_truth_values_and_empty_cells(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(
        "prompt,completion,reward,label\np,c,0.5,\nq,d,,True\nr,e,-1e-1,0\n"
    )
    rows = [("t", n, row) for n, row in read_table(path)]
    found = [e.records[0] for e in records.examples(rows, "trajectory")]
    assert [(r.get("reward"), r.get("label")) for r in found] == [
        (0.5, None),
        (None, 1),
        (-0.1, 0),
    ]
    assert all(type(r["prompt"]) is str for r in found)
    for text, problem in (("yes", "type"), ("nan", "not finite"), ("1_0", "type")):
        row = {"prompt": Cell("p"), "completion": Cell("c"), "reward": Cell(text)}
        (bad,) = records.examples([("t", 2, row)], "trajectory")
        assert (bad.field, bad.problem) == ("reward", problem)
    row = {"prompt": Cell("p"), "completion": Cell("c"), "metadata": Cell('{"a": 1}')}
    (good,) = records.examples([("t", 2, row)], "supervised")
    assert good.records[0]["metadata"] == {"a": 1}


def test_rows_at_fault_are_told_and_the_others_read():
    content = 'prompt,completion\na,"b\nc"\n\nonly one\nx,y,z\n"a"b,c\nlast,"good"\n\n'
    found = parsed(content)
    assert [n for n, _ in found] == [2, 4, 5, 6, 7, 8]
    assert found[0][1] == {"prompt": "a", "completion": "b\nc"}
    assert found[-1][1] == {"prompt": "last", "completion": "good"}
    told = [(bad.problem, bad.got) for _, bad in found[1:-1]]
    assert told[:3] == [("empty", "an empty line"), ("cells", "1"), ("cells", "3")]
    assert told[3][0] == "invalid CSV" and "expected after" in told[3][1]


def test_bytes_that_are_no_utf_8_name_line_and_column():
    lines = enumerate([b"prompt,completion\n", b"a,b\xff\n", b"c,d\n"], start=1)
    (_, bad), (_, good) = parse_table("t.csv", lines, ",")
    assert (bad.line, bad.field, bad.problem) == (2, "completion", "invalid UTF-8")
    assert "byte 0xff after 1 characters" in bad.got and good["prompt"] == "c"


def test_a_cut_last_row_is_told_and_a_quote_that_is_never_closed_ends_it():
    (_, good), (_, bad) = parsed('prompt,completion\na,b\nc,"d')
    assert good["prompt"] == "a" and bad.problem == "invalid CSV"
    with pytest.raises(ValueError, match=r"t\.csv:3: a quote .* line 5: nothing says"):
        parsed('prompt,completion\na,b\nc,"d\ne,f\ng,h\n')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "prompt;completion\na;b\n",
            "one column .*separated by semicolons, expected co",
        ),
        ("prompt,prompt\na,b\n", "the column 'prompt' 2 times"),
        ("prompt,\na,b\n", "a column without a name"),
    ],
)
def test_a_header_that_names_no_columns_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        parsed(content)


def test_utf_16_is_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("prompt,completion\na,b\n", encoding="utf-16")
    with pytest.raises(ValueError, match="is UTF-16: save it as UTF-8"):
        list(read_table(path))


def test_a_mark_of_byte_order_is_no_part_of_a_name(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("prompt\tcompletion\na\tb\n", encoding="utf-8-sig")
    assert [*read_table(path)] == [(2, {"prompt": "a", "completion": "b"})]


# Packed files.

ROWS = b"".join(b'{"prompt": "%d", "completion": "c"}\n' % i for i in range(3000))


def frames(*parts):
    """As the zstd command packs them, with a checksum."""
    pack = zstandard.ZstdCompressor(write_checksum=True).compress
    return b"".join(pack(part) for part in parts)


@pytest.mark.parametrize("suffix", packed.PACKED)
def test_packed_rows_are_those_of_the_file(tmp_path, suffix):
    pack = {".gz": gzip.compress, ".zst": frames}[suffix]
    (tmp_path / "r.jsonl").write_bytes(ROWS)
    (tmp_path / f"r.jsonl{suffix}").write_bytes(pack(ROWS))
    assert [*jsonl.read_jsonl(tmp_path / f"r.jsonl{suffix}")] == [
        *jsonl.read_jsonl(tmp_path / "r.jsonl")
    ]
    (tmp_path / f"t.csv{suffix}").write_bytes(pack(b"prompt\na\n"))
    assert [*read_table(tmp_path / f"t.csv{suffix}")] == [(2, {"prompt": "a"})]


def test_frames_one_after_another_are_one_file(tmp_path):
    path = tmp_path / "r.jsonl.zst"
    path.write_bytes(frames(ROWS[:1001], ROWS[1001:], b""))
    found = [*jsonl.read_jsonl(path)]
    assert len(found) == 3000
    assert not any(isinstance(row, BadRow) for _, row in found)


@pytest.mark.parametrize("damage", ["cut", "garbled", "false", "between"])
def test_damaged_zstandard_names_file_and_line(tmp_path, damage):
    whole = frames(ROWS)
    data = {
        "cut": whole[: len(whole) // 2],
        "garbled": whole[:200] + b"\x55" * 60 + whole[260:],
        "false": ROWS,
        "between": frames(ROWS) + whole[:20],
    }[damage]
    path = tmp_path / "r.jsonl.zst"
    path.write_bytes(data)
    message = "is no Zstandard file" if damage == "false" else "cut or damaged"
    with pytest.raises(ValueError, match=rf"r\.jsonl\.zst:\d+: .*{message}"):
        list(jsonl.read_jsonl(path))


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = tmp_path / "r.jsonl.zst"
    path.write_bytes(frames(ROWS))
    with pytest.raises(ImportError, match=r"'jaxalign\[zstd\]'.*zstd -d r\.jsonl\.zst"):
        list(jsonl.read_jsonl(path))


def test_tables_are_read_where_rows_are_loaded(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("prompt,n\na,1\n")
    (example,), bad = records.load(path, "prompts")
    assert example.records == [{"prompt": "a"}] and not bad.total
    assert json.loads(jsonl.json_line(example.raw)) == {"prompt": "a", "n": "1"}
