"""T5X itself as the oracle, where a checkout of it is at hand."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "support" / "real_t5x.py"


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    source = os.environ.get("T5X_SRC")
    if not source:
        pytest.skip(
            "T5X_SRC must name a folder with checkouts of t5x, airio and jestimator "
            "(and, in deps, of what they need and this environment lacks)."
        )
    parts = ("t5x", "airio", "jestimator", "deps")
    path = [str(SCRIPT.parents[2]), *(os.path.join(source, part) for part in parts)]
    # One device: T5X gives all that there are to its model axis.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    run = subprocess.run(
        [sys.executable, SCRIPT, tmp_path_factory.mktemp("t5x")],
        env=environment | {"PYTHONPATH": os.pathsep.join(path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    lines = (line for line in run.stdout.splitlines() if line.startswith("{"))
    return [json.loads(line) for line in lines]


def _of(facts, what):
    found = [fact for fact in facts if fact["what"].startswith(what)]
    assert found
    return found


def test_what_t5x_writes_is_read_to_the_bit(facts):
    found = _of(facts, "read")
    assert {(fact["case"], fact["format"]) for fact in found} == {
        (case, kind)
        for case in ("t5_1_1", "t5_1_0", "umt5", "umt5_apart")
        for kind in ("legacy", "orbax")
    }
    for fact in found:
        assert fact["missing"] == [] and fact["step"] == 1 and fact["count"] > 100, fact


def test_logits_equal_t5xs(facts):
    for fact in _of(facts, "our logits"):
        assert fact["worst"] < 1e-5, fact


def test_t5x_restores_what_is_written_here(facts):
    found = _of(facts, "T5X's")
    assert len(found) == 9
    for fact in found:
        assert fact["worst"] == 0 and fact["step"] == 12, fact


def test_the_optimizers_slots_have_t5xs_shapes(facts):
    for fact in _of(facts, "slots"):
        assert fact["wrong"] == [], fact


def test_three_adafactor_steps_equal_t5xs(facts):
    found = _of(facts, "three steps")
    assert [fact["case"] for fact in found] == ["t5_1_1", "t5_1_0"]
    for fact in found:
        assert fact["worst"] < 1e-5, fact
