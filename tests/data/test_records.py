"""Validation: every malformed row is told by file, line, field, expected and got."""

import gzip
import json
import math

import pytest

from jaxalign.data import records
from jaxalign.data.bad_rows import BadRow, BadRows, DataError, FieldError
from jaxalign.data.field_map import FieldMap
from jaxalign.data.jsonl import read_jsonl

GOOD = b'{"prompt": "p", "completion": "c", "reward": 1, "label": true}'


def bad_rows(tmp_path, content: bytes, schema="trajectory", **options) -> list[str]:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    _, bad = records.load(path, schema, on_bad_row="skip", **options)
    return [str(row).removeprefix(f"{tmp_path}/") for row in bad.first]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            b'{"promt": "p", "completion": "c", "reward": 1}',
            "prompt: expected a field 'prompt', got fields ['completion', 'promt', "
            "'reward'] (did you mean 'promt'?)",
        ),
        (
            b'{"prompt": "p", "completion": "c"}',
            "reward: expected 'reward' or 'label', got fields ['completion', 'prompt']",
        ),
        (
            b'{"prompt": "p", "completion": "c", "reward": null}',
            "reward: expected 'reward' or 'label', got null",
        ),
        (
            b'{"prompt": ["p"], "completion": "c", "reward": 1}',
            "prompt: expected a text, got a list",
        ),
        (
            b'{"prompt": "p", "completion": 3, "reward": 1}',
            "completion: expected a text, got the int 3",
        ),
        (
            b'{"prompt": "p", "completion": "c", "reward": "1"}',
            "reward: expected a finite number, got the text '1'",
        ),
        (
            b'{"prompt": "p", "completion": "c", "reward": true}',
            "reward: expected a finite number, got a boolean (true)",
        ),
        (
            b'{"prompt": "p", "completion": "c", "label": "good"}',
            "label: expected true or 1 (desirable), false or 0 (undesirable), got the "
            "text 'good'",
        ),
        (
            b'{"prompt": "p", "completion": "", "reward": 1}',
            "completion: expected a text that is not empty, got an empty text",
        ),
        (
            b'{"prompt": " \\n", "completion": "c", "reward": 1}',
            "prompt: expected a text that is not empty, got only white space",
        ),
        (
            b'{"prompt": "p", "completion": "c", "reward": NaN}',
            "reward: expected a finite number, got nan",
        ),
        (
            b'{"prompt": "p", "completion": "c", "reward": -Infinity}',
            "reward: expected a finite number, got -inf",
        ),
        (
            b'{"prompt": "p", "completion": "c", "reward": 1e999}',
            "reward: expected a finite number, got inf",
        ),
        (
            b'{"prompt": "p", "completion": "c", "reward": 1' + b"0" * 400 + b"}",
            "reward: expected a finite number, got a number too large",
        ),
        (
            b'{"prompt": "p", "completion": "\xff\xfe", "reward": 1}',
            "row: expected UTF-8 text, got byte 0xff at byte 32 of the line",
        ),
        (
            b'{"prompt": "p\\ud800", "completion": "c", "reward": 1}',
            "prompt: expected text that UTF-8 can hold, got a lone surrogate at "
            "character 2",
        ),
        (
            b'{"prompt": "p", "completion": "c", "reward": 1, "prompt": "q"}',
            "prompt: expected each key once in an object, got it 2 times",
        ),
        (b'["p", "c"]', "row: expected a JSON object (one a line), got a list"),
        (
            b'{"prompt": "p", "completion" "c"}',
            "row: expected a JSON object, got invalid JSON (Expecting ':' delimiter at "
            "column 30)",
        ),
        (b"", "row: expected a JSON object, got an empty line"),
        (
            b'{"prompt": "p", "completion": "c", "reward": 1, "metadata": 3}',
            "metadata: expected an object, got the int 3",
        ),
    ],
)
def test_each_problem_is_named(tmp_path, line, expected):
    content = b"\n".join([GOOD, line, GOOD]) + b"\n"
    assert bad_rows(tmp_path, content) == [f"rows.jsonl:2: {expected}"]


def test_truncated_last_line(tmp_path):
    assert bad_rows(tmp_path, GOOD + b"\n" + GOOD[:30]) == [
        "rows.jsonl:2: row: expected a complete JSON object, got a truncated last line "
        "(30 bytes, no newline at the end)"
    ]
    # A whole object needs no newline after it.
    assert bad_rows(tmp_path, GOOD + b"\n" + GOOD) == []


def test_deep_nesting_is_a_bad_row(tmp_path):
    (message,) = bad_rows(tmp_path, b'{"a": ' + b"[" * 200_000 + b"\n" + GOOD + b"\n")
    assert message.startswith("rows.jsonl:1: row: expected a JSON object, got invalid")


def test_pairs(tmp_path):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    lines = [
        pair | {"rejected": "a"},
        pair | {"margin": math.inf},
        pair | {"margin": "wide"},
        pair | {"margin": None},
        {k: v for k, v in pair.items() if k != "rejected"},
    ]
    content = "\n".join(map(json.dumps, lines)).encode() + b"\n"
    assert bad_rows(tmp_path, content, "preference") == [
        "rows.jsonl:1: rejected: expected another text than chosen, got the same text",
        "rows.jsonl:2: margin: expected a finite number, got inf",
        "rows.jsonl:3: margin: expected a finite number, got the text 'wide'",
        "rows.jsonl:5: rejected: expected a field 'rejected', got fields "
        "['chosen', 'prompt']",
    ]
    assert "rationale" in bad_rows(tmp_path, content, "rationale")[3]


def test_error_lists_twenty_and_counts_the_rest(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + b"{}\n" * 25)
    with pytest.raises(DataError) as caught:
        records.load(path, "supervised")
    lines = str(caught.value).splitlines()
    assert lines[0] == "25 bad rows:"
    assert lines[1].startswith(f"{path}:2: prompt: ")
    assert lines[20].startswith(f"{path}:21: ")
    assert lines[21] == "... and 5 more"
    assert "ON_BAD_ROW='skip'" in lines[22] and "FIELD_MAP" in lines[22]
    good, bad = records.load(path, "supervised", on_bad_row="skip")
    assert (len(good), bad.total) == (1, 25)
    assert bad.by_problem == {"prompt: missing": 25}
    with pytest.raises(ValueError, match="'error' or 'skip', got 'ignore'"):
        records.load(path, "supervised", on_bad_row="ignore")


def test_reading_keeps_line_numbers_marks_and_separators(tmp_path):
    rows = ['{"a": "x\u2028y"}', "", '{"a": 2}', "", ""]
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\r\n".join(rows).encode("utf-8-sig"))
    found = list(read_jsonl(path))
    assert [n for n, _ in found] == [1, 2, 3]
    assert found[0][1] == {"a": "x\u2028y"}
    assert isinstance(found[1][1], BadRow)  # blank lines at the end are none
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [row for _, row in read_jsonl(packed)][::2] == [found[0][1], {"a": 2}]


RICH = {
    "prompt": "p",
    "completion": "c",
    "reward": 2,
    "label": False,
    "chosen": "a",
    "rejected": "b",
    "rationale": "r",
    "metadata": {"k": [1]},
    "other": 1,
}
BASE = {"prompt": "p", "metadata": {"k": [1]}}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ("prompts", [BASE]),
        ("supervised", [BASE | {"completion": "c"}]),
        ("trajectory", [BASE | {"completion": "c", "reward": 2.0, "label": 0}]),
        ("preference", [BASE | {"chosen": "a", "rejected": "b", "margin": 0.0}]),
        (
            "rationale",
            [BASE | {"chosen": "a", "rejected": "b", "margin": 0.0, "rationale": "r"}],
        ),
    ],
)
def test_a_rich_row_serves_every_schema(schema, expected):
    assert records.convert(RICH, schema) == expected


def test_pairs_serve_as_demonstrations_and_thumbs():
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert records.convert(pair, "supervised") == [{"prompt": "p", "completion": "a"}]
    assert records.convert(pair, "trajectory") == [
        {"prompt": "p", "completion": "a", "label": 1, "reward": 1.0},
        {"prompt": "p", "completion": "b", "label": 0, "reward": 0.0},
    ]


def test_rewards_and_labels_from_each_other():
    row = {"prompt": "p", "completion": "c"}
    convert = records.convert
    (found,) = convert(row | {"label": 1}, "trajectory", require=["reward"])
    assert (found["reward"], found["label"]) == (1.0, 1)
    (found,) = convert(
        row | {"reward": 3}, "trajectory", require=["label"], desirable_above=3
    )
    assert (found["reward"], found["label"]) == (3.0, 0)
    with pytest.raises(FieldError, match="label: .*DESIRABLE_ABOVE"):
        convert(row | {"reward": 3}, "trajectory", require=["label"])
    assert "label" not in convert(row | {"reward": 3}, "trajectory")[0]


def test_unknown_schema_names_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean 'preference'\?"):
        records.convert({}, "preferences")


class TestFieldMap:
    def test_paths(self):
        raw = {"q": {"text": "p"}, "a.b": "dotted", "l": [{"t": "x"}, {"t": "y"}]}
        fields = FieldMap(
            {"prompt": "q.text", "completion": "a.b", "rationale": "l[1].t"}
        )
        (found,), _ = fields.extract(raw)
        assert found == {"prompt": "p", "completion": "dotted", "rationale": "y"}

    def test_lists_are_zipped_and_the_rest_repeated(self):
        raw = {"q": "p", "rs": [{"t": "x", "s": 1}, {"t": "y", "s": 2}]}
        fields = FieldMap({"prompt": "q", "completion": "rs[].t", "reward": "rs[].s"})
        found, _ = fields.extract(raw)
        assert found == [
            {"prompt": "p", "completion": "x", "reward": 1},
            {"prompt": "p", "completion": "y", "reward": 2},
        ]

    def test_lists_of_different_lengths(self):
        fields = FieldMap({"completion": "a[]", "reward": "b[]"})
        with pytest.raises(FieldError, match=r"reward: expected lists of one length"):
            fields.extract({"prompt": "p", "a": ["x", "y"], "b": [1]})

    @pytest.mark.parametrize(
        ("field_map", "raw", "expected"),
        [
            (
                {"prompt": "question"},
                {"questoin": "p", "completion": "c"},
                "prompt: expected a field 'question', got fields ['completion', "
                "'questoin'] (did you mean 'questoin'?)",
            ),
            (
                {"prompt": "a.b"},
                {"a": {"c": "p"}, "completion": "c"},
                "prompt: expected a field 'b' on 'a.b', got fields ['c']",
            ),
            (
                {"prompt": "a.b"},
                {"a": "p", "completion": "c"},
                "prompt: expected an object on 'a.b', got the text 'p'",
            ),
            (
                {"prompt": "a[2]"},
                {"a": ["p"], "completion": "c"},
                "prompt: expected item 2 on 'a[2]', got 1 items",
            ),
            (
                {"completion": "a[]"},
                {"a": "p", "prompt": "p"},
                "completion: expected a list on 'a[]', got the text 'p'",
            ),
            (
                {"completion": "a[]"},
                {"a": ["x", ""], "prompt": "p"},
                "completion: expected a text that is not empty, got an empty text "
                "(item 1 of the row)",
            ),
        ],
    )
    def test_absent_paths(self, field_map, raw, expected):
        (found,) = records.examples([("f", 3, raw)], "supervised", field_map=field_map)
        assert str(found) == f"f:3: {expected}"

    def test_a_mapped_completion_is_not_replaced_by_chosen(self):
        raw = {"prompt": "p", "chosen": "a", "rejected": "b"}
        (found,) = records.examples(
            [("f", 1, raw)], "supervised", field_map={"completion": "best"}
        )
        assert "completion: expected a field 'best'" in str(found)

    def test_what_a_schema_does_not_need_may_be_absent(self):
        raw = {"prompt": "p", "completion": "c"}
        (found,) = records.examples(
            [("f", 1, raw)], "supervised", field_map={"reward": "score"}
        )
        assert found.records == [raw]

    @pytest.mark.parametrize("path", ["", "a..b", "a[x]", "a[].b[]", 3, "[0]"])
    def test_malformed_paths(self, path):
        with pytest.raises(ValueError, match=r"FIELD_MAP\['prompt'\] must be a path"):
            FieldMap({"prompt": path})

    def test_unknown_fields(self):
        with pytest.raises(ValueError, match=r"did you mean 'completion'\?"):
            FieldMap({"completions": "text"})


def test_what_a_transform_raises_is_told_of_the_row():
    def transform(raw):
        if raw["n"] == 0:
            return [None, {"prompt": "p", "completion": "c"}]
        return [{"prompt": raw["questoin"], "completion": int("x")}]

    rows = [("f", i, {"n": i, "question": "q"}) for i in range(2)]
    good, bad = records.examples(rows, "supervised", transform=transform)
    assert (len(good.records), good.left_out) == (1, 1)
    assert "did you mean 'question'?" in str(bad)
    (bad,) = records.examples(
        [("f", 1, {"n": 1, "questoin": "q"})], "supervised", transform=transform
    )
    assert bad.problem == "shape" and "ValueError: invalid literal" in bad.got


def test_counts_by_problem():
    bad = BadRows()
    for i in range(30):
        bad.add(BadRow("f", i, "reward", "type", "a", "b"))
    assert (bad.total, len(bad.first)) == (30, 20)
    assert str(bad).endswith("... and 10 more")
