"""``jaxalign score --judge``: killed or not, with and without a verdict."""

from __future__ import annotations

import json
import sys
import textwrap

import pytest

from jaxalign.inference import judged, score

ROWS = [{"prompt": f"p{i}", "completion": "x" * i, "id": i} for i in range(1, 8)]
PAIRS = [
    {"prompt": f"p{i}", "chosen": "x" * i, "rejected": "yy" * (i % 3 + 1)}
    for i in range(1, 8)
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            import os
            def length(prompt, response):
                return len(response)
            def some(prompt, response):
                return len(response) if len(response) % 2 else None
            def equal(prompt, response):
                return 1.0
            def longer(prompt, a, b):
                return 0.5 if len(a) == len(b) else float(len(a) > len(b))
            def counted(prompts: list[str], responses: list[str]):
                with open("calls", "a") as file:
                    file.write(str(len(prompts)))
                if os.path.getsize("calls") == 3:
                    raise KeyboardInterrupt
                return [len(r) for r in responses]
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    for name, rows in (("rows", ROWS), ("pairs", PAIRS)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    yield tmp_path
    sys.modules.pop("mine", None)


def scored(judge, data, output="out.jsonl"):
    score.score(judge=f"mine.py:{judge}", data=f"{data}.jsonl", output=output)
    with open(output) as file:
        return [json.loads(line) for line in file]


def test_what_has_no_verdict_is_null_and_told(folder, caplog):
    found = scored("some", "rows")
    assert [row["score"] for row in found] == [1, None, 3, None, 5, None, 7]
    assert [row["id"] for row in found] == list(range(1, 8))
    assert "3 of 7 rows have no verdict" in caplog.text


def test_pairs_have_two_scores_and_ties_are_told(folder, caplog):
    with caplog.at_level("INFO"):
        found = scored("length", "pairs")
    assert [(r["chosen_score"], r["rejected_score"]) for r in found][:3] == [
        (1, 4),
        (2, 6),
        (3, 2),
    ]
    assert "ahead in 3 of 7 pairs (42.9 %), 1 tie" in caplog.text
    scored("equal", "pairs", "equal.jsonl")
    assert "all 7 pairs tie: it tells nothing apart" in caplog.text


def test_a_judge_that_compares_scores_pairs_alone(folder):
    found = scored("longer", "pairs")
    assert [(r["chosen_score"], r["rejected_score"]) for r in found][:3] == [
        (0, 1),
        (0, 1),
        (1, 0),
    ]
    with pytest.raises(ValueError, match="compares two responses.*has none"):
        scored("longer", "rows", "other.jsonl")


def test_a_killed_run_asks_for_one_batch_again(folder, monkeypatch):
    whole = scored("length", "rows", "whole.jsonl")
    monkeypatch.setattr(judged, "_AT_ONCE", 2)
    with pytest.raises(KeyboardInterrupt):
        scored("counted", "rows", "killed.jsonl")
    assert not (folder / "killed.jsonl").exists()
    found = scored("counted", "rows", "killed.jsonl")
    assert found == whole
    assert (folder / "calls").read_text() == "22221"


def test_who_scores_must_be_said(folder):
    for given in ({}, {"checkpoint": "runs/a", "judge": "reward:runs/b"}):
        with pytest.raises(ValueError, match="either --checkpoint=.*or --judge="):
            score.score(data="rows.jsonl", output="out.jsonl", **given)
