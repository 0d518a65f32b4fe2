"""Teachers asked with a rubric: what is read off an answer, faults, both orders."""

from __future__ import annotations

import json

import echo_server
import fault_server
import numpy as np
import pytest

from jaxalign import evaluation, judges
from jaxalign.judges.template import Template

HEADLESS = "Rate the answer {response} to {prompt}."


class Said:
    """A teacher that says what is written down, whatever it is asked."""

    fingerprint = "said"

    def __init__(self, *answers):
        self.answers, self.asked = answers, []

    def generate(self, prompts, *, n=1, **settings):
        self.asked.append((prompts, n, settings))
        return [list(self.answers[i * n : i * n + n]) for i in range(len(prompts))]


def judge(rubric, *answers):
    kind = judges.TextPreference if "{a}" in rubric else judges.TextJudge
    return kind(Said(*answers), Template(rubric, "rubric.md", judges.text._SETTINGS))


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Clear and right. Score: 4", 4.0),
        ("First I thought 2, but it is 3.5.", 3.5),
        ("4/5", 4.0),
        ("4 out of 5", 4.0),
        ("-1", -1.0),
        ("On a scale of 1-5", 1.0),
        ("Step2 is wrong", None),
        ("I cannot say.", None),
        ("", None),
        (None, None),
    ],
)
def test_the_last_number_counts(answer, score):
    (found,) = judge(HEADLESS, answer)(["p"], ["r"])
    assert found == score if score is not None else np.isnan(found)


@pytest.mark.parametrize(
    ("answer", "preference"),
    [
        ("A", 1.0),
        ("Both are fine, but B.", 0.0),
        ("The better one is B. A clear win.", 0.0),
        ("It is a tie", 0.5),
        ("ABBA", None),
        (None, None),
    ],
)
def test_the_last_letter_counts(answer, preference):
    (found,) = judge("{prompt}: {a} or {b}?", answer).compare(["p"], ["x"], ["y"])
    assert found == preference if preference is not None else np.isnan(found)


def test_the_head_says_how_it_is_asked_and_read():
    rubric = (
        "---\nread: [Ss]core: (\\d+)\nrange: 1 5\nsamples: 3\nmax_tokens: 7\n---\n"
        '{"reference": {reference}} {prompt} {response}'
    )
    answers = ["score: 2 of 5 words", "no", "Score: 5", "Score: 6", "7", "Score: 0"]
    made = judge(rubric, *answers)
    rows = [{"reference": "{prompt}"}, {"reference": "x"}]
    found = made(["p", "q"], ["{response}", "s"], rows)
    np.testing.assert_array_equal(found, np.float32([3.5, np.nan]))
    ((prompts, n, settings),) = made._teacher.asked
    assert prompts[0] == '{"reference": {prompt}} p {response}' and n == 3
    assert settings == {"temperature": 1.0, "max_tokens": 7}
    with pytest.raises(ValueError, match="rubric.md asks for {reference}, which is no"):
        made(["p"], ["r"], [{"referense": "x"}])


@pytest.mark.parametrize(
    ("head", "told"),
    [
        ("reed: x", "sets 'reed: x' at its head; .*did you mean 'read'"),
        ("samples: few", "samples must be a number, got 'few'"),
        ("read: (", "expected 'read: REGULAR EXPRESSION'"),
        ("range: 5", "'range: LOW HIGH'"),
    ],
)
def test_mistakes_at_the_head_are_named(head, told):
    with pytest.raises(ValueError, match=told):
        judge(f"---\n{head}\n---\n{HEADLESS}", "")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxalign.teachers.http.FOLDER", str(tmp_path / "answers"))
    (tmp_path / "rubric.md").write_text("Rate {response} for {prompt}.")
    (tmp_path / "pair.md").write_text("{prompt}: {a} or {b}?")
    return tmp_path


def test_a_server_that_fails_gives_no_verdict_where_it_must(folder, caplog):
    asked = []

    def answer(body):
        asked.append(body)
        text = body["messages"][-1]["content"]
        if "bad" in text:
            return 400, {"error": {"message": "too long"}}
        if "busy" in text and sum("busy" in json.dumps(a) for a in asked) < 3:
            return 503, {"error": {"message": "busy"}}
        return fault_server.completion(["Hmm." if "odd" in text else "It is a 4"])

    with fault_server.serving(answer) as url:
        made = judges.resolve(f"0.5*text:{url}#m#rubric.md")
        responses = ["good", "bad", "busy", "odd"]
        found = judges.scores(made, ["p"] * 4, responses)
        np.testing.assert_array_equal(found, np.float32([2.0, np.nan, 2.0, np.nan]))
        assert "2 of 4 responses have no verdict" in caplog.text
        count = len(asked)
        # What was answered is kept, and asked for no more.
        again = judges.resolve(f"0.5*text:{url}#m#rubric.md")
        assert again.fingerprint == made.fingerprint
        judges.scores(again, ["p"] * 2, ["good", "odd"])
        assert len(asked) == count and asked[0]["temperature"] == 0.0
        (folder / "rubric.md").write_text("Grade {response} for {prompt}.")
        other = judges.resolve(f"0.5*text:{url}#m#rubric.md")
        assert other.fingerprint != made.fingerprint


def test_pairs_are_asked_in_both_orders(folder):
    def longer(body):  # or what stands first
        a, b = body["messages"][-1]["content"][3:-1].split(" or ")
        return fault_server.completion(["B" if len(b) > len(a) else "A"])

    with fault_server.serving(longer) as url:
        made = judges.resolve(f"text:{url}#m#pair.md")
        found = evaluation.compare_responses(
            ["p", "q", "r"], ["xx", "x", "x"], ["y", "yy", "y"], made
        )
    assert (found.wins, found.ties, found.losses) == (1, 1, 1)
    assert found.position_bias == pytest.approx(1 / 3)


def test_a_recording_is_a_judge(folder):
    rows = [{"prompt": "Rate a for p.", "response": "Score 3"}]
    (folder / "said.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    made = judges.resolve("text:recorded:said.jsonl#rubric.md")
    found = made(["p", "p"], ["a", "b"])
    assert found[0] == 3.0 and np.isnan(found[1])


def test_our_own_server_judges(folder):
    with echo_server.running() as port:
        url = f"http://127.0.0.1:{port}/v1"
        made = judges.resolve(f"text:{url}#tiny#rubric.md")
        found = made(["p", "q", "r"], ["a 3", "b 12", "none"])
    np.testing.assert_array_equal(found, np.float32([3.0, 12.0, np.nan]))
