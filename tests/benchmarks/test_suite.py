"""The benchmark on tiny networks: what it measures, writes and compares."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.steps import cases, peers, suite, synthetic, worker
from benchmarks.steps.__main__ import main
from benchmarks.steps.results import Result, read, slower, write
from jaxalign.cluster import mesh as meshes
from jaxalign.planning import programs

TINY = cases.step_case(
    "tiny", "dpo", "tiny", batch=8, inputs=16, targets=8, peer="peer.py", target=2.0
)


@pytest.fixture
def peer(tmp_path, monkeypatch):
    """A peer's folder, and how to write its script."""
    monkeypatch.setenv("BENCH_PEERS", str(tmp_path))
    return lambda text: (tmp_path / "peer.py").write_text(text)


def test_synthetic_batches_hold_no_padding():
    run = worker.configured_run(list(TINY.gin_files), list(TINY.bindings), True)
    objective = run.objective(model=run.model)
    batch = synthetic.batch(run, objective)
    for name in ("encoder_segment_ids", "decoder_segment_ids", "pair_mask"):
        assert np.all(batch[name] > 0), name
    assert synthetic.real_tokens(batch) == 8 * (16 + 2 * 8)
    assert batch["response_ref_logps"].shape == (8, 2)


@pytest.mark.slow
def test_a_case_beside_its_peer(peer, tmp_path):
    peer("print('peer median 1000.0s min 999.0s')")
    result = suite.step_result(TINY, steps=2, rounds=1)
    assert (result.peer_median_seconds, result.reached) == (1000.0, True)
    assert result.ratio == pytest.approx(1000.0 / result.median_seconds)
    assert len(result.more["seconds"]) == 2
    assert 0 < result.mfu < 1
    assert result.peak_temporary_bytes > 0
    write(tmp_path / "results.json", [result])
    (line,) = read(tmp_path / "results.json")
    assert {
        "case", "device", "dtype", "median_seconds", "real_tokens_per_second", "mfu",
        "peak_temporary_bytes", "peer", "peer_median_seconds", "ratio", "target",
        "reached",
    } <= set(line)  # fmt: skip


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "is not there; set BENCH_PEERS"),
        ("import a_package_that_is_not_there", "does not run here: ModuleNotFound"),
        ("print('nothing')", "does not run here: nothing"),
    ],
)
def test_a_peer_that_is_missing_is_named(peer, script, reason):
    if script:
        peer(script)
    found = peers.time_peer("peer.py")
    assert found.seconds is None
    assert reason in found.note


def test_a_peer_is_told_its_dtype(peer):
    peer("import sys\nprint('median 2.0s' if sys.argv[5:] == ['bfloat16'] else '')")
    assert peers.time_peer("peer.py", "bfloat16").seconds == 2.0
    assert peers.time_peer("peer.py").seconds is None


def test_the_ceiling_of_bfloat16_is_that_of_its_faster_product(monkeypatch):
    asked = []
    seconds = {"bfloat16": 2.0, "float32": 0.5}

    def timed(function):
        asked.append(str(function().dtype))
        return seconds[asked[-1]]

    monkeypatch.setattr(worker, "_timed", timed)
    assert worker.matmul_ceiling("bfloat16", size=8, repeats=2) == 2 * 8**3 / 0.5
    assert asked == ["bfloat16", "bfloat16", "float32", "float32"]
    asked.clear()
    assert worker.matmul_ceiling("float32", size=8, repeats=2) == 2 * 8**3 / 0.5
    assert asked == ["float32", "float32"]


def test_packing_adds_no_operations_to_a_models():
    def operations(batch, *bindings):
        case = cases.step_case(
            "", "dpo", "tiny", *bindings, batch=batch, inputs=16, targets=8
        )
        run = worker.configured_run(list(case.gin_files), list(case.bindings), True)
        ready = programs.abstract_setup(run, meshes.named_mesh(run.mesh))
        arguments = programs.program(ready, "train").arguments
        return worker.model_flops(ready, arguments, data=False)

    alone = operations(32)
    assert operations(8, "PACKING = 4") == alone
    assert operations(8, "PACKING = 4", cases.ATTENTION, cases.CHUNK) == alone


def test_t5x_needs_its_checkout(peer, tmp_path, monkeypatch):
    monkeypatch.delenv("T5X_SRC", raising=False)
    (tmp_path / "peer_t5x.py").write_text("")
    assert "T5X_SRC" in peers.time_peer("peer_t5x.py").note


def test_results_of_other_cases_stay(tmp_path):
    path = tmp_path / "results.json"
    write(path, [Result("a", ratio=1.0), Result("b", ratio=2.0)])
    write(path, [Result("b", ratio=3.0)])
    assert {r["case"]: r["ratio"] for r in read(path)} == {"a": 1.0, "b": 3.0}


def test_check_names_what_became_slower(tmp_path):
    path = tmp_path / "results.json"
    write(path, [Result("a", ratio=2.0), Result("b", ratio=2.0)])
    found = slower([Result("a", ratio=1.9), Result("b", ratio=1.5)], read(path))
    assert found == ["b: ratio 1.50, recorded 2.00"]


@pytest.mark.slow
def test_the_verb_measures_writes_and_checks(peer, tmp_path, monkeypatch, capsys):
    peer("print('median 10.0s')")
    monkeypatch.setattr(cases, "STEPS", (TINY,))
    output = tmp_path / "results.json"
    flags = ["--cases=tiny", "--steps=1", "--rounds=1", f"--output={output}"]
    assert main([*flags]) == 0
    assert "tiny" in capsys.readouterr().out
    recorded = json.loads(output.read_text())
    recorded[0]["ratio"] *= 100
    output.write_text(json.dumps(recorded))
    assert main(["--check", *flags]) == 1
    assert "slower: tiny" in capsys.readouterr().err


def test_an_unknown_case_names_the_nearest(capsys):
    assert main(["--cases=dpo-smal-cached"]) == 2
    assert "dpo-small-cached" in capsys.readouterr().err


def test_every_case_is_a_valid_configuration():
    for case in cases.STEPS:
        run = worker.configured_run(list(case.gin_files), list(case.bindings), True)
        assert run.train_steps == 1000, case.name
    names = [*(case.name for case in cases.STEPS), *suite.OTHERS]
    assert len(names) == len(set(names))
