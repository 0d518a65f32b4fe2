"""Warnings of known failures: when they show, and that healthy runs are left alone."""

from __future__ import annotations

import json

import pytest

from jaxalign.training.symptoms import SYMPTOMS, Watch

HEALTHY = {
    "nll/chosen": 1.0,
    "samples/length": 20.0,
    "kl": 0.3,
    "kl/unclamped": 0.3,
    "log_ratios/pull/p50": 0.5,
}
# By symptom: the numbers that show it, and the same without it.
CASES = {
    "chosen_less_likely_samples_longer": (
        {"nll/chosen": 1.2, "samples/length": 30.0},
        {"nll/chosen": 1.2, "samples/length": 18.0},
    ),
    "reference_point_clamped": (
        {"kl": 0.0, "kl/unclamped": -3.0},
        {"kl": 0.0, "kl/unclamped": -0.1},
    ),
    "log_ratios_rule_the_residual": (
        {"log_ratios/pull/p50": 11.0},
        {"log_ratios/pull/p50": 9.0},
    ),
}


def test_every_symptom_has_a_case():
    assert set(CASES) == {s.name for s in SYMPTOMS}


@pytest.mark.parametrize("name", CASES)
def test_a_symptom_is_told_once_with_advice(name, caplog):
    shown, _ = CASES[name]
    lasting = next(s.lasting for s in SYMPTOMS if s.name == name)
    watch = Watch()
    assert watch.check(HEALTHY) == []
    told = [watch.check(shown) for _ in range(lasting + 3)]
    assert told == [[]] * (lasting - 1) + [[name]] + [[]] * 3
    assert watch.told == [name]
    assert len(caplog.records) == 1
    assert any(word in caplog.text for word in ("Raise", "Lower"))


@pytest.mark.parametrize("name", CASES)
def test_what_resembles_it_is_left_alone(name):
    _, near = CASES[name]
    watch = Watch()
    for numbers in [HEALTHY, *[near] * 10]:
        assert watch.check(numbers) == []


def test_a_symptom_that_comes_and_goes_is_not_told():
    watch = Watch()
    shown, near = CASES["reference_point_clamped"]
    for _ in range(10):
        assert watch.check(shown) == [] and watch.check(near) == []


def test_numbers_measured_at_different_times_meet():
    watch = Watch()
    for numbers in ({"nll/chosen": 1.0}, {"samples/length": 10.0}, {"nll/chosen": 2.0}):
        assert watch.check(numbers) == []
    assert watch.check({"samples/length": 13.0}) == [
        "chosen_less_likely_samples_longer"
    ]


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_goes_on_measures_against_its_own_first_numbers(name):
    """Stopped after any number of checks, it tells what an unbroken one tells."""
    shown, _ = CASES[name]
    story = [{**HEALTHY, "broken": float("nan")}, *[shown] * 8]

    def told(stop):
        watch = Watch()
        found = [watch.check(numbers) for numbers in story[:stop]]
        saved = json.loads(json.dumps(watch.state(), allow_nan=False))
        again = Watch()
        again.resume(saved)
        return found + [again.check(numbers) for numbers in story[stop:]]

    expected = told(len(story))
    assert [name] in expected
    for stop in range(len(story)):
        assert told(stop) == expected


def test_a_run_writes_what_was_told(tmp_path, monkeypatch):
    import tiny_run

    from jaxalign.training import run_directory, symptoms
    from jaxalign.training.train import train

    always = symptoms.Symptom("always", lambda first, now: "loss" in now, "Lower it.")
    monkeypatch.setattr(symptoms.Watch.__init__, "__defaults__", ((always,),))
    data = tiny_run.write_data(tmp_path / "data.jsonl")
    run = tiny_run.make_run(tmp_path / "run", data, tmp_path, "SFT", train_steps=2)
    train(run)
    assert run_directory.read_manifest(tmp_path / "run")["warnings"] == ["always"]
