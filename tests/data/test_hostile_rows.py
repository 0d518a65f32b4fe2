"""Rows that nobody meant: each is accepted or reported, and can do nothing else."""

from __future__ import annotations

import gzip
import json
import math
import random

import msgpack
import pytest

from jaxalign import vocabularies
from jaxalign.data import jsonl, records
from jaxalign.data.bad_rows import BadRow, BadRows, DataError, quoted
from jaxalign.prepare import rows as rows_lib
from jaxalign.prepare import sources, tasks

ESCAPES = "\x1b]0;owned\x07\x1b[31m\nm.jsonl:99: row: all is well\u202e\x9b"


def write(path, rows, end=b""):
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows) + end)
    return path


def load(path, schema="supervised", **options):
    return records.load(path, schema, **options)


# Messages.


def test_quoted_text_is_one_printable_line_and_stays_so():
    r = random.Random(0)
    for _ in range(300):
        text = "".join(
            chr(r.choice((r.randrange(256), r.randrange(0x11000)))) for _ in range(50)
        )
        shown = quoted(text * r.choice((1, 30)))
        assert shown.isprintable() and len(shown) < 5000
        assert quoted(shown[:400]) == shown[:400]


def test_text_of_the_data_reaches_no_terminal_raw(tmp_path):
    twice = json.dumps({ESCAPES: 1})[:-1] + "," + json.dumps({ESCAPES: 2})[1:]
    hostile = [
        twice,
        json.dumps({ESCAPES: 1}),
        json.dumps({"k" * 2_000_000: 1}),
        json.dumps({"prompt": ESCAPES, "completion": [ESCAPES] * 3}),
        json.dumps({"prompt": 10**4000, "completion": "c"}),
        json.dumps({f"{ESCAPES}{i}": 1 for i in range(500)}),
        ESCAPES.replace("\n", ""),
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(hostile) + "\n", encoding="utf-8", newline="\n")
    with pytest.raises(DataError) as caught:
        load(path)
    text = str(caught.value)
    assert len(text) < 12_000
    lines = text.splitlines()
    assert all(line.isprintable() for line in lines)
    told = [line for line in lines if line.startswith(f"{path}:")]
    assert len(told) == len(hostile)
    assert not any("all is well" in line[:60] for line in lines)


def test_all_bad_rows_are_listed_where_the_message_says(tmp_path):
    rows = [{"prompt": "p", "completion": i % 2 or "c"} for i in range(70)]
    path, listing = write(tmp_path / "m.jsonl", rows), tmp_path / "out" / "bad.jsonl"
    with pytest.raises(DataError, match=rf"and 15 more\nAll of them are .*{listing}"):
        load(path, listing=listing)
    found = [json.loads(line) for line in listing.read_text().splitlines()]
    assert [bad["line"] for bad in found] == list(range(2, 71, 2))
    assert BadRow(**found[-1]).got == "the int 1"
    good, bad = load(path, on_bad_row="skip", listing=listing)
    assert (len(good), bad.total) == (35, 35)
    # A list of another input's rows does not stay beside this one's.
    load(write(path, rows[::2]), listing=listing)
    assert not listing.exists()


def test_skipped_rows_leave_a_trace(tmp_path, caplog):
    path = write(tmp_path / "m.jsonl", [{"prompt": "p"}, {"prompt": 3}])
    load(path, "prompts", on_bad_row="skip")
    assert "1 bad rows are left out" in caplog.text and "m.jsonl:2" in caplog.text


def test_a_field_that_no_row_has_is_told_once(tmp_path):
    rows = [{"question": "q", "prompt": "p", "answer": "a"}] * 30
    with pytest.raises(DataError) as caught:
        load(write(tmp_path / "m.jsonl", rows, b"{\n"))
    text = str(caught.value)
    assert text.count("completion") == 2  # the field, and what was expected
    assert "m.jsonl:1: completion: expected a field 'completion', got fields" in text
    assert "['answer', 'prompt', 'question']; no row has it: the same in 30" in text
    assert "m.jsonl:31: row" in text
    # One row that has it, and each is told by its line.
    rows.append({"prompt": "p", "completion": "c"})
    with pytest.raises(DataError) as caught:
        load(write(tmp_path / "m.jsonl", rows))
    assert str(caught.value).count("completion: expected") == 20


# Formats.


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[\n{"prompt": "p"}\n]\n', "holds one JSON array"),
        ("a.jsonl", '[{"prompt": "p"}, {"prompt": "q"}]\n', "holds one JSON array"),
        ("a.json", '{\n  "prompt": "p"\n}\n', "an object over several lines"),
        ("a.xlsx", "PK", "is a spreadsheet"),
    ],
)
def test_other_formats_are_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    for read in (lambda: load(path), lambda: sources.find_source(str(path))):
        with pytest.raises(ValueError, match=message) as caught:
            read()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.csv"):
        sources.find_source("nothing.csv")


@pytest.mark.parametrize("damage", ["cut", "garbled", "false", "empty"])
def test_damaged_gzip_names_file_and_line(tmp_path, damage):
    r = random.Random(0)
    rows = [{"prompt": f"{r.random()}", "completion": "c"} for _ in range(1000)]
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    elif damage == "garbled":
        middle = len(packed) // 2
        packed = packed[:middle] + b"\x55" * 300 + packed[middle + 300 :]
    elif damage == "false":
        packed = b'{"prompt": "p", "completion": "c"}\n'
    else:
        packed = packed[:5]
    path = tmp_path / "m.jsonl.gz"
    path.write_bytes(packed)
    with pytest.raises(ValueError) as caught:
        load(path)
    if not isinstance(caught.value, DataError):  # else a line that was garbled in it
        assert f"{path}:" in str(caught.value) and "gz" in str(caught.value)


# What is written.


def test_json_lines_are_read_back_as_they_were():
    r = random.Random(1)
    for _ in range(200):
        value = anything(r, 4)
        line = jsonl.json_line({"x": value})
        assert line.endswith("\n") and "\n" not in line[:-1]
        assert "NaN" not in line.replace("\\", "") or "NaN" in repr(value)
        strict = json.loads(line.encode("utf-8"), parse_constant=pytest.fail)
        assert strict == {"x": jsonl.nulled(value)}


def test_files_that_are_no_json_are_named(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: it is no JSON"):
        jsonl.read_json(path)


# Fuzz.

TEXTS = (
    "p",
    " ",
    "",
    "é\u2028",
    "\x00",
    "\ud83d",
    "a\udc00b",
    "\u200b",
    ESCAPES,
    "x" * 900,
)
NUMBERS = (
    0,
    -1,
    1.5,
    2**63,
    2**64,
    -(2**63),
    2**70,
    10**400,
    math.nan,
    math.inf,
    1e308,
)


def anything(r, depth):
    kind = r.randrange(8 if depth else 5)
    if kind == 0:
        return r.choice(TEXTS)
    if kind == 1:
        return r.choice(NUMBERS)
    if kind < 5:
        return r.choice((None, True, False, 0.0, "text"))
    if kind == 5:
        return [anything(r, depth - 1) for _ in range(r.randrange(4))]
    if kind == 6:
        return {r.choice(TEXTS): anything(r, depth - 1) for _ in range(r.randrange(4))}
    deep = "leaf"
    for _ in range(r.choice((3, 600))):
        deep = {"a": deep}
    return deep


def is_text(value):
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        return bool(value.encode("utf-8"))
    except UnicodeEncodeError:
        return False


def storable(value):
    try:
        return value is None or isinstance(value, dict) and bool(msgpack.packb([value]))
    except (ValueError, TypeError, OverflowError):
        return False


def test_fuzzed_rows_are_judged_as_an_oracle_judges_them(tmp_path):
    r = random.Random(2)
    rows = []
    for _ in range(600):
        row = {"prompt": "p", "completion": "c"}
        for name in r.sample(
            ["prompt", "completion", "metadata", "note", r.choice(TEXTS)],
            r.randrange(4),
        ):
            row[name] = anything(r, 3)
        for name in ("prompt", "completion"):
            if r.random() < 0.05:
                del row[name]
        rows.append(row)
    path = write(tmp_path / "fuzz.jsonl", rows)
    recipe = rows_lib.Recipe(
        "supervised", vocabularies.ByteVocabulary(), {}, frozenset({"fuzz.jsonl"}), 0
    )
    raw = [("fuzz.jsonl", n, row) for n, row in jsonl.read_jsonl(path)]
    items = list(recipe.encode(raw))
    assert len(items) == len(rows)
    accepted = 0
    for row, item in zip(rows, items, strict=True):
        texts = is_text(row.get("prompt")) and is_text(row.get("completion"))
        good = texts and storable(row.get("metadata"))
        assert isinstance(item, BadRow) != good, (row, item)
        if good:
            accepted += 1
            (encoded,) = item.rows
            assert type(encoded).from_bytes(encoded.to_bytes()).key == encoded.key
        else:
            assert str(item).isprintable()
    assert 100 < accepted < 500
    # For generating and scoring a row only has to be written again.
    good, bad = load(path, on_bad_row="skip")
    assert len(good) + bad.total == len(rows) and len(good) >= accepted
    for example in good:
        back = json.loads(jsonl.json_line(example.raw))
        assert back == jsonl.nulled(example.raw)


def test_metadata_keeps_the_prompt():
    vocabulary = vocabularies.ByteVocabulary()
    record = {"prompt": "p", "completion": "c", "metadata": {"prompt": "q", "k": 1}}
    (row,) = rows_lib.build_rows([record], "supervised", vocabulary, key="k")
    assert row.metadata == {"prompt": "p", "metadata.prompt": "q", "k": 1}


def test_bad_rows_count_without_a_listing():
    bad = BadRows()
    bad.add(BadRow("f", 1, "a", "missing", "x", "y"))
    assert bad.total == 1 and "listed" not in str(bad)


FIELDS = sorted(
    {
        *("prompt", "completion", "chosen", "rejected", "question", "answer", "q"),
        *("reward", "label", "margin", "metadata", "rationale", "instruction"),
        *("completions", "info", "summaries", "choice", "output_1", "preference"),
        *("ground_truth", "6b_finetuning", "models", "generator_1", "output_2"),
    }
)


def shaped(r):
    """Nearly what some data set has: lists of objects of known names."""
    if r.random() < 0.5:
        return anything(r, 2)
    inner = {r.choice(FIELDS): anything(r, 1) for _ in range(3)}
    known = {"text": "t", "solution": "s", "is_correct": r.choice((True, "x", 10**400))}
    return r.choice(([{**known, **inner}] * 2, {**known, **inner}, r.choice(NUMBERS)))


@pytest.mark.parametrize("schema", [*records.SCHEMAS])
def test_no_row_of_any_schema_or_data_set_ends_in_a_traceback(schema):
    r = random.Random(schema)
    known = tasks.known_tasks().values()
    transforms = [task.transform(schema) for task in known if schema in task.schemas()]
    maps = [None, {"prompt": "q.text"}, {"prompt": "q", "chosen": "completions[].text"}]
    rows = [
        ("f", n, {r.choice(FIELDS): shaped(r) for _ in range(r.randrange(9))})
        for n in range(120)
    ]
    for options in [{"transform": t} for t in transforms] + [
        {"field_map": m} for m in maps
    ]:
        items = list(records.examples(rows, schema, **options))
        assert len(items) == len(rows)
        assert all(str(i).isprintable() for i in items if isinstance(i, BadRow))
