"""Data made on the fly: a function of (task, seed, step), on which a network learns."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_run

from jaxalign import models, objectives
from jaxalign.data import synthetic
from jaxalign.training import inputs, run_directory
from jaxalign.training import train as loop
from jaxalign.training.run import setup
from jaxalign.vocabularies import ByteVocabulary

VOCABULARY = ByteVocabulary(extra_ids=125)


def made(schema="supervised", name="reverse", seed=0, **options):
    task = synthetic.task(f"synthetic:{name}", options)
    return synthetic.SyntheticCache(task, schema, VOCABULARY, seed=seed)


def feed_of(name="reverse", objective="SFT", **changes):
    settings = {
        "data": f"synthetic:{name}",
        "feature_lengths": {"inputs": 8, "targets": 8},
        "batch_size": 4,
        **changes,
    }
    objective = objectives.OBJECTIVES[objective](model=models.T5(tiny_run.CONFIG))
    return inputs.build(inputs.Dataset(**settings), objective, VOCABULARY)


def texts(tokens):
    """The texts of a row of tokens."""
    split = np.split(tokens, np.flatnonzero(tokens == VOCABULARY.eos_id) + 1)
    return [VOCABULARY.decode(part[:-1]) for part in split if (part > 1).any()]


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("copy", str),
        ("reverse", lambda text: text[::-1]),
        ("sort", lambda text: "".join(sorted(text))),
        ("sum", lambda text: str(eval(text))),
    ],
)
def test_answers_are_right_and_rejected_ones_wrong(name, answer):
    task = synthetic.task(f"synthetic:{name}")
    for seed in range(200):
        row = task(np.random.default_rng(seed))
        assert row["completion"] == answer(row["prompt"]) != row["rejected"]


def test_a_batch_is_a_function_of_seed_and_step():
    feed, again = feed_of().train, feed_of().train
    assert feed.fingerprint == again.fingerprint != feed_of(seed=1).train.fingerprint
    assert feed.fingerprint != feed_of("sort").train.fingerprint
    assert feed.fingerprint != feed_of(task_options={"length": 3}).train.fingerprint
    ahead, half = again.iterate(5, state=lambda: None), again.iterate(5, slice(1, 3))
    seen = []
    for step in (5, 6):
        batch = feed.batch(step)
        at_once, part = next(ahead), next(half)
        assert {n: (a.shape, a.dtype) for n, a in batch.items()} == {
            n: (a.shape, a.dtype) for n, a in feed.shapes.items()
        }
        for name, array in batch.items():
            np.testing.assert_array_equal(at_once[name], array)
            np.testing.assert_array_equal(part[name], array[1:3])
        seen.append(batch["encoder_input_tokens"].tobytes())
        for inputs_, targets in zip(
            batch["encoder_input_tokens"],
            batch["decoder_target_tokens"][:, 0],
            strict=True,
        ):
            assert len(texts(inputs_)) == 2  # packing
            assert [t[::-1] for t in texts(inputs_)] == texts(targets)
    assert seen[0] != seen[1]


def test_the_first_rows_stand_for_the_data():
    cache = made()
    assert len(cache) == 64
    assert cache[9].to_bytes() == cache.make(9).to_bytes()
    assert made().content_fingerprint == cache.content_fingerprint
    feed = feed_of(packing=None).train
    first = texts(feed.batch(2)["encoder_input_tokens"][1])
    assert first == texts(feed.caches[0].make(9).prompts[0])


def test_other_schemas():
    pair = made("preference").make(3)
    assert pair.pairs == [(0, 1, 0.0)] and len(pair.responses) == 2
    labels = {made("trajectory").make(i).response_label[0] for i in range(20)}
    assert labels == {0, 1}
    batch = feed_of(objective="DPO").train.batch(0)
    assert batch["pair_mask"].sum() == 8
    assert feed_of(objective="KTO").train.batch(0)["response_label"].max() == 1
    with pytest.raises(ValueError, match="serves the schemas"):
        made("rationale")


def test_an_evaluation_is_the_same_for_every_seed():
    found = [feed_of(seed=seed).evaluation.caches[0] for seed in (0, 1)]
    assert found[0].content_fingerprint == found[1].content_fingerprint
    assert found[0].content_fingerprint != made().content_fingerprint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("revers", "Did you mean 'reverse'"),
        ("math:sqr", "No synthetic task 'math:sqr'"),
    ],
)
def test_a_task_that_is_not_there_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        feed_of(name)


def test_a_function_of_ones_own_is_a_task(tmp_path):
    path = tmp_path / "my_tasks.py"
    path.write_text(
        "def twice(rng, n=2):\n"
        "    digit = str(rng.integers(10))\n"
        "    return {'prompt': digit, 'completion': digit * n}\n"
    )
    row = made(name=f"{path}:twice", n=3).make(0)
    assert len(row.responses[0]) == 3 + 1
    with pytest.raises(ValueError, match="EVAL_DATA"):
        feed_of(eval_data="other.jsonl")


def make_run(folder, objective="SFT", **changes):
    data = "synthetic:copy"
    dataset = {"task_options": {"length": 2, "alphabet": "ab"}}
    changes = {"dataset": dataset, "batch_size": 16, **changes}
    return tiny_run.make_run(folder, data, folder.parent, objective, **changes)


def test_a_cached_reference_is_refused(tmp_path):
    with pytest.raises(ValueError, match="set REFERENCE='online'"):
        setup(make_run(tmp_path / "dpo", "DPO"))
    setup(make_run(tmp_path / "dpo", "DPO", reference="online"))


@pytest.mark.slow
def test_a_run_learns(tmp_path, caplog):
    caplog.set_level("INFO", "jaxalign")
    settings = {"train_steps": 120, "eval_period": 120, "checkpoint_period": 120}
    loop.train(make_run(tmp_path / "run", **settings, log_period=20))
    assert "Data: rows made on the fly of synthetic:copy" in caplog.text
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [row["eval/loss"] for row in map(json.loads, lines) if "eval/loss" in row]
    assert losses[-1] < 0.5  # a letter of two, and the end: untrained 5.9 a token


def test_a_run_that_goes_on_gives_the_bits_of_one_that_was_not_stopped(tmp_path):
    fingerprints = []
    for name, stops in (("whole", [6]), ("stopped", [2, 6])):
        for steps in stops:
            loop.train(make_run(tmp_path / name, train_steps=steps))
        manifest = run_directory.read_manifest(tmp_path / name)
        fingerprints.append(manifest["params_fingerprint"])
    assert fingerprints[0] == fingerprints[1]
