"""Tracing some steps: the trace, its parts, and the report that shows them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny_run

from jaxalign import report
from jaxalign.training import profiling, run_directory
from jaxalign.training import train as loop


@pytest.mark.parametrize(
    ("scope", "part"),
    [
        ("jit(step)/jvp(T5.encode)/encoder/layers_3/attention/dot", "encoder"),
        ("a/decoder/layers_0/encoder_decoder_attention.attend/dot", "decoder"),
        ("jit(step)/transpose(jvp(vocabulary))/dot_general", "vocabulary"),
        ("jit(step)/reference/T5.decode/decoder/layers_0/mlp/wo", "reference"),
        ("jit(step)/optimizer/mul", "optimizer"),
        ("jit(step)/jvp(T5.encode)/token_embedder/gather", "embedding"),
        ("jit(step)/log_sigmoid", profiling.REST),
    ],
)
def test_scopes_belong_to_parts(scope, part):
    assert profiling.part_of(scope) == part


@pytest.mark.slow
def test_a_run_with_traced_steps(tmp_path):
    data = tiny_run.write_data(tmp_path / "data.jsonl")
    plain = tiny_run.make_run(tmp_path / "plain", data, tmp_path, "DPO")
    loop.train(plain)
    traced = tiny_run.make_run(tmp_path / "traced", data, tmp_path, "DPO")
    loop.train(dataclasses.replace(traced, profile_steps=(3, 4)))

    # Looking changes nothing.
    first, second = (
        run_directory.read_manifest(tmp_path / name)["params_fingerprint"]
        for name in ("plain", "traced")
    )
    assert first == second
    assert list((tmp_path / "traced" / "profile").rglob("*.xplane.pb"))
    found = json.loads((tmp_path / "traced" / profiling.BREAKDOWN).read_text())
    assert found["steps"] == [3, 4]
    assert found["seconds_per_step"] > 0
    shares = found["shares"]
    assert {"encoder", "decoder", "vocabulary", "optimizer"} <= set(shares)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)

    page = report.write_report([tmp_path / "plain", tmp_path / "traced"])
    text = page.read_text()
    assert "Where a step's time goes" in text
    assert f"{shares['decoder']:.1%}" in text


def test_steps_that_are_no_range(tmp_path):
    with pytest.raises(ValueError, match="1 <= FIRST <= LAST"):
        profiling.Profile(tmp_path, (5, 3))
