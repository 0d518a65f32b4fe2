"""What may go wrong with a steered file: potentials and templates."""

from __future__ import annotations

import math
import sys
import types

import jax
import numpy as np
import pytest
import sentence_pieces

from jaxalign import judges
from jaxalign.inference import steering


@pytest.fixture
def judge(monkeypatch):
    """A judge that returns what it is given."""

    def make(value, beta=1.0):
        module = types.ModuleType("my_judges")
        module.score = lambda prompt, response: value
        monkeypatch.setitem(sys.modules, "my_judges", module)
        scorer = judges.resolve("my_judges:score")
        prompts = ["say a", "say b"]
        return steering._Judge("my_judges:score", scorer, beta, prompts)

    return make


@pytest.mark.parametrize(
    ("value", "beta"),
    [(math.nan, 1.0), (math.inf, 1.0), (None, 1.0), (1e39, 1.0), (1e30, 1e-9)]
    + [("much", 1.0), (10**400, 1.0)],
)
def test_a_potential_that_is_no_number_names_prompt_response_and_value(
    judge, value, beta
):
    made = judge(value, beta)
    assert made(["one", "two"], [1, 0]) == [-math.inf] * 2
    with pytest.raises(ValueError) as error:
        made.check()
    for part in ("my_judges:score", repr(value), "'say b'", "'one'"):
        assert part in str(error.value)


def test_numbers_and_minus_infinity_pass(judge):
    made = judge(-math.inf)
    assert made(["one"], [0]) == [-math.inf] and made.forbidden == 1
    made.check()
    assert judge(3, beta=2.0)(["one"], [0]) == [1.5]
    # What float32 does not hold on the other side forbids as good as anything.
    (value,) = judge(-1e300)(["one"], [0])
    assert np.isfinite(np.float32(value)) and value < -1e30
    with pytest.raises(ValueError, match="beta must be above 0 and finite"):
        judge(1.0, beta=math.inf)


@pytest.mark.parametrize(
    "template",
    [
        "I like [BLANK], not [BLANK].",
        "- [BLANK]\n- [BLANK]\n",
        "f([BLANK]) = {[BLANK]}",
        "pre[BLANK]fix",
        " [BLANK] [BLANK]  x ",
        "[BLANK] is",
    ],
)
def test_text_between_blanks_is_spelt_to_the_letter(tmp_path, template):
    for vocabulary in sentence_pieces.vocabularies(str(tmp_path))[1:]:
        word = vocabulary.encode("fox")
        texts, ids, expected = template.split("[BLANK]"), [], ""
        try:
            for i, text in enumerate(texts):
                last = i + 1 == len(texts)
                own, left = steering._fixed_ids(text, vocabulary, i > 0, not last)
                inside = vocabulary.encode_inside("fox")
                ids += own + (not last) * (word if left or not i + len(own) else inside)
                expected += text + (not last) * "fox"
        except ValueError as error:
            assert not vocabulary.escape and "cannot be spelt" in str(error)
            continue
        assert vocabulary.decode(ids) == expected


def test_a_blank_that_begins_with_a_space():
    spaced = np.array([False, False, False, True, False])
    program = steering.programs.infilling([[2], None, [2], None], [1], spaced)
    assert program.template.tolist() == [2, -1, 2, -2, 1]
    context = steering.programs.Context(
        np.zeros((1, 5), np.float32), np.zeros(9, np.int32), 0, 9, 0
    )

    def allowed(state):
        return np.flatnonzero(np.isfinite(program.proposal(state, context))).tolist()

    assert allowed((1, True)) == [0, 2, 3, 4]
    assert allowed((3, True)) == [3]
    assert allowed((3, False)) == [0, 2, 3, 4]
    assert jax.device_get(program.init()) == (0, True)
