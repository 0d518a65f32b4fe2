"""What is too long: cut on either side, left out row by row, or refused."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign import batch
from jaxalign.data import Row, build_index, pack, seen, to_arrays, too_long
from jaxalign.data.cuts import AT_THE_END, Sides
from jaxalign.data.rows import DTYPES

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
        key=f"rows.jsonl:{prompt}",
        prompts=texts[:1],
        responses=texts[1:],
        response_prompt=[0] * count,
        response_kind=[0] * count,
        response_reward=[float(len(t)) for t in responses],
        response_label=[1] * count,
        pairs=[(i, i + 1, 0.5) for i in range(count - 1)],
    )


TEXTS = st.text("ab", min_size=0, max_size=6)
SIDES = st.sampled_from(["start", "end"])
ROWS = st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=10)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(ROWS, st.integers(2, 5), st.integers(1, 5), SIDES, SIDES)
def test_arrays_hold_the_side_that_is_kept(texts, inputs, targets, of_prompt, other):
    rows, cut = Rows(row(*t) for t in texts), Sides(of_prompt, other)
    found = seen(rows, inputs=inputs, targets=targets, cut=cut)
    plan = pack(
        rows.index, inputs=inputs, targets=targets, packing=3, seen=found, cut=cut
    )
    for placement in map(plan.__getitem__, range(len(plan))):
        of_bin = [rows[i] for i in placement.row_ids]
        out = to_arrays(of_bin, placement, plan.shape)
        for i, r in enumerate(of_bin, start=1):
            shown = out["encoder_input_tokens"][out["encoder_segment_ids"] == i]
            whole = r.prompts[0].tolist()
            assert shown[-1] == 1 and len(shown) == min(len(whole), inputs)
            if of_prompt == "start":
                assert shown.tolist() == whole[-inputs:]
            else:
                assert shown[:-1].tolist() == whole[:-1][: inputs - 1]
        responses = [x for r in of_bin for x in r.responses]
        for i, x in enumerate(responses, start=1):
            place = out["decoder_segment_ids"] == i
            shown, fed = (
                out[f"decoder_{n}_tokens"][place].tolist() for n in ("target", "input")
            )
            whole = x.tolist()
            kept = whole[-targets:] if other == "start" else whole[:targets]
            assert shown == kept and fed == [0, *kept[:-1]]
        numbers = range(sum(len(r.pairs) for r in of_bin))
        for q in numbers:
            sides = [
                out["decoder_target_tokens"][
                    out["decoder_segment_ids"] == out[f"pair_{n}"][q] + 1
                ].tolist()
                for n in ("chosen", "rejected")
            ]
            assert out["pair_mask"][q] == (sides[0] != sides[1])


def test_values_of_tokens_are_cut_as_the_tokens(monkeypatch):
    for name, axes in (("encoder_value", "BE"), ("decoder_value", "BKD")):
        column = batch.Column(axes, source="rows")
        monkeypatch.setitem(batch.COLUMNS, name, column)
    one = row("abcd", "xyz")
    columns = {
        "encoder_value": [np.arange(5.0)],
        "decoder_value": [np.arange(10.0, 14.0)],
    }
    for cut, prompt, response in (
        (Sides(), [0, 1, 4], [10, 11]),
        (Sides("start", "start"), [2, 3, 4], [12, 13]),
    ):
        plan = pack(build_index([one]), inputs=3, targets=2, packing=None, cut=cut)
        out = to_arrays([one], plan[0], plan.shape, columns)
        assert out["encoder_value"].tolist() == prompt
        assert out["decoder_value"][0].tolist() == response


def test_the_side_is_part_of_a_plan_and_the_usual_one_changes_no_identity():
    rows = Rows([row("abcdef", "x"), row("b", "y")])
    options = dict(inputs=3, targets=3, packing=2)
    usual = pack(rows.index, **options)
    assert pack(rows.index, **options, cut=AT_THE_END).fingerprint == usual.fingerprint
    # As it was before there were sides.
    assert usual.fingerprint.startswith("0010c964d26bc197")
    other = pack(rows.index, **options, cut=Sides("start"))
    assert other.fingerprint != usual.fingerprint and other[0].cut == Sides("start")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(ROWS, st.integers(2, 5), st.integers(1, 5))
def test_a_row_goes_as_a_whole_or_stays_as_a_whole(texts, inputs, targets):
    rows = Rows(row(*t) for t in texts)
    limits = dict(inputs=inputs, targets=targets)
    fits = [
        len(t[0]) < inputs and len(t[1]) < targets and len(t[2]) < targets
        for t in texts
    ]
    if not any(fits):
        with pytest.raises(ValueError, match="none is left"):
            too_long.keep(rows, **limits, on_too_long="skip")
        return
    keep = too_long.keep(rows, **limits, on_too_long="skip")
    assert (keep is None) == all(fits)
    plan = pack(rows.index, **limits, packing=2, keep=keep)
    assert sorted(plan.row_ids.tolist()) == np.flatnonzero(fits).tolist()
    assert plan.left_out == {
        "rows": fits.count(False),
        "responses": 2 * fits.count(False),
    }
    assert plan.truncated == {"prompts": 0, "responses": 0}
    # The bins are those of the rows that are left.
    alone = Rows(r for r, fit in zip(rows, fits, strict=True) if fit)
    assert [b.tolist() for b in plan.bins] == [
        [np.flatnonzero(fits)[i] for i in b]
        for b in pack(alone.index, **limits, packing=2).bins
    ]


def test_some_rows_of_an_index_are_the_index_of_some_rows():
    rows = Rows([row("a", "bc", "d"), row("ef"), row("g", "h", "i", "jkl")])
    for some in ([0, 2], [2, 1], [1], []):
        found = rows.index.take(np.array(some, np.int64))
        expected = build_index(rows[i] for i in some)
        for name, dtype in DTYPES.items():
            got = getattr(found, name)
            np.testing.assert_array_equal(got, getattr(expected, name), name)
            assert got.dtype == dtype


def test_rows_left_out_are_told_by_key(caplog):
    rows = Rows([row("a", "b" * 9, "c"), row("d" * 7, "e"), row("f", "g")])
    limits = dict(inputs=6, targets=6)
    with caplog.at_level(logging.WARNING):
        keep = too_long.keep(rows, **limits, on_too_long="skip")
    assert keep.tolist() == [False, False, True]
    assert "2 of 3 rows" in caplog.text
    assert "rows.jsonl:a: a response of 10 tokens" in caplog.text
    assert "rows.jsonl:ddddddd: a prompt of 8 tokens" in caplog.text
    with pytest.raises(ValueError, match=r"(?s)rows\.jsonl:a: .*ON_TOO_LONG='skip'"):
        too_long.keep(rows, **limits, on_too_long="error")
    assert too_long.keep(rows, **limits, on_too_long="truncate") is None
    assert too_long.keep(rows, inputs=8, targets=10, on_too_long="error") is None


@pytest.mark.parametrize(
    ("truncate", "on_too_long", "message"),
    [
        (None, "skipp", "did you mean 'skip'"),
        ("left", "truncate", "got 'left'"),
        ({"input": "start"}, "truncate", "got {'input'"),
        ({"inputs": "begin"}, "truncate", "got {'inputs'"),
        (3, "truncate", "got 3"),
    ],
)
def test_settings_without_a_meaning(truncate, on_too_long, message):
    with pytest.raises(ValueError, match=message):
        too_long.check(truncate, on_too_long)


def test_dialogues_keep_their_end():
    rows = Rows([row("a", "b")])
    assert too_long.sides(None, rows) == Sides("end", "end")
    rows.summary = {"source": {"rows_kept": 3, "read_as": {"chat": 2}}}
    assert too_long.sides(None, rows) == Sides("start", "end")
    assert too_long.sides({"inputs": "end"}, rows) == Sides("end", "end")
    assert too_long.sides("start", rows) == Sides("start", "start")
    rows.summary = {"source": {"rows_kept": 4, "read_as": {"chat": 2}}}
    assert too_long.sides(None, rows) == Sides("end", "end")
