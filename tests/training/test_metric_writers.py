"""Metrics survive kills, restarts and odd numbers; the progress line tells the time."""

from __future__ import annotations

import doctest
import io
import json
import logging
import math
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.training import metric_writers
from jaxalign.training.metric_writers import MetricWriter, read_metrics
from jaxalign.training.progress import Progress


def _lines(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_write_is_a_line_on_disk_at_once(tmp_path):
    writer = MetricWriter(tmp_path / "run", enabled=True)
    writer.write(3, {"train/loss": jnp.float32(0.5), "kl": np.int64(2), "ok": True})
    (line,) = _lines(tmp_path / "run")  # before close
    assert line.pop("time") > 1.7e9
    assert line == {"step": 3, "train/loss": 0.5, "kl": 2.0, "ok": 1.0}
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.write(4, {"loss": 1.0})


def test_non_finite_values_are_valid_json_and_come_back(tmp_path):
    with MetricWriter(tmp_path, enabled=True) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e-30})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=refuse)
    assert (line["a"], line["b"], line["c"]) == ("NaN", "Infinity", "-Infinity")
    metrics = read_metrics(tmp_path)
    assert math.isnan(metrics["a"][1][0])
    assert metrics["b"][1][0] == math.inf and metrics["c"][1][0] == -math.inf
    assert metrics["d"][1][0] == 1e-30


@pytest.mark.parametrize("value", [np.ones(3), "0.5", None])
def test_only_single_numbers(tmp_path, value):
    with MetricWriter(tmp_path, enabled=True) as writer:
        with pytest.raises(ValueError, match=r"metric 'train/x': expected one number"):
            writer.write(1, {"train/x": value})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_disabled_writes_nothing(tmp_path):
    with MetricWriter(tmp_path / "run", enabled=False) as writer:
        writer.write(1, {"loss": 1.0})
        writer.resume_at(0)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_equals_an_unbroken_one(tmp_path):
    def run(folder, steps):
        with MetricWriter(folder, enabled=True) as writer:
            writer.resume_at(steps[0] - 1)
            for step in steps:
                writer.write(step, {"train/loss": 1 / 3 / step})
                if step % 4 == 0:
                    writer.write(step, {"eval/loss": 0.1 * step})

    run(tmp_path / "whole", range(1, 13))
    run(tmp_path / "broken", range(1, 11))  # killed after 10; the checkpoint is at 8
    run(tmp_path / "broken", range(9, 13))
    whole, broken = (
        [{k: v for k, v in line.items() if k != "time"} for line in _lines(folder)]
        for folder in (tmp_path / "whole", tmp_path / "broken")
    )
    assert whole == broken
    assert not list((tmp_path / "broken").glob(".*"))  # no temporary file left


def test_tensorboard_hides_the_forgotten_steps(tmp_path):
    for step in (1, 2):
        with MetricWriter(tmp_path, enabled=True) as writer:
            writer.resume_at(step - 1)
            writer.write(step, {"train/loss": 0.5})
    events = b"".join(p.read_bytes() for p in tmp_path.glob("events.out.tfevents.*"))
    assert b"train/loss" in events


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "lo', b"{", b'{"x": "\xf0\x9f', b"\0\0"]
)
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.5}\n{"step": 2, "loss": 2.5}\n' + torn)
    np.testing.assert_array_equal(read_metrics(tmp_path)["loss"][0], [1, 2])
    with MetricWriter(tmp_path, enabled=True) as writer:
        writer.write(3, {"loss": 3.5})
    steps, values = read_metrics(tmp_path)["loss"]
    np.testing.assert_array_equal(steps, [1, 2, 3])
    np.testing.assert_array_equal(values, [1.5, 2.5, 3.5])


def test_a_bad_line_elsewhere_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nloss: 3\n{"step": 2}\n')
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl, line 2: expected a JSON obj"
    ):
        read_metrics(tmp_path)


def test_read_metrics_sorts_and_keeps_the_later_of_two(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 5, "a": 1}\n{"step": 2, "a": 7, "b": 0}\n{"step": 5, "a": 2}\n'
    )
    metrics = read_metrics(tmp_path)
    np.testing.assert_array_equal(metrics["a"][0], [2, 5])
    np.testing.assert_array_equal(metrics["a"][1], [7.0, 2.0])
    np.testing.assert_array_equal(metrics["b"][0], [2])
    assert read_metrics(tmp_path / "absent") == {}


def test_wandb_absent_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes the import fail
    with pytest.raises(ImportError, match="pip install wandb.*use_wandb=False"):
        MetricWriter(tmp_path, use_wandb=True, enabled=True)


def test_wandb_run_is_continued(tmp_path, monkeypatch):
    calls = []

    def init(**kwargs):
        calls.append(kwargs)
        return types.SimpleNamespace(
            id="abc",
            log=lambda values, step: calls.append((step, values)),
            finish=lambda: calls.append("finish"),
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):
        with MetricWriter(tmp_path / "r1", use_wandb=True, enabled=True) as writer:
            writer.write(1, {"loss": 2.0})
    assert [c["id"] for c in calls if isinstance(c, dict)] == [None, "abc"]
    assert calls[1:3] == [(1, {"loss": 2.0}), "finish"]


class _Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_progress_logs_speed_and_time_left(caplog):
    clock = _Clock()
    with caplog.at_level(logging.INFO, logger="jaxalign"):
        progress = Progress(100, 1000, stream=io.StringIO(), interval=10.0, clock=clock)
        clock.now = 60.0  # compilation
        speed = progress.update(110, {"loss": 3.0, "batch/tokens": 500.0})
        assert speed["tokens_per_second"] == pytest.approx(10 * 500 / 60)
        for step in range(120, 320, 10):
            clock.now += 4.0
            speed = progress.update(step, {"loss": 2.34567, "batch/tokens": 500.0})
        progress.close()
    assert speed == {
        "steps_per_second": pytest.approx(2.5),
        "tokens_per_second": pytest.approx(1250),
    }
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "step 110/1000  loss 3  83.3 tokens/s  ETA 1:29:00"
    # 690 steps at 0.4 s: compilation is forgotten.
    assert messages[-1] == "step 310/1000  loss 2.346  1.25k tokens/s  ETA 0:04:36"
    # One for compilation, one every third update of 4 s, one at the end.
    assert len(messages) == 1 + 6 + 1


def test_progress_logs_the_last_line_of_a_short_run(caplog):
    with caplog.at_level(logging.INFO, logger="jaxalign"):
        with Progress(0, 2, stream=io.StringIO(), clock=_Clock()) as progress:
            progress.update(1, {"objective": 1.0})
            progress.update(2, {"objective": 0.5})
    assert [r.getMessage() for r in caplog.records] == [
        "step 2/2  loss 0.5  ETA 0:00:00"
    ]


def test_progress_is_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress(2, 4, stream=stream) as progress:
        progress.update(3, {"loss": 1.25})
    assert "75%" in stream.getvalue() and "step 3/4  loss 1.25" in stream.getvalue()


def test_docstring_examples():
    failed, attempted = doctest.testmod(metric_writers)
    assert attempted and not failed
