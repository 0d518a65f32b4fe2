"""``jaxalign eval`` of reward models: numbers, page, files, refusals."""

from __future__ import annotations

import json
import sys
import textwrap

import pytest

from jaxalign import cli
from jaxalign.inference import evaluation, reward_evaluation, reward_pools

PAIRS = [
    {
        "prompt": f"p{i}",
        "chosen": "x" * (i % 7 + 2),
        "rejected": "y" * (i % 5 + 1),
        "category": ["chat", "safety"][i % 2],
        "band": ["wrong", "strong"][i % 2],
        "strength_mean": i / 10,
        "id": i,
    }
    for i in range(100)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            def length(prompt, response):
                return 0.5 * len(response)
            def some(prompt, response):
                return None if prompt in ("p3", "q2") else -float(len(response))
            def none(prompt, response):
                return None
            def gold(prompt, response):
                return -abs(len(response) - 4.0)
            def first(prompt, a, b):
                return 0.75
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pairs.jsonl", PAIRS)
    pools = [
        {
            "prompt": f"q{i}",
            "responses": ["z" * (1 + (k * 5 + i) % 9) for k in range(8)],
        }
        for i in range(6)
    ]
    write(tmp_path / "pools.jsonl", pools)
    yield tmp_path
    sys.modules.pop("mine", None)


def evaluated(*judges, **settings):
    names = [f"mine.py:{judge}" for judge in judges]
    return evaluation.evaluate(reward_models=names, data="pairs.jsonl", **settings)


def test_numbers_are_those_of_the_pairs(folder):
    found = evaluated("length")["models"]["mine.py:length"]
    gaps = [len(r["chosen"]) - len(r["rejected"]) for r in PAIRS]
    right = sum((g > 0) + 0.5 * (g == 0) for g in gaps) / 100
    assert found["accuracy"]["mean"] == pytest.approx(right)
    assert found["length"]["baseline"] == found["accuracy"]
    assert found["length"]["prefers_longer"]["mean"] == 1.0
    group = found["groups"]["category"]
    assert set(group["values"]) == {"chat", "safety"} and "id" not in found["groups"]
    chat = [g for g, r in zip(gaps, PAIRS, strict=True) if r["category"] == "chat"]
    own = sum((g > 0) + 0.5 * (g == 0) for g in chat) / 50
    assert group["values"]["chat"]["accuracy"]["mean"] == pytest.approx(own)
    both = [v["accuracy"]["mean"] for v in group["values"].values()]
    assert group["mean"] == pytest.approx(sum(both) / 2)
    assert list(found["groups"]["band"]["values"]) == ["wrong", "strong"]
    assert len(found["strength_tenths"]) == 10
    # A longer text is a better one, to this model: said twice turns verdicts.
    assert found["formats"]["said twice"]["flipped"] > 0.5
    assert found["formats"]["capitals"] == {
        **found["formats"]["capitals"], "flipped": 0.0, "shift": 0.0
    }  # fmt: skip


def test_what_has_no_verdict_is_counted_and_models_agree_or_not(folder):
    found = evaluated("length", "some", "first")
    assert found["models"]["mine.py:some"]["no_verdict"] == 1
    one, two, _ = found["agreement"]
    assert one["pairs"] == 99 and one["spearman"] == pytest.approx(-1.0)
    assert two["models"] == ["mine.py:length", "mine.py:first"]
    first = found["models"]["mine.py:first"]
    assert first["position"]["mean"] == pytest.approx(0.5)
    assert first["accuracy"]["mean"] == 0.5 and first["ties"] == 100
    assert found["models"]["mine.py:length"]["position"] is None
    with pytest.raises(ValueError, match="no verdict on any of 100 pairs"):
        evaluated("none")


def test_best_of_n_shows_over_optimisation(folder):
    found = evaluated("length", "some", pools="pools.jsonl", gold="mine.py:gold")
    curves = found["best_of_n"]
    assert (curves["pools"], curves["left_out"]) == (5, 1)
    own = curves["models"]["mine.py:length"]
    assert own["own"]["n"] == [1, 2, 4, 8] and own["own"]["mean"][-1] > 1.0
    # Ever longer is not ever better: gold has its peak at 4 letters.
    assert own["peak"] < 8 and own["gold"]["mean"][-1] < max(own["gold"]["mean"])
    best = curves["models"]["gold"]["own"]["mean"]
    assert all(b >= g - 1e-9 for b, g in zip(best, own["gold"]["mean"], strict=True))


def test_samples_of_generate_are_pools(folder):
    write(
        folder / "samples.jsonl",
        [
            {"prompt": "a", "response": "1", "sample": 0},
            {"prompt": "a", "response": "1", "sample": 1},
            {"prompt": "a", "response": "2", "sample": 0},
            {"prompt": "b", "response": "3", "sample": 0},
        ],
    )
    found = reward_pools.read("samples.jsonl")
    assert found == [("a", ["1", "1"]), ("a", ["2"]), ("b", ["3"])]
    write(folder / "bad.jsonl", [{"prompt": "a", "response": "1"}])
    with pytest.raises(ValueError, match="line 1 is no pool"):
        reward_pools.read("bad.jsonl")


def test_the_command_writes_a_page_and_keeps_what_is_there(folder, capsys):
    argv = ["eval", "--reward_models=mine.py:length", "--reward_models=mine.py:first"]
    argv += ["--data=pairs.jsonl", "--pools=pools.jsonl", "--gold=mine.py:gold"]
    argv += ["--output=out/eval.json"]
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    assert "mine.py:length" in said and "by category: chat" in said
    text = (folder / "out/eval.html").read_text()
    for heading in (
        "By category",
        "Calibration",
        "Best of n",
        "Agreement",
        "said twice",
    ):
        assert heading in text
    assert text.count("<svg") > 6 and "NaN" not in text and "None" not in text
    before = (folder / "out/eval.json").read_bytes()
    assert cli.main(argv) == 0
    assert (folder / "out/eval.json").read_bytes() == before
    assert cli.main([*argv[:-1], "--gold=mine.py:length", argv[-1]]) == 2
    assert "made with other settings: gold" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"checkpoint": "runs/a", "reward_models": ["runs/b"]}, "are of policies"),
        ({}, "Say what to evaluate"),
        ({"checkpoint": "runs/a", "gold": "math:sqrt"}, "are for --reward_models"),
        ({"checkpoint": "runs/a"}, "Nothing to evaluate with"),
        ({"reward_models": ["operator:eq"], "gold": "operator:eq"}, "--pools="),
    ],
)
def test_what_cannot_be_is_refused(folder, flags, said):
    with pytest.raises(ValueError, match=said):
        evaluation.evaluate(data="pairs.jsonl", **flags)


def test_a_path_is_the_reward_model_there_in_its_raw_scale():
    name = reward_evaluation.judge_name
    assert name("./runs/rm") == "reward:./runs/rm?scale=raw"
    assert name("gs://b/rm") == "reward:gs://b/rm?scale=raw"
    assert name("reward:rm?scale=standard") == "reward:rm?scale=standard"
    assert name("reward:rm*?aggregate=worst") == "reward:rm*?aggregate=worst"
    assert name("text:runs/t#r.md") == "text:runs/t#r.md"
