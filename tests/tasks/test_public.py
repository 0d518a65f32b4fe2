"""The public data sets' record functions, on made-up rows of their public formats."""

import json

import pytest

from jaxalign import prepare
from jaxalign.data import records
from jaxalign.data.bad_rows import BadRow, OptionError
from jaxalign.prepare import tasks


def read(name, schema, raw, **options):
    """The checked records of one raw row, or its bad row as text."""
    transform = tasks.get_task(name).transform(schema, options)
    (found,) = records.examples([("f", 1, raw)], schema, transform=transform)
    return str(found) if isinstance(found, BadRow) else found.records


def left_out(name, schema, raw, **options):
    transform = tasks.get_task(name).transform(schema, options)
    (found,) = records.examples([("f", 1, raw)], schema, transform=transform)
    return found.left_out


def completion(text, overall, rating):
    names = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    ratings = dict(zip(names, rating, strict=True))
    return {
        "model": "m",
        "response": text,
        "overall_score": overall,
        "annotations": {k: {"Rating": v, "Rationale": "r"} for k, v in ratings.items()},
    }


ULTRA = {
    "source": "s",
    "instruction": "Do it.",
    "completions": [
        completion("a", 7.5, "4354"),
        completion("b", 3.0, ["5", "1", "1", "N/A"]),
        completion("c", 9.0, "1111"),
    ],
}


class TestUltraFeedback:
    @pytest.mark.parametrize(
        ("aspect", "rewards"),
        [
            ("overall", [7.5, 3.0, 9.0]),
            ("helpfulness", [4.0, 5.0, 1.0]),
            ("instruction_following", [5.0, 1.0, 1.0]),
            ("truthfulness", [4.0, 1.0]),
            ("mean", [4.0, 1.0]),
        ],
    )
    def test_rewards(self, aspect, rewards):
        found = read("ultrafeedback", "trajectory", ULTRA, aspect=aspect)
        assert [r["reward"] for r in found] == rewards
        missing = 3 - len(rewards)
        assert left_out("ultrafeedback", "trajectory", ULTRA, aspect=aspect) == missing

    def test_pairs(self):
        (pair,) = read("ultrafeedback", "preference", ULTRA)
        assert (pair["chosen"], pair["rejected"], pair["margin"]) == ("c", "b", 6.0)
        found = read("ultrafeedback", "preference", ULTRA, pairs="all", aspect="mean")
        assert [(p["chosen"], p["rejected"]) for p in found] == [("a", "c")]
        found = read("ultrafeedback", "preference", ULTRA, pairs="all")
        assert len(found) == 3

    def test_ties_give_no_pair(self):
        raw = ULTRA | {"completions": [completion(t, 5.0, "1111") for t in "ab"]}
        assert read("ultrafeedback", "preference", raw) == []

    def test_demonstrations(self):
        (found,) = read("ultrafeedback", "supervised", ULTRA, aspect="helpfulness")
        assert found == {"prompt": "Do it.", "completion": "b"}

    def test_tfds_hands_over_objects_of_lists(self):
        columns = {
            "response": ["a", "b"],
            "overall_score": [1.0, 2.0],
            "annotations": {
                k: {"Rating": ["1", "2"]}
                for k in ULTRA["completions"][0]["annotations"]
            },
        }
        found = read("ultrafeedback", "trajectory", ULTRA | {"completions": columns})
        assert [(r["completion"], r["reward"]) for r in found] == [("a", 1), ("b", 2)]

    def test_malformed(self):
        assert "annotations" in read(
            "ultrafeedback",
            "trajectory",
            {"instruction": "i", "completions": [{"response": "r"}]},
            aspect="honesty",
        )
        raw = ULTRA | {"completions": [completion("a", "high", "1111")]}
        assert "overall_score: expected a number or 'N/A', got 'high'" in read(
            "ultrafeedback", "trajectory", raw
        )
        with pytest.raises(OptionError, match=r"did you mean 'honesty'"):
            read("ultrafeedback", "trajectory", ULTRA, aspect="honest")
        with pytest.raises(OptionError, match="best_worst"):
            read("ultrafeedback", "preference", ULTRA, pairs="some")


HEAD = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant:"


class TestHhRlhf:
    def test_splits_where_the_dialogues_part(self):
        # The answers begin alike: the prompt must end before the words they share.
        raw = {"chosen": HEAD + " Sure, yes.", "rejected": HEAD + " Sure, no."}
        (pair,) = read("hh_rlhf", "preference", raw)
        assert pair["prompt"] == HEAD.strip()
        assert (pair["chosen"], pair["rejected"]) == ("Sure, yes.", "Sure, no.")

    def test_serves_thumbs(self):
        raw = {"chosen": HEAD + " yes", "rejected": HEAD + " no"}
        found = read("hh_rlhf", "trajectory", raw)
        assert [(r["completion"], r["label"]) for r in found] == [("yes", 1), ("no", 0)]

    @pytest.mark.parametrize(
        ("raw", "expected"),
        [
            (
                {"chosen": HEAD + " a", "rejected": HEAD},
                "f:1: rejected: expected a text that is not empty, got an empty text",
            ),
            (
                {"chosen": "x", "rejected": "y"},
                "f:1: chosen: expected a dialogue that shares a turn 'Assistant:'",
            ),
            ({"chosen": "x"}, "f:1: rejected: expected a field 'rejected', got fields"),
            ({"chosen": 1, "rejected": "y"}, "f:1: chosen: expected a dialogue as"),
        ],
    )
    def test_malformed(self, raw, expected):
        assert read("hh_rlhf", "preference", raw).startswith(expected)


class TestTldr:
    def test_demonstrations(self):
        raw = {"subreddit": "tips", "title": "T", "post": " P\n", "summary": " S "}
        assert read("tldr", "supervised", raw) == [
            {
                "prompt": "SUBREDDIT: r/tips\n\nTITLE: T\n\nPOST: P\n\nTL;DR:",
                "completion": "S",
            }
        ]

    def test_comparisons(self):
        info = {"subreddit": "s", "title": "t", "post": "p", "article": None}
        raw = {
            "info": info,
            "summaries": [{"text": " a", "policy": "x"}, {"text": "b", "policy": "y"}],
            "choice": 1,
        }
        (pair,) = read("tldr", "preference", raw)
        assert (pair["chosen"], pair["rejected"]) == ("b", "a")
        assert pair["prompt"].startswith("SUBREDDIT: r/s")
        raw["info"] = {"post": None, "article": "news"}
        assert read("tldr", "preference", raw)[0]["prompt"].startswith("ARTICLE: news")
        assert "choice: expected 0 or 1" in read(
            "tldr", "preference", raw | {"choice": 2}
        )


class TestGsm8k:
    RAW = {"question": "q", "answer": "4/2=<<4/2=2>>2\n#### 2"}

    @pytest.mark.parametrize(
        ("calculator", "expected"),
        [
            ("strip", "4/2=2\n#### 2"),
            ("keep", "4/2=<<4/2=2>>2\n#### 2"),
            ("brackets", "4/2=[4/2=2]2\n#### 2"),
        ],
    )
    def test_annotations(self, calculator, expected):
        (found,) = read("gsm8k", "supervised", self.RAW, calculator=calculator)
        assert found == {"prompt": "q", "completion": expected}

    def test_model_solutions(self):
        raw = {"question": "q", "ground_truth": "2"}
        raw["6b_finetuning"] = {"is_correct": False, "solution": "1"}
        raw["175b_verification"] = {"is_correct": True, "solution": "<<1+1=2>>2"}
        assert read("gsm8k", "trajectory", raw) == [
            {
                "prompt": "q",
                "completion": text,
                "label": label,
                "reward": float(label),
                "metadata": {"ground_truth": "2"},
            }
            for text, label in (("1", 0), ("2", 1))
        ]
        for schema in ("trajectory", "rationale"):
            assert "f:1: 6b_finetuning: expected a field" in read(
                "gsm8k", schema, self.RAW
            )

    def test_right_over_wrong_with_the_reference_as_rationale(self):
        raw = {"question": "q", "ground_truth": "1+1=<<1+1=2>>2"}
        for i, (right, text) in enumerate([(0, "3"), (1, "2"), (0, "4"), (0, "3")]):
            raw[f"m{i}"] = {"is_correct": bool(right), "solution": text}
        assert read("gsm8k", "rationale", raw) == [
            {
                "prompt": "q",
                "chosen": "2",
                "rejected": wrong,
                "margin": 0.0,
                "rationale": "1+1=2",
            }
            for wrong in ("3", "4")
        ]
        for i in range(4):
            raw[f"m{i}"]["is_correct"] = True
        assert left_out("gsm8k", "rationale", raw) == 0


class TestAlpacaEval:
    RAW = {
        "instruction": "i",
        "baseline": "base",
        "responses": [
            {"generator": "g0", "text": "a", "preference": 1.02},
            {"generator": "g1", "text": "b", "preference": 1.97},
            {"generator": "g2", "text": "c", "preference": 1.6},
            {"generator": "g3", "text": "base", "preference": 2},
        ],
    }

    def test_trajectories(self):
        found = read("alpaca_eval", "trajectory", self.RAW)
        assert [r["label"] for r in found] == [0, 1, 1, 1]
        assert [r["reward"] for r in found] == pytest.approx([0.02, 0.97, 0.6, 1.0])

    def test_confident_pairs(self):
        found = read("alpaca_eval", "preference", self.RAW)
        assert [(p["chosen"], p["rejected"]) for p in found] == [
            ("base", "a"),
            ("b", "base"),
        ]
        assert [p["margin"] for p in found] == pytest.approx([0.96, 0.94])
        assert left_out("alpaca_eval", "preference", self.RAW) == 2
        found = read("alpaca_eval", "preference", self.RAW, confidence=0.5)
        assert len(found) == 3

    def test_demonstrations(self):
        assert read("alpaca_eval", "supervised", self.RAW) == [
            {"prompt": "i", "completion": "base"}
        ]

    @pytest.mark.parametrize("value", [0.5, "1", True, None])
    def test_malformed(self, value):
        raw = self.RAW | {"responses": [{"text": "a", "preference": value}]}
        assert read("alpaca_eval", "trajectory", raw).startswith(
            "f:1: preference: expected a number in [1, 2], got"
        )


def test_every_task_is_listed_with_its_schemas():
    listed = {t["name"]: t for t in prepare.list_tasks()}
    assert set(listed) >= {"ultrafeedback", "hh_rlhf", "tldr", "gsm8k", "alpaca_eval"}
    assert listed["gsm8k"]["schemas"] == [
        "supervised",
        "trajectory",
        "preference",
        "rationale",
    ]
    assert listed["gsm8k"]["options"] == {"calculator": "strip"}
    assert all(t["doc"].endswith(".") for t in listed.values())
    json.dumps(list(listed.values()))


def test_unknown_tasks_and_registrations():
    with pytest.raises(ValueError, match=r"did you mean 'ultrafeedback'\?"):
        tasks.get_task("ultrafedback")
    for name, kinds in (("a b", {"supervised": len}), ("a", {"sft": len}), ("a", {})):
        with pytest.raises(ValueError, match="letters, digits"):
            prepare.add_task(name, doc="", records=kinds)
