"""Tracing some steps: the trace, its parts, and the report that shows them."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
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


def test_steps_that_are_no_range():
    with pytest.raises(ValueError, match="1 <= FIRST <= LAST"):
        profiling.check_steps((5, 3), 9)


@pytest.mark.parametrize("first", [1, 4])
def test_a_run_that_ends_or_begins_within_the_steps_traces_those_it_takes(
    tmp_path, first
):
    """Steps 3 to 9 of a run that takes `first` to 5, stopped in the middle."""
    step = jax.jit(lambda x: x * 2)
    state = jnp.ones(3)
    with profiling.Profile(tmp_path, (3, 9)) as profile:
        for done in range(first, 6):
            profile.before(done, state)
            state = profile.compiled(step, state)(state)
            profile.after(done, state)
    found = json.loads((tmp_path / profiling.BREAKDOWN).read_text())
    assert found["steps"] == [max(first, 3), 5]
    jax.profiler.start_trace(str(tmp_path / "another"))  # none is on
    jax.profiler.stop_trace()


def test_a_run_that_breaks_ends_its_trace(tmp_path):
    with pytest.raises(KeyError), profiling.Profile(tmp_path, (1, 9)) as profile:
        profile.before(1, jnp.ones(3))
        raise KeyError
    assert not (tmp_path / profiling.BREAKDOWN).exists()
    jax.profiler.start_trace(str(tmp_path / "another"))
    jax.profiler.stop_trace()


def test_steps_that_a_run_never_comes_to(tmp_path):
    with pytest.raises(ValueError, match="begins after the last step, 6"):
        run = tiny_run.make_run(tmp_path / "run", "none.jsonl", tmp_path)
        loop.train(dataclasses.replace(run, profile_steps=(7, 9)))
    assert not (tmp_path / "run").exists()
