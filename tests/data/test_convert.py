"""One bin as arrays: a golden by hand, and tokens found again by their segments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign import batch as batch_lib
from jaxalign.data.convert import empty_batch, mismatched, to_arrays
from jaxalign.data.plan import Placement, RowShape, pack
from jaxalign.data.rows import Row, build_index

NAN = float("nan")


def ids(*tokens):
    return np.array(tokens, np.int32)


# A preference with a rationale (two prompts) and a rewarded single response.
ROWS = [
    Row(
        key="a",
        prompts=[ids(11, 12, 13, 14, 1), ids(15, 1)],
        responses=[ids(21, 22, 1), ids(23, 24, 25, 26, 1), ids(27, 1)],
        response_prompt=[0, 0, 1],
        response_kind=[0, 0, 1],
        response_reward=[NAN, NAN, NAN],
        response_label=[-1, -1, -1],
        pairs=[(0, 1, 0.5)],
    ),
    Row(
        key="b",
        prompts=[ids(16, 1)],
        responses=[ids(28, 1)],
        response_prompt=[0],
        response_kind=[0],
        response_reward=[3.0],
        response_label=[1],
    ),
]
PLACEMENT = Placement(np.array([7, 4]), np.array([0, 1, 1, 0]), inputs=4, targets=4)
SHAPE = RowShape(10, 2, 8, 4, 5, 2)

GOLDEN = {
    # The first prompt is cut to 4 and keeps its EOS; the second response loses it.
    "encoder_input_tokens": [11, 12, 13, 1, 15, 1, 16, 1, 0, 0],
    "encoder_segment_ids": [1, 1, 1, 1, 2, 2, 3, 3, 0, 0],
    "decoder_target_tokens": [
        [21, 22, 1, 28, 1, 0, 0, 0],
        [23, 24, 25, 26, 27, 1, 0, 0],
    ],
    "decoder_input_tokens": [
        [0, 21, 22, 0, 28, 0, 0, 0],
        [0, 23, 24, 25, 0, 27, 0, 0],
    ],
    "decoder_segment_ids": [[1, 1, 1, 4, 4, 0, 0, 0], [2, 2, 2, 2, 3, 3, 0, 0]],
    "decoder_loss_weights": [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]],
    "prompt_mask": [1, 1, 1, 0],
    "prompt_id": [7, 7, 4, -1],
    "response_mask": [1, 1, 1, 1, 0],
    "response_prompt": [0, 0, 1, 2, 0],
    # Row 0 is matched with row 1, whose only prompt is number 2, and back.
    "response_kl_prompt": [2, 2, 2, 0, -1],
    "response_kind": [0, 0, 1, 0, 0],
    "response_reward": [0, 0, 0, 3, 0],
    "response_label": [-1, -1, -1, 1, -1],
    "pair_mask": [1, 0],
    "pair_chosen": [0, 0],
    "pair_rejected": [1, 0],
    "pair_margin": [0.5, 0],
}


def test_golden_bin():
    arrays = to_arrays(ROWS, PLACEMENT, SHAPE)
    assert set(arrays) == set(GOLDEN)
    for name, expected in GOLDEN.items():
        np.testing.assert_array_equal(arrays[name], expected, err_msg=name)
    batch_lib.check({name: array[None] for name, array in arrays.items()})


def test_columns_rewards_and_identities():
    column = np.array([-1.5, -2.5, -3.5, -4.5], np.float32)
    arrays = to_arrays(
        ROWS, PLACEMENT, SHAPE, {"response_ref_logps": column},
        reward_stats=(1.0, 4.0), prompt_ids=[107, 104],
    )  # fmt: skip
    assert arrays["response_ref_logps"].tolist() == [-1.5, -2.5, -3.5, -4.5, 0.0]
    # Absent rewards stay 0, which is the mean of standardised ones.
    assert arrays["response_reward"].tolist() == [0, 0, 0, 0.5, 0]
    assert arrays["prompt_id"].tolist() == [107, 107, 104, -1]
    assert "response_ref_kl_logps" not in arrays


def test_writes_into_a_batch():
    batch = empty_batch(SHAPE, 2)
    out = {name: array[1] for name, array in batch.items()}
    to_arrays(ROWS, PLACEMENT, SHAPE, out=out)
    for name, expected in GOLDEN.items():
        np.testing.assert_array_equal(batch[name][1], expected)
    for name in ("prompt_mask", "response_mask", "pair_mask", "decoder_loss_weights"):
        assert not batch[name][0].any()
    assert (batch["response_kl_prompt"][0] == -1).all()
    assert not batch["encoder_segment_ids"][0].any()


def test_wrong_rows_are_refused():
    with pytest.raises(ValueError, match="2 rows with 4 responses; got 1 rows with 3"):
        to_arrays(ROWS[:1], PLACEMENT, SHAPE)
    small = RowShape(10, 2, 8, 4, 3, 2)
    with pytest.raises(ValueError, match="3 prompts, 4 responses and 1 pairs does not"):
        to_arrays(ROWS, PLACEMENT, small)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_mismatched_prompts_differ_and_are_a_permutation(prompts):
    partner = mismatched(prompts)
    most = max(prompts.count(p) for p in prompts)
    if most == len(prompts):
        assert partner == [-1] * len(prompts)
        return
    assert all(prompts[j] != prompts[i] for i, j in enumerate(partner))
    if most <= len(prompts) / 2:
        assert sorted(partner) == list(range(len(prompts)))


def test_different_neighbours_are_exchanged():
    assert mismatched("ab") == [1, 0]
    assert mismatched("abc") == [1, 2, 0]
    assert mismatched("abcd") == [1, 0, 3, 2]
    assert mismatched("abcde") == [1, 0, 3, 4, 2]
    assert mismatched("a") == [-1]


tokens = st.lists(st.integers(2, 50), max_size=9).map(lambda t: ids(*t, 1))


@st.composite
def rows(draw):
    prompts = draw(st.lists(tokens, min_size=1, max_size=2))
    responses = draw(st.lists(tokens, min_size=1, max_size=4))
    count = len(responses)
    pick = st.integers(0, len(prompts) - 1)
    return Row(
        key="",
        prompts=prompts,
        responses=responses,
        response_prompt=draw(st.lists(pick, min_size=count, max_size=count)),
        response_kind=[0] * count,
        response_reward=[float(i) for i in range(count)],
        response_label=[i % 2 for i in range(count)],
        pairs=[(i + 1, i, float(i)) for i in range(count - 1)],
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(rows(), min_size=1, max_size=8))
def test_every_token_is_found_by_its_segment(examples):
    plan = pack(build_index(examples), inputs=6, targets=5, packing=3)
    for b in range(len(plan)):
        placement = plan[b]
        members = [examples[i] for i in placement.row_ids]
        a = to_arrays(members, placement, plan.shape)
        response, pair, prompt = 0, 0, 0
        for row_id, row in zip(placement.row_ids, members, strict=True):
            for number, expected in enumerate(row.prompts):
                found = a["encoder_input_tokens"][
                    a["encoder_segment_ids"] == prompt + number + 1
                ]
                cut = expected.tolist()
                cut = cut if len(cut) <= 6 else [*cut[:5], 1]
                assert found.tolist() == cut
                assert a["prompt_id"][prompt + number] == row_id
            for c, r, margin in row.pairs:
                assert a["pair_chosen"][pair] == response + c
                assert a["pair_rejected"][pair] == response + r
                assert a["pair_margin"][pair] == margin
                differ = row.responses[c][:5].tolist() != row.responses[r][:5].tolist()
                assert a["pair_mask"][pair] == differ
                pair += 1
            for j, expected in enumerate(row.responses):
                here = a["decoder_segment_ids"] == response + 1
                assert np.flatnonzero(here.any(axis=1)).tolist() == [
                    placement.decoder_rows[response]
                ]
                target = expected[:5].tolist()
                assert a["decoder_target_tokens"][here].tolist() == target
                assert a["decoder_input_tokens"][here].tolist() == [0, *target[:-1]]
                assert a["decoder_loss_weights"][here].all()
                assert a["response_prompt"][response] == prompt + row.response_prompt[j]
                assert a["response_reward"][response] == j
                assert a["response_label"][response] == j % 2
                response += 1
            prompt += len(row.prompts)
        assert a["response_mask"].sum() == response
        assert a["prompt_mask"].sum() == prompt
        assert not a["pair_mask"][pair:].any()
        padding = a["decoder_segment_ids"] == 0
        assert not a["decoder_target_tokens"][padding].any()
        assert not a["decoder_loss_weights"][padding].any()
