"""The packing plan: every row once, capacities kept, and close to full."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data.plan import RowShape, common_shape, pack
from jaxalign.data.rows import Index


def make_index(rows):
    """An index of rows given as (prompt lengths, response lengths, hash)."""
    prompts, responses, hashes = zip(*rows, strict=True)
    total = sum(map(len, responses))
    return Index(
        prompt_offsets=np.cumsum([0, *map(len, prompts)]),
        prompt_lengths=np.array(sum(prompts, []), np.int32),
        prompt_hash=np.array(hashes, np.uint64),
        response_offsets=np.cumsum([0, *map(len, responses)]),
        response_lengths=np.array(sum(responses, []), np.int32),
        response_prompt=np.zeros(total, np.int32),
        response_kind=np.zeros(total, np.int32),
        response_reward=np.full(total, np.nan),
        response_label=np.full(total, -1, np.int32),
        num_pairs=np.array([len(r) // 2 for r in responses], np.int32),
    )


def check(index, plan, inputs, targets):
    """Every invariant, computed row by row."""
    shape = plan.shape
    seen, used, most = [], {"encoder": 0, "decoder": 0}, np.zeros(3, int)
    for b in range(len(plan)):
        placement = plan[b]
        seen += placement.row_ids.tolist()
        encoder, number, prompts, pairs = 0, 0, 0, 0
        decoder = np.zeros(shape.decoder_rows, int)
        for i in placement.row_ids:
            p = slice(index.prompt_offsets[i], index.prompt_offsets[i + 1])
            r = slice(index.response_offsets[i], index.response_offsets[i + 1])
            encoder += sum(min(n, inputs) for n in index.prompt_lengths[p])
            prompts += p.stop - p.start
            pairs += index.num_pairs[i]
            for length in index.response_lengths[r]:
                decoder[placement.decoder_rows[number]] += min(length, targets)
                number += 1
        assert number == len(placement.decoder_rows)
        assert encoder <= shape.encoder_length
        assert (decoder <= shape.decoder_length).all()
        used["encoder"] += encoder
        used["decoder"] += decoder.sum()
        most = np.maximum(most, [prompts, number, pairs])
    assert sorted(seen) == list(range(index.num_rows))
    assert (shape.prompts, shape.responses) == tuple(most[:2])
    assert shape.pairs == max(1, most[2])
    assert plan.tokens == used
    occupancy = plan.occupancy()
    positions = len(plan) * shape.decoder_rows * shape.decoder_length
    assert occupancy["decoder"] == used["decoder"] / positions


def some_rows(min_size=1):
    lengths = st.integers(1, 12)
    return st.lists(
        st.tuples(
            st.lists(lengths, min_size=1, max_size=2),
            st.lists(lengths, min_size=1, max_size=4),
            st.integers(0, 3),
        ),
        min_size=min_size,
        max_size=40,
    )


@settings(max_examples=120, deadline=None, derandomize=True)
@given(some_rows(), st.integers(2, 4), st.sampled_from([None, 3, 4, 6]))
def test_no_row_is_lost_or_repeated_and_capacities_hold(rows, packing, decoder_rows):
    index = make_index(rows)
    options = dict(inputs=8, targets=9, packing=packing, decoder_rows=decoder_rows)
    plan = pack(index, **options)
    check(index, plan, 8, 9)
    again = pack(index, **options)
    assert again.fingerprint == plan.fingerprint
    np.testing.assert_array_equal(again.row_ids, plan.row_ids)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(some_rows(), st.integers(2, 3))
def test_two_different_prompts_share_every_bin_or_it_is_refused(rows, packing):
    rows = [(prompts[:1], responses[:1], h) for prompts, responses, h in rows]
    index = make_index(rows)
    options = dict(inputs=8, targets=9, packing=packing)
    hashes = index.prompt_hash
    counts = np.unique(hashes, return_counts=True)[1]
    try:
        plan = pack(index, **options, min_prompts=2)
    except ValueError as error:
        # With packing >= 2 any two examples fit together: only repeats are in the way.
        assert "found no different prompt" in str(error)
        assert max(counts) > len(rows) / 2
        return
    check(index, plan, 8, 9)
    single = [b for b in plan.bins if len(set(hashes[b].tolist())) < 2]
    assert len(single) <= 1 and all(len(b) == 1 for b in single)
    assert len(single) < len(plan)


def test_two_prompts_a_bin_where_each_bin_holds_exactly_two():
    # All of full length: bins of two, and an odd one left over.
    for count in (100, 101):
        index = make_index([([8], [9], i // 2) for i in range(count)])
        plan = pack(index, inputs=8, targets=9, packing=2, min_prompts=2)
        check(index, plan, 8, 9)
        sizes = sorted(map(len, plan.bins))
        assert sizes == [1] * (count % 2) + [2] * (count // 2)
        for b in plan.bins:
            assert len(b) == len(set(index.prompt_hash[b].tolist()))


def test_repeats_are_spread_to_give_everyone_a_different_prompt():
    # Half of the rows share one prompt, so every bin of two needs exactly one of them.
    index = make_index([([8], [9], 0 if i < 100 else i) for i in range(200)])
    plan = pack(index, inputs=8, targets=9, packing=2, min_prompts=2)
    assert all(len(set(index.prompt_hash[b].tolist())) == 2 for b in plan.bins)


def test_small_plan_by_hand():
    # Two long pairs and two short ones: each bin takes one of both.
    index = make_index([
        ([6], [6, 2], 0), ([6], [2, 6], 1), ([2], [2, 6], 2), ([2], [6, 2], 3),
    ])  # fmt: skip
    plan = pack(index, inputs=4, targets=4, packing=2)
    # Cut to 4: encoder needs 4, 4, 2, 2 of 8; decoder 4 + 2 a pair in two rows of 8.
    assert plan.truncated == {"prompts": 2, "responses": 4}
    assert plan.tokens == {"encoder": 12, "decoder": 24}
    assert len(plan) == 2
    assert plan.shape.encoder_length == plan.shape.decoder_length == 8
    assert plan.shape.decoder_rows == 2
    assert plan.occupancy() == {"encoder": 12 / 16, "decoder": 24 / 32}


def test_without_packing_one_row_a_bin_in_order():
    index = make_index([([3], [4, 2, 1], 0), ([9], [20], 1), ([1, 2], [1, 1], 2)])
    for packing in (None, 0):
        plan = pack(index, inputs=8, targets=9, packing=packing)
        assert plan.shape == RowShape(16, 3, 9, 2, 3, 1)
        assert [b.tolist() for b in plan.bins] == [[0], [1], [2]]
        assert plan[0].decoder_rows.tolist() == [0, 1, 2]
        assert plan.truncated == {"prompts": 1, "responses": 1}
        check(index, plan, 8, 9)


def test_responses_share_fewer_decoder_rows():
    index = make_index([([3], [5, 4, 4, 3], 0)])
    plan = pack(index, inputs=8, targets=8, packing=None, decoder_rows=2)
    # Longest first to the emptiest: {5, 3} and {4, 4}.
    assert plan[0].decoder_rows.tolist() == [0, 1, 1, 0]
    assert plan.occupancy()["decoder"] == 1.0


def lognormal(rng, mean, sigma, count, top):
    lengths = np.exp(rng.normal(np.log(mean), sigma, count)).astype(int)
    return np.clip(lengths, 2, top)


@pytest.mark.parametrize("responses, sigma", [(1, 0.7), (1, 1.2), (2, 1.0)])
def test_skewed_lengths_fill_rows(responses, sigma):
    rng = np.random.default_rng(0)
    count = 6000
    prompts = lognormal(rng, 60, sigma, count, 256)
    targets = lognormal(rng, 120, sigma, count * responses, 512)
    index = make_index(
        [
            ([int(p)], targets[i * responses : (i + 1) * responses].tolist(), i)
            for i, p in enumerate(prompts)
        ]
    )
    plan = pack(index, inputs=256, targets=512, packing=2)
    occupancy = plan.occupancy()
    assert min(occupancy.values()) >= 0.95, occupancy
    # P and R set the arrays' size: no bin may collect the small rows.
    assert plan.shape.prompts <= 3 * count / len(plan)


def test_many_responses_fill_short_rows():
    """Nine responses each, some as long as a row: they need not lie side by side."""
    rng = np.random.default_rng(0)
    targets = lognormal(rng, 130, 0.9, 1000 * 9, 512).reshape(1000, 9)
    prompts = lognormal(rng, 40, 0.8, 1000, 256)
    index = make_index(
        [
            ([int(p)], t.tolist(), i)
            for i, (p, t) in enumerate(zip(prompts, targets, strict=True))
        ]
    )
    plan = pack(index, inputs=256, targets=512, packing=1, decoder_rows=12)
    assert plan.occupancy()["decoder"] >= 0.88, plan.occupancy()
    check(index, plan, 256, 512)


def test_errors_name_numbers_and_settings():
    index = make_index([([3], [4], 0), ([30, 30], [4, 40], 1)])
    with pytest.raises(
        ValueError,
        match=r"1 of 2 rows do not fit: row 1 .* needs 32 encoder tokens .* holds 16 "
        r"\(packing=1\). Raise packing, or lower TASK_FEATURE_LENGTHS\['inputs'\]",
    ):
        pack(index, inputs=16, targets=16, packing=1)
    with pytest.raises(
        ValueError, match="needs 44 decoder tokens .* decoder rows hold 1 x 40"
    ):
        pack(index, inputs=16, targets=40, packing=None, decoder_rows=1)
    with pytest.raises(ValueError, match=r"TASK_FEATURE_LENGTHS\['targets'\] is 0"):
        pack(index, inputs=16, targets=0, packing=1)
    with pytest.raises(ValueError, match="min_prompts must be 1 or 2, got 3"):
        pack(index, inputs=16, targets=16, packing=2, min_prompts=3)
    same = make_index([([3], [4], 7)] * 5)
    for rows, packing in ((index, None), (same, 4)):
        with pytest.raises(
            ValueError,
            match="found no different prompt .* packing=.* Expected packing >= 2",
        ):
            pack(rows, inputs=64, targets=64, packing=packing, min_prompts=2)


def test_plans_of_a_mixture_share_a_shape():
    a = pack(make_index([([3], [4, 4], 0)]), inputs=4, targets=4, packing=2)
    b = pack(make_index([([3], [4], i) for i in range(9)]), inputs=6, targets=3,
             packing=2)  # fmt: skip
    shape = common_shape([a, b])
    assert shape == RowShape(12, 2, 8, 2, 2, 1)
    wide = a.with_shape(shape)
    assert wide.shape == shape and wide.fingerprint != a.fingerprint
    assert wide.occupancy()["encoder"] == 3 / 12
    small = dataclasses.replace(shape, prompts=0)
    with pytest.raises(ValueError, match="needs prompts=1, the new shape has 0"):
        a.with_shape(small)
