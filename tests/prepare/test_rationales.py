"""Prompts about pairs: what they show, and what they do not give away."""

from __future__ import annotations

import pytest

from jaxalign import world
from jaxalign.data.bad_rows import OptionError
from jaxalign.prepare import rationales

PAIR = {"prompt": "2 + 2?", "chosen": "four", "rejected": "five"}


@pytest.mark.parametrize("second", [False, True])
def test_the_policy_is_not_told_which_answer_won(second):
    text = rationales.rationale_prompt(PAIR, second)
    mirrored = {**PAIR, "chosen": "five", "rejected": "four"}
    assert text == rationales.rationale_prompt(mirrored, not second)


@pytest.mark.parametrize("kind", rationales.KINDS)
@pytest.mark.parametrize("second", [False, True])
def test_the_teacher_is_told(kind, second):
    text = rationales.request(PAIR, kind, second)
    winner, loser = ("B", "A") if second else ("A", "B")
    assert f"Response {winner}: four" in text and f"Response {loser}: five" in text
    assert f"Response {winner} was preferred." in text
    assert f"[chosen] for response {winner}" in text
    assert ("specific" in text) == (kind == "specific")


def test_another_kind_is_refused_by_name():
    with pytest.raises(OptionError, match=r"got 'specifc' \(did you mean 'specific'"):
        rationales.request(PAIR, "specifc", False)


def test_the_village_gives_both_kinds():
    prompt = "What is Gus's pet?"
    pair = "Gus keeps a mole.", "Ugh! Gus keeps a fox."
    general = world.rationale(prompt, *pair, kind="general")
    specific = world.rationale(prompt, *pair, kind="specific")
    assert general == "The better answer is right and kinder."
    assert specific == f"{general} Gus keeps a mole."
    with pytest.raises(ValueError, match="did you mean 'general'"):
        world.rationale(prompt, *pair, kind="generel")
