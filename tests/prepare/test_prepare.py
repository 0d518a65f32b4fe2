"""From a file to a cache: content, reuse, splits, summary, errors."""

import json
import subprocess
import sys

import numpy as np
import pytest

from jaxalign import prepare
from jaxalign.batch import NO_LABEL
from jaxalign.data.bad_rows import DataError
from jaxalign.data.cache import TokenizedCache
from jaxalign.prepare import rows as rows_lib
from jaxalign.vocabularies import ByteVocabulary

VOCABULARY = ByteVocabulary()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(tmp_path, data, schema="supervised", **options):
    options.setdefault("vocabulary", VOCABULARY)
    return prepare.prepare(
        data, schema=schema, cache_dir=tmp_path / "caches", **options
    )


def texts(arrays):
    return [VOCABULARY.decode(ids) for ids in arrays]


@pytest.fixture
def file(tmp_path):
    rows = [
        {"prompt": f"question\n{i % 10} 🎉", "completion": "yes " * (i + 1)}
        for i in range(40)
    ]
    return write(tmp_path / "rows.jsonl", rows)


def test_supervised(tmp_path, file):
    paths = run(tmp_path, file)
    assert list(paths) == ["train"]
    cache = TokenizedCache(paths["train"])
    assert (cache.schema, len(cache), cache.vocabulary) == (
        "supervised",
        40,
        VOCABULARY,
    )
    row = cache[3]
    assert row.key == "rows.jsonl:4"
    assert texts(row.prompts) == ["question\n3 🎉"]
    assert texts(row.responses) == ["yes " * 4]
    assert row.prompts[0][-1] == row.responses[0][-1] == 1
    assert np.isnan(row.response_reward[0]) and row.response_label == [NO_LABEL]
    assert row.metadata == {}  # the ids give the prompt back


def test_responses_of_one_row_share_its_prompt(tmp_path):
    raw = {"q": "p", "rs": [{"t": "x", "s": 1, "ok": True}, {"t": "y", "s": 2}]}
    raw["rs"][1]["ok"] = False
    fields = {
        "prompt": "q",
        "completion": "rs[].t",
        "reward": "rs[].s",
        "label": "rs[].ok",
    }
    data = write(tmp_path / "rows.jsonl", [raw])
    paths = run(tmp_path, data, "trajectory", field_map=fields)
    (row,) = TokenizedCache(paths["train"])
    assert (texts(row.prompts), texts(row.responses)) == (["p"], ["x", "y"])
    assert (row.response_reward, row.response_label) == ([1.0, 2.0], [1, 0])
    assert row.response_prompt == [0, 0] and row.pairs == []


def test_different_prompts_of_one_row_become_rows(tmp_path):
    raw = {"turns": [{"q": "a", "r": "x"}, {"q": "b", "r": "y"}, {"q": "a", "r": "z"}]}
    data = write(tmp_path / "rows.jsonl", [raw])
    fields = {"prompt": "turns[].q", "completion": "turns[].r"}
    rows = list(TokenizedCache(run(tmp_path, data, field_map=fields)["train"]))
    assert [r.key for r in rows] == ["rows.jsonl:1", "rows.jsonl:1#1"]
    assert [texts(r.responses) for r in rows] == [["x", "z"], ["y"]]


def test_pairs_share_responses():
    records = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2.0},
        {"prompt": "p", "chosen": "a", "rejected": "c", "margin": 1.0},
    ]
    (row,) = rows_lib.build_rows(records, "preference", VOCABULARY, key="k")
    assert texts(row.responses) == ["a", "b", "c"]
    assert row.pairs == [(0, 1, 2.0), (0, 2, 1.0)]


def test_rationales_show_both_answers_in_random_order():
    record = {
        "prompt": "2+2?",
        "chosen": "four",
        "rejected": "five",
        "margin": 0.0,
        "rationale": "[chosen] adds up, [rejected] does not.",
        "metadata": {"level": 1},
    }
    orders = []
    for i in range(200):
        (row,) = rows_lib.build_rows(
            [record], "rationale", VOCABULARY, key=f"f:{i}", seed=3
        )
        question, (chosen, rejected, rationale) = (
            VOCABULARY.decode(row.prompts[1]),
            texts(row.responses),
        )
        assert (chosen, rejected) == ("four", "five")
        assert row.response_prompt == [0, 0, 1] and row.response_kind == [0, 0, 1]
        assert row.pairs == [(0, 1, 0.0)] and row.metadata == {"level": 1}
        first = "Response A: four\n\nResponse B: five" in question
        if first:
            assert rationale == "Response A adds up, Response B does not."
        else:
            assert "Response A: five\n\nResponse B: four" in question
            assert rationale == "Response B adds up, Response A does not."
        orders.append(first)
    # A fair coin: 5 standard deviations either side of 100.
    assert 65 < sum(orders) < 135
    again = rows_lib.build_rows([record], "rationale", VOCABULARY, key="f:0", seed=3)
    assert ("Response A: four" in VOCABULARY.decode(again[0].prompts[1])) == orders[0]


def test_a_second_call_finds_the_cache(tmp_path, file):
    first = run(tmp_path, file, eval_fraction=0.3)
    stamps = [(p / "cache.json").stat().st_mtime_ns for p in first.values()]
    second = run(tmp_path, file, eval_fraction=0.3)
    assert second == first
    assert [(p / "cache.json").stat().st_mtime_ns for p in first.values()] == stamps


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "trajectory", "field_map": {"reward": "r"}, "on_bad_row": "skip"},
        {"vocabulary": ByteVocabulary(125)},
        {"field_map": {"prompt": "completion"}},
        {"max_rows": 39},
        {"eval_fraction": 0.3},
        {"seed": 1},
        {"data": None},
    ],
    ids=str,
)
def test_what_decides_the_rows_decides_the_folder(tmp_path, change):
    rows = [
        {"prompt": f"p{i % 9}", "completion": "c", "label": True} for i in range(40)
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    first = run(tmp_path, file)
    if "data" in change:
        change = {}
        write(tmp_path / "rows.jsonl", [*rows, rows[0]])
    assert run(tmp_path, file, **change)["train"] != first["train"]


def test_a_damaged_cache_is_made_again(tmp_path, file):
    path = run(tmp_path, file)["train"]
    (path / "index.npz").write_bytes(b"")
    assert len(TokenizedCache(run(tmp_path, file)["train"])) == 40


def test_a_prompt_is_on_one_side_of_the_split(tmp_path, file):
    paths = run(tmp_path, file, eval_fraction=0.3)
    prompts = {
        name: {texts(row.prompts)[0] for row in TokenizedCache(path)}
        for name, path in paths.items()
    }
    assert len(prompts["train"]) + len(prompts["validation"]) == 10
    assert not prompts["train"] & prompts["validation"]
    assert all(prompts.values())
    assert sum(len(TokenizedCache(p)) for p in paths.values()) == 40


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_of_a_small_source_is_empty(tmp_path, file, fraction):
    paths = run(tmp_path, file, eval_fraction=fraction)
    small = "validation" if fraction < 0.5 else "train"
    assert len(TokenizedCache(paths[small])) == 4  # all rows of one prompt


def test_one_prompt_cannot_be_split(tmp_path):
    data = write(tmp_path / "one.jsonl", [{"prompt": "p", "completion": "c"}] * 3)
    with pytest.raises(ValueError, match="two distinct prompts"):
        run(tmp_path, data, eval_fraction=0.5)
    assert not list((tmp_path / "caches").rglob("cache.json"))


def test_split_shares_are_close(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(1000)]
    paths = run(tmp_path, write(tmp_path / "r.jsonl", rows), eval_fraction=0.2)
    # Binomial(1000, 0.2): 5 standard deviations are 63.
    assert abs(len(TokenizedCache(paths["validation"])) - 200) < 63


def test_bad_rows_stop_preparation_or_are_counted(tmp_path, file):
    with open(file, "a") as f:
        f.write('{"prompt": "p", "completion": ""}\n{"prompt": "p"}\n{"prom')
    with pytest.raises(DataError, match=r"rows\.jsonl:41: completion: .*empty"):
        run(tmp_path, file)
    assert not list((tmp_path / "caches").rglob("cache.json"))
    path = run(tmp_path, file, on_bad_row="skip")["train"]
    source = TokenizedCache(path).summary["source"]
    assert (source["rows_read"], source["rows_kept"]) == (43, 40)
    assert source["rejected_by_problem"] == {
        "completion: empty": 1,
        "completion: missing": 1,
        "row: truncated": 1,
    }
    table = prepare.describe(TokenizedCache(path))
    assert "43: 40 kept, 3 rejected" in table
    assert "rows.jsonl:43: row: expected a complete JSON object" in table


def test_summary_counts(tmp_path):
    rows = [{"prompt": "abc", "completion": "d" * n, "reward": n} for n in (1, 2, 3, 4)]
    data = write(tmp_path / "r.jsonl", rows)
    path = run(tmp_path, data, "trajectory")["train"]
    summary = TokenizedCache(path).summary
    assert (summary["rows"], summary["responses"], summary["pairs"]) == (4, 4, 0)
    # EOS included: prompts 4 tokens, responses 2 to 5.
    assert summary["prompt_tokens"] == {
        "p50": 4,
        "p90": 4,
        "p99": 4,
        "max": 4,
        "total": 16,
    }
    assert summary["response_tokens"]["total"] == 14
    assert summary["unknown_token_rate"] == {"prompts": 0.0, "responses": 0.0}
    table = prepare.describe(TokenizedCache(path), inputs=3, targets=3, packing=2)
    assert "4 of 4 at 3" in table and "2 of 4 at 3" in table
    assert "mean 2.5" in table and "occupancy, packing 2" in table
    assert "decoder rows" in table


def test_unknown_tokens_are_counted(tmp_path):
    class Lossy(ByteVocabulary):
        """Knows no newline, as a model without escapes."""

        def encode(self, text):
            return [2 if c == "\n" else ord(c) + 3 for c in text]

    data = write(tmp_path / "r.jsonl", [{"prompt": "a\nb", "completion": "abcd"}])
    path = run(tmp_path, data, vocabulary=Lossy())["train"]
    cache = TokenizedCache(path)
    assert cache.summary["unknown_token_rate"] == {"prompts": 0.25, "responses": 0.0}
    assert cache[0].metadata == {"prompt": "a\nb"}  # kept, as the ids lost it


def test_max_rows_and_several_files(tmp_path, file):
    write(tmp_path / "rows2.jsonl", [{"prompt": "x", "completion": "y"}])
    paths = run(tmp_path, str(tmp_path / "rows*.jsonl"))
    assert TokenizedCache(paths["train"])[40].key == "rows2.jsonl:1"
    assert len(TokenizedCache(run(tmp_path, file, max_rows=7)["train"])) == 7


def test_a_prepared_folder_is_used_as_it_is(tmp_path, file):
    paths = run(tmp_path, file, eval_fraction=0.3)
    folder = str(paths["train"].parent)
    assert run(tmp_path, folder, vocabulary=None) == paths
    assert run(tmp_path, str(paths["train"])) == {"train": paths["train"]}
    with pytest.raises(ValueError, match="for the schema 'supervised', and 'pref"):
        run(tmp_path, folder, "preference")
    with pytest.raises(ValueError, match="set VOCABULARY to the former"):
        run(tmp_path, folder, vocabulary=ByteVocabulary(1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no cache.json .* and no data files"):
        run(tmp_path, str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"data": "rows.jsonl"}, FileNotFoundError, "No file 'rows.jsonl'"),
        ({"schema": "preferences"}, ValueError, "did you mean 'preference'"),
        ({"schema": "prompts"}, ValueError, "no responses"),
        ({"eval_fraction": 1.0}, ValueError, r"in \[0, 1\), got 1.0"),
        ({"on_bad_row": "drop"}, ValueError, "'error' or 'skip'"),
        ({"field_map": {"promt": "x"}}, ValueError, "did you mean 'prompt'"),
        ({"vocabulary": None}, ValueError, "needs a vocabulary"),
        ({"task": "hh_rlh"}, ValueError, "did you mean 'hh_rlhf'"),
        ({"task": "hh_rlhf", "schema": "rationale"}, ValueError, "it serves"),
        (
            {"task": "hh_rlhf", "field_map": {"prompt": "x"}},
            ValueError,
            "FIELD_MAP is for plain files",
        ),
        ({"task_options": {"a": 1}}, ValueError, "need a data set of jaxalign.tasks"),
        (
            {"task": "gsm8k", "task_options": {"calculater": 1}},
            ValueError,
            "did you mean 'calculator'",
        ),
        (
            {"task": "gsm8k", "task_options": {"calculator": "no"}},
            ValueError,
            "must be one of",
        ),
    ],
)
def test_errors(tmp_path, options, error, match):
    rows = [{"question": "q", "answer": "a"}]
    options = {"data": write(tmp_path / "rows.jsonl", rows)} | options
    with pytest.raises(error, match=match):
        run(tmp_path, **options)


def test_nothing_left(tmp_path):
    data = write(tmp_path / "rows.jsonl", [])
    with pytest.raises(ValueError, match=r"No row of .*\(0 read, 0 rejected"):
        run(tmp_path, data)
    data = write(tmp_path / "rows.jsonl", [{}, {}])
    with pytest.raises(ValueError, match=r"2 rejected.*\n.*rows.jsonl:1: prompt"):
        run(tmp_path, data, on_bad_row="skip")


def test_json_lines_need_no_tensorflow(tmp_path, file):
    program = (
        "import sys\n"
        "for name in ('tensorflow', 'seqio', 'tensorflow_datasets'):\n"
        "    sys.modules[name] = None\n"
        "from jaxalign import prepare\n"
        "from jaxalign.vocabularies import ByteVocabulary\n"
        f"print(prepare.prepare({file!r}, schema='supervised',\n"
        f"    vocabulary=ByteVocabulary(), cache_dir={str(tmp_path / 'c')!r}))\n"
        "try:\n"
        "    prepare.prepare('nothing', schema='supervised', cache_dir='c',\n"
        "        vocabulary=ByteVocabulary())\n"
        "except FileNotFoundError as error:\n"
        "    assert 'hh_rlhf' in str(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout and "preparing" not in done.stderr


def test_a_glob_takes_no_file_that_lies_beside_an_output(tmp_path, file):
    beside = ("settings.json", "bad_rows.jsonl", "partial", "partial.json")
    for name in beside:
        (tmp_path / f"rows.jsonl.{name}").write_text("{}\n")
    paths = run(tmp_path, str(tmp_path / "rows.*"))
    assert len(TokenizedCache(paths["train"])) == 40
    with pytest.raises(DataError):  # it is read where it is named
        run(tmp_path, f"{file}.bad_rows.jsonl")
