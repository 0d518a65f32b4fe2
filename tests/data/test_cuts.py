"""What truncation makes equal is told apart by what the network sees."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data import Row, build_index, pack, seen, to_arrays
from jaxalign.training import inputs as inputs_lib

NAN = float("nan")


class Rows(list):
    """Rows in memory, as far as they pass for a cache."""

    path = "rows"

    @property
    def index(self):
        return build_index(self)


def row(prompt, *responses):
    """A row of texts whose letters are tokens, with a pair of each two responses."""
    texts = [np.array([*map(ord, t), 1], np.int32) for t in (prompt, *responses)]
    count = len(responses)
    return Row(
        key=prompt,
        prompts=texts[:1],
        responses=texts[1:],
        response_prompt=[0] * count,
        response_kind=[0] * count,
        response_reward=[NAN] * count,
        response_label=[1] * count,
        pairs=[(i, i + 1, 0.5) for i in range(count - 1)],
    )


def visible(tokens, segments, number):
    return tuple(tokens[segments == number + 1].tolist())


TEXTS = st.text("ab", min_size=0, max_size=5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=12),
    st.integers(2, 5),
    st.integers(1, 5),
)
def test_what_is_masked_is_what_the_arrays_show_to_be_equal(texts, inputs, targets):
    rows = Rows(row(*of_row) for of_row in texts)
    found = seen(rows, inputs=inputs, targets=targets)
    options = dict(inputs=inputs, targets=targets, packing=3, seen=found)
    try:
        plan = pack(rows.index, **options, min_prompts=2)
    except ValueError:  # too few different prompts are left
        plan = pack(rows.index, **options)
    masked = 0
    for placement in map(plan.__getitem__, range(len(plan))):
        of_bin = [rows[i] for i in placement.row_ids]
        out = to_arrays(of_bin, placement, plan.shape)
        shown = [
            visible(out["decoder_target_tokens"], out["decoder_segment_ids"], r)
            for r in range(plan.shape.responses)
        ]
        prompts = [
            visible(out["encoder_input_tokens"], out["encoder_segment_ids"], p)
            for p in range(plan.shape.prompts)
        ]
        for q in range(sum(len(r.pairs) for r in of_bin)):
            same = shown[out["pair_chosen"][q]] == shown[out["pair_rejected"][q]]
            assert out["pair_mask"][q] == (not same)
            masked += same
        for r in np.flatnonzero(out["response_mask"]):
            own, other = out["response_prompt"][r], out["response_kl_prompt"][r]
            if other >= 0:
                assert prompts[own] != prompts[other]
            else:
                assert len(set(prompts) - {()}) == 1
    assert masked == found.equal["pairs"] == plan.equal["pairs"]
    whole = [text for text, *_ in texts]
    cut = [tuple(text[: inputs - 1]) for text in whole]
    assert found.equal["prompts"] == sum(
        any(c == d and w != v for d, v in zip(cut, whole, strict=True))
        for c, w in zip(cut, whole, strict=True)
    )


def test_nothing_that_is_cut_leaves_plan_and_fingerprint_as_they_were():
    rows = Rows([row("abc", "xy", "z"), row("abd", "x", "yz")])
    options = dict(inputs=9, targets=9, packing=2)
    found = seen(rows, inputs=9, targets=9)
    assert found.equal == {"prompts": 0, "pairs": 0}
    plain, looked = (pack(rows.index, **options, seen=s) for s in (None, found))
    assert plain.fingerprint == looked.fingerprint


def test_prompts_that_are_all_equal_once_cut_are_refused_with_the_reason():
    rows = Rows(row(f"instructions {i}", "a") for i in range(6))
    found = seen(rows, inputs=8, targets=8)
    assert found.equal["prompts"] == 6
    with pytest.raises(
        ValueError, match=r"1 different prompts .*cut to 8 tokens.*\['inputs'\]"
    ):
        pack(rows.index, inputs=8, targets=8, packing=2, min_prompts=2, seen=found)


def _told(rows, targets):
    found = seen(rows, inputs=9, targets=targets)
    plan = pack(rows.index, inputs=9, targets=targets, packing=2, seen=found)
    inputs_lib._tell_equal({"train": [rows]}, {"train": [plan]})


def test_pairs_equal_once_cut_are_counted_and_told(caplog):
    rows = Rows([row("p", "it is so", "it is not"), row("q", "yes", "no")])
    with caplog.at_level(logging.WARNING):
        _told(rows, 9)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        _told(rows, 5)
    assert "1 of 2 pairs (train) are equal once" in caplog.text
    assert "TASK_FEATURE_LENGTHS['targets']" in caplog.text


def test_pairs_that_are_all_equal_once_cut_are_refused():
    with pytest.raises(ValueError, match="1 of 1 pairs .* nothing to learn from"):
        _told(Rows([row("p", "it is so", "it is not")]), 5)
