"""Functions as judges, sums of judges, and the strings that name them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from jaxalign import judges


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def length(prompt, response):
    return len(response)


def test_arguments_tell_judges_apart():
    pairwise = [
        lambda prompt, response: 0.0,
        lambda prompt, response, scale=1.0: 0.0,
        lambda prompt, response, metadata: 0.0,
        lambda prompt, a, b: 0.5,
        lambda prompt, a, b, *, metadata=None: 0.5,
    ]
    found = [judges.is_pairwise(judges.from_function(f)) for f in pairwise]
    assert found == [False, False, False, True, True]

    class Judge:
        def __call__(self, prompt, a, b):
            return 0.5

    assert judges.is_pairwise(judges.from_function(Judge()))
    with pytest.raises(ValueError, match=r"takes \(prompt, response\).*\['x'\]"):
        judges.from_function(lambda x: 1.0)


def test_a_function_that_takes_lists_is_called_once():
    calls = []

    def by_name(prompts, responses):
        calls.append(len(prompts))
        return [len(r) for r in responses]

    def by_annotation(asked: list[str], said: list[str]):
        return by_name(asked, said)

    def by_protocol(asked: Sequence[str], said: Sequence[str]):
        return np.array(by_name(asked, said))

    for function in (by_name, by_annotation, by_protocol):
        found = judges.from_function(function)(["p", "q"], ["a", "bb"])
        assert found.dtype == np.float32 and found.tolist() == [1.0, 2.0]
    assert calls == [2, 2, 2]

    def real_annotation(asked, said):
        return by_name(asked, said)

    real_annotation.__annotations__ = {"asked": list[str], "said": list}
    assert judges.from_function(real_annotation)(["p"], ["a"]).tolist() == [1.0]

    def pairs(prompts, a, b):
        return [float(len(x) > len(y)) for x, y in zip(a, b, strict=True)]

    judge = judges.from_function(pairs)
    assert judge.compare(["p", "q"], ["aa", "b"], ["a", "bb"]).tolist() == [1.0, 0.0]
    short = judges.from_function(lambda prompts, responses: [1.0])
    with pytest.raises(ValueError, match="given 2 prompts and returned 1 numbers"):
        short(["p", "q"], ["a", "b"])


def test_metadata_reaches_those_who_ask_for_it():
    def right(prompt, response, metadata):
        return None if metadata is None else response == metadata["answer"]

    def all_right(prompts, responses, metadata):
        pairs = zip(responses, metadata, strict=True)
        return [r == m["answer"] for r, m in pairs]

    rows = [{"answer": "a"}, {"answer": "a"}]
    for function in (right, all_right):
        judge = judges.from_function(function)
        assert judge(["p", "p"], ["a", "b"], rows).tolist() == [1.0, 0.0]
        found = judges.verdicts([("p", ["a", "b"])], judge, rows[:1])
        assert found[0].tolist() == [1.0, 0.0]
    assert np.isnan(judges.from_function(right)(["p"], ["a"])).all()
    assert judges.from_function(length)(["p"], ["aa"], rows[:1]).tolist() == [2.0]


def test_what_is_no_number_names_judge_and_prompt():
    def wordy(prompt, response):
        return "good" if response == "b" else None

    judge = judges.from_function(wordy, "my.py:wordy")
    assert np.isnan(judge(["p"], ["a"])).all()
    with pytest.raises(ValueError, match="my.py:wordy returned 'good' for prompt 'q'"):
        judge(["p", "q"], ["a", "b"])
    huge = judges.from_function(lambda p, r: 1e39)
    with pytest.raises(ValueError, match="returned inf for prompt 'p'"):
        judges.scores(huge, ["p"], ["r"])


def test_sums_by_hand_ask_each_part_once(folder):
    (folder / "my.py").write_text(
        "CALLS = []\n"
        "def length(prompts, responses):\n"
        "    CALLS.append(1)\n"
        "    return [len(r) for r in responses]\n"
        "def short(prompt, response):\n"
        "    return None if response == '?' else len(response) < 3\n"
        "def wins(prompt, a, b):\n"
        "    return 0.5\n"
        "CALLED = lambda prompt, response: len(CALLS)\n"
    )
    judge = judges.resolve("0.5*my.py:length - 2 * my.py:short + my.py:length")
    found = judge(["p"] * 3, ["aa", "aaaa", "?"])
    # 1 - 2 + 2; 2 - 0 + 4; no verdict.
    np.testing.assert_array_equal(found, np.float32([1.0, 6.0, np.nan]))
    assert judges.resolve("my.py:CALLED")(["p"], ["r"]).tolist() == [2.0]
    assert judges.resolve("-1*my.py:length")(["p"], ["aa"]).tolist() == [-2.0]
    assert judges.resolve("1e-1*my.py:length")(["p"], ["aa"]) == np.float32(0.2)
    with pytest.raises(ValueError, match="one of its parts compares two responses"):
        judges.resolve("0.5*my.py:length + 0.5*my.py:wins")


def test_fingerprints_change_with_content(folder):
    def fingerprints(code):
        (folder / "my.py").write_text(code)
        names = ("my.py:score", "my.py:other", "2*my.py:score", "3*my.py:score")
        return [judges.resolve(name).fingerprint for name in names]

    code = "def score(prompt, response):\n    return {}\nother = score\n"
    one = fingerprints(code.format(1))
    assert len(set(one)) == 4
    assert fingerprints(code.format(1)) == one
    assert not {*fingerprints(code.format(2))} & {*one}
    # A folder of the same content is the same judge.
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "my.py").write_text(code.format(1))
    assert judges.resolve("elsewhere/my.py:score").fingerprint == one[0]


def test_an_object_that_says_what_it_depends_on_is_used_as_it_is(folder):
    (folder / "my.py").write_text(
        "class Judge:\n"
        "    fingerprint = 'mine'\n"
        "    def __call__(self, prompts, responses, metadata=None):\n"
        "        return [7.0] * len(prompts)\n"
        "JUDGE = Judge()\n"
    )
    judge = judges.resolve("my.py:JUDGE")
    assert judge.fingerprint == "mine"
    assert judges.scores(judge, ["p", "q"], ["a", "b"]).tolist() == [7.0, 7.0]
    type(judge).__call__ = lambda *_: [1.0]
    with pytest.raises(ValueError, match=r"asked for 2 verdicts .* shape \(1,\)"):
        judges.scores(judge, ["p", "q"], ["a", "b"])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("rewards:runs/rm", "Did you mean 'reward'.* A judge is file.py:function"),
        ("runs/rm", "got 'runs/rm'. A judge is .*reward:RUN_DIR"),
        ("likelihood:", "'likelihood:' names nothing to ask"),
        ("token:runs/m", "token:runs/m#250089"),
        ("token:runs/m#x", "names no token"),
        ("likelihood:runs/m#men", "asks for 'men'; expected likelihood:runs/m or"),
        ("reward:runs/nowhere", "No checkpoint at .*runs/nowhere"),
        ("text:rubric.md", "names no rubric: expected text:TEACHER#RUBRIC.md"),
        ("text:runs/sft#rubrik.md", r"No template at rubrik.md \(did you mean 'rubr"),
        ("text:runs/sft#empty.md", r"either {response}.* or {a} and {b}"),
        ("math:sqr", "'math' has no 'sqr'. Did you mean 'sqrt'"),
    ],
)
def test_mistakes_name_the_kind_and_the_nearest(folder, name, told):
    (folder / "rubric.md").write_text("{prompt} {response}")
    (folder / "empty.md").write_text("{prompt}")
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        judges.resolve(name)


def test_groups_of_a_pairwise_judge_by_hand(caplog):
    calls = []

    def longer(prompts, a, b):
        calls.append(list(zip(prompts, a, b, strict=True)))
        return [
            None if "?" in (x, y) else 0.5 + 0.5 * np.sign(len(x) - len(y))
            for x, y in zip(a, b, strict=True)
        ]

    groups = [("p", ["aa", "b", "cccc"]), ("q", ["x", "?"]), ("r", ["z"]), ("s", [])]
    found = judges.verdicts(groups, judges.from_function(longer))
    assert len(calls) == 1 and len(calls[0]) == 8  # four pairs, in both orders
    assert calls[0][:2] == [("p", "aa", "b"), ("p", "b", "aa")]
    assert [f.tolist() for f in found[:1]] == [[0.5, 0.0, 1.0]]
    assert np.isnan(found[1]).all() and found[2].tolist() == [0.5]
    assert found[3].size == 0 and "1 of 4 comparisons" in caplog.text


def test_groups_asked_together_are_as_one_by_one(caplog):
    groups = [("p", ["a", "bb"]), ("q", []), ("r", ["?", "dddd"])]
    judge = judges.from_function(lambda p, r: None if r == "?" else len(r) / 3)
    together = judges.verdicts(groups, judge)
    assert "1 of 4 responses have no verdict" in caplog.text
    for group, found in zip(groups, together, strict=True):
        (alone,) = judges.verdicts([group], judge)
        np.testing.assert_array_equal(alone, found)
    assert together[2].dtype == np.float32 and np.isnan(together[2][0])
    assert judges.verdicts([], judge) == []


def test_a_judge_of_the_place_only_finds_ties():
    first = judges.from_function(lambda p, a, b: 0.9)
    preferred, bias = judges.preferences(first, ["p", "q"], ["a", "b"], ["c", "d"])
    assert preferred.tolist() == [0.5, 0.5]
    np.testing.assert_allclose(bias, 0.8, rtol=1e-6)
    wrong = judges.from_function(lambda p, a, b: 1.5)
    with pytest.raises(ValueError, match=r"returned 1.5 for prompt 'p'; .* \[0, 1\]"):
        judges.preferences(wrong, ["p"], ["a"], ["b"])
