"""Numbers that JSON does not have are null in what is written."""

from __future__ import annotations

import json
import math

from jaxalign.data import jsonl


def test_numbers_that_are_not_finite_are_null_at_any_depth():
    value = {"a": [1.5, math.nan, (math.inf, "NaN")], "b": {"c": -math.inf, "d": None}}
    written = jsonl.dumps(value)
    assert json.loads(written) == {
        "a": [1.5, None, [None, "NaN"]],
        "b": {"c": None, "d": None},
    }
    assert "Infinity" not in written
    text = {"é": 0.1, "z": 1}
    assert jsonl.dumps(text, ensure_ascii=False) == json.dumps(text, ensure_ascii=False)
