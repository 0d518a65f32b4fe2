"""A run directory goes on as the run that it is, or is left as it was."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import sentencepiece
import tiny_run

from jaxalign import models, objectives, vocabularies
from jaxalign.training import (
    checkpoints,
    identity,
    optimizers,
    run_directory,
    starts,
)
from jaxalign.training import run as runs
from jaxalign.training import train as loop
from jaxalign.training.checkpoint_writer import Checkpoints
from jaxalign.training.step import MovingReference


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A supervised policy, an alignment run of it that is finished, and their data."""
    folder = tmp_path_factory.mktemp("identity")
    tiny_run.write_data(folder / "data.jsonl")
    short = {"train_steps": 2, "checkpoint_period": 1, "eval_period": 9}
    loop.train(job(folder, "sft", "SFT", **short, initial_checkpoint_path=None))
    loop.train(job(folder, "run"), "# the configuration\n")
    return folder


def job(work, name, objective="DPO", **changes):
    settings = {
        "train_steps": 2,
        "eval_period": 9,
        "initial_checkpoint_path": str(work / "sft"),
        **changes,
    }
    data = settings.pop("data", work / "data.jsonl")
    run = tiny_run.make_run(work / name, data, work, objective, **settings)
    dataset = dataclasses.replace(run.dataset, eval_fraction=0.0)
    return dataclasses.replace(run, dataset=dataset)


def content(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_a_finished_run_stays_as_it_is_and_says_so(work, caplog):
    before = content(work / "run")
    caplog.set_level("INFO", "jaxalign")
    last = loop.train(job(work, "run"), "# another text of the same\n")
    assert "already finished, at step 2 of 2" in caplog.text
    assert content(work / "run") == before
    assert np.isfinite(last["loss"]) and last == run_directory.last_metrics(
        work / "run"
    )


def _beta(model):
    return objectives.DPO(model=model, beta=0.3)


def _model(**fields):
    return models.T5(dataclasses.replace(tiny_run.CONFIG, **fields))


def _adamw(rate, **arguments):
    return optimizers.optimizer("adamw", learning_rate=rate, **arguments)


OTHERS = {
    "objective": {"objective": "IPO"},
    "objective.beta": {"objective": "DPO", "run": {"objective": _beta}},
    "model.mlp_activations": {"model": _model(mlp_activations=("relu", "linear"))},
    "model.num_decoder_layers": {"model": _model(num_decoder_layers=2)},
    "batch_size": {"batch_size": 16},
    "seed": {"seed": 1},
    "dataset_seed": {"dataset": {"seed": 1}},
    "shuffle": {"dataset": {"shuffle": False}},
    "optimizer.learning_rate": {"optimizer": _adamw(1e-3)},
    "optimizer.name": {"optimizer": optimizers.adafactor(1e-2)},
    "optimizer": {"optimizer": optax.sgd(1e-2)},
    "initial_checkpoint": {"initial_checkpoint_path": None},
    "reference_checkpoint": {"reference_checkpoint_path": "checkpoints/1"},
    "moving_reference": {"reference": "moving"},
    "data_fingerprint": {"data": "other.jsonl"},
    "packing": {"run": {"packing": 3}},
    "feature_lengths.targets": {"run": {"lengths": {"inputs": 12, "targets": 13}}},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_refused_by_name_and_changes_nothing(work, name):
    changes = dict(OTHERS[name])
    extra = changes.pop("run", {})
    if "reference_checkpoint_path" in changes:
        path = work / "sft" / changes["reference_checkpoint_path"]
        changes["reference_checkpoint_path"] = str(path)
    if "data" in changes:
        changes["data"] = tiny_run.write_data(work / changes["data"], count=50)
    other = job(work, "run", **{**changes, "train_steps": 4})
    if "objective" in extra:
        other = dataclasses.replace(other, objective=extra["objective"])
    data = other.dataset
    data = dataclasses.replace(
        data,
        packing=extra.get("packing", data.packing),
        feature_lengths=extra.get("lengths", data.feature_lengths),
    )
    other = dataclasses.replace(other, dataset=data)
    before = content(work / "run")
    with pytest.raises(ValueError, match=f"[ ;]{name}[^ ]*: saved .*, now ") as told:
        loop.train(other, "# another\n")
    assert "Give another --run_dir" in str(told.value)
    assert "plan:" not in str(told.value)
    assert content(work / "run") == before


def _check(ready, saved):
    parents = starts.parents(ready, saved)
    identity.check(saved, identity.of(ready, parents), ready, "DIR")


@pytest.mark.parametrize(
    "changes",
    [
        {"model": _model(dtype="bfloat16", remat_policy="full", scan_layers=True)},
        {"model": _model(attention="pallas", logits_chunk=4, dropout_rate=0.1)},
        {"mesh": {"data": 4, "fsdp": 2}, "num_microbatches": 1, "batch_size": 8},
        {"log_period": 3, "eval_period": 2, "keep_checkpoints": None},
        {"reference": "online", "train_steps": 50},
        {"moving_reference": MovingReference(0.1, 3)},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_how_and_how_long_are_no_part_of_it(work, changes):
    _check(runs.setup(job(work, "run", **changes)), checkpoints.run_meta(work / "run"))


def _as_format_1(meta, ready):
    old = {k: v for k, v in meta.items() if k not in ("identity", "networks")}
    policy = meta["networks"]["policy"]
    return {
        **json.loads(json.dumps(old)),
        "format": 1,
        "model": {**policy["shape"], **policy["execution"]},
    }


def test_checkpoints_from_before_are_compared_in_what_they_hold(work):
    meta = checkpoints.run_meta(work / "run")
    ready = runs.setup(job(work, "run"))
    _check(ready, _as_format_1(meta, ready))
    for name, changes in (
        ("objective", {"objective": "IPO"}),
        ("model.mlp_activations", {"model": _model(mlp_activations=("relu",))}),
        ("seed", {"seed": 1}),
        ("initial_checkpoint", {"initial_checkpoint_path": None}),
        ("data_fingerprint", {"dataset": {"shuffle": False}}),
    ):
        other = runs.setup(job(work, "run", **changes))
        with pytest.raises(ValueError, match=f" {name}: saved"):
            _check(other, _as_format_1(meta, ready))


def test_a_checkpoint_keeps_what_symptoms_are_measured_against(work):
    saved = checkpoints.run_meta(work / "run")["symptoms"]
    lines = (work / "run" / "metrics.jsonl").read_text().splitlines()
    assert saved["first"]["loss"] == json.loads(lines[0])["train/loss"]
    assert saved["latest"]["loss"] == json.loads(lines[-1])["train/loss"]


def test_the_initial_checkpoint_may_be_gone(work, caplog):
    saved = checkpoints.run_meta(work / "run")
    gone = job(work, "run", initial_checkpoint_path=str(work / "nowhere"))
    _check(runs.setup(gone), saved)
    assert "is gone" in caplog.text
    with pytest.raises(FileNotFoundError):
        starts.parents(runs.setup(gone), None)


def test_another_library_is_no_other_optimizer(work):
    """Names inside closures are the library's; numbers that both know still count."""
    ready = runs.setup(job(work, "run", optimizer=optax.sgd(1e-2)))
    now = identity.of(ready, {"initial": None})
    before = json.loads(json.dumps(now))
    renamed = next(k for k, v in before["optimizer"].items() if v == -1e-2)
    before["optimizer"]["older_name"] = before["optimizer"].pop(renamed)
    with pytest.raises(ValueError, match="older_name"):
        identity.check({"identity": before}, now, ready, "DIR")
    before["described_by"] = "optax 0.0.1"
    identity.check({"identity": before}, now, ready, "DIR")
    before["optimizer"][renamed] = 0.5
    with pytest.raises(ValueError, match=r"saved 0\.5, now -0\.01"):
        identity.check({"identity": before}, now, ready, "DIR")


def test_a_checkpoint_restores_in_the_other_layout(work):
    """Scanned and back: every leaf of the state, the optimizer's too."""
    plain = runs.setup(job(work, "run"))
    manager = Checkpoints(work / "run")
    saved = checkpoints.run_meta(work / "run")
    state, _ = loop.restore(manager, plain, saved)
    scanned = plain.in_layout(True)
    other, _ = loop.restore(manager, scanned, saved)
    manager.close()
    jax.tree.map(
        lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)),
        other,
        scanned.abstract_state,
    )
    expected = models.stack_layers(state.params["policy"])
    jax.tree.map(np.testing.assert_array_equal, other.params["policy"], expected)
    back = runs.in_layout_of(plain.abstract_state, other)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    policy = starts.load_network(str(work / "run"), "policy", scanned)
    jax.tree.map(np.testing.assert_array_equal, policy, expected)


@pytest.mark.parametrize("factored", [1, pytest.param(128, marks=pytest.mark.slow)])
def test_adafactors_moments_change_their_layout(factored):
    model = _model(num_encoder_layers=2, num_decoder_layers=3)
    tx = optimizers.adafactor(1e-2, min_dim_size_to_factor=factored)
    init = functools.partial(models.init_params, model, jax.random.key(0))
    apart = {"policy": jax.eval_shape(init)}
    apart = jax.tree.map(lambda s: np.random.default_rng(0).random(s.shape, "f"), apart)
    stacked = {"policy": models.stack_layers(apart["policy"])}
    states = []
    for params in (apart, stacked):
        _, state = jax.jit(tx.update)(params, tx.init(params), params)
        states.append(state)
    for tree, like in (states, reversed(states)):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6),
            models.relayout(tree, like),
            like,
        )


def test_a_start_holds_one_copy_and_begins_at_the_loaded_policy(work):
    """Schedule-free's state holds parameters; DROV's value holds the policy's trunk."""
    ready = runs.setup(
        job(work, "start", "DROV", optimizer=optax.contrib.schedule_free_sgd(1e-8))
    )
    sft = str(work / "sft")
    policy = jax.device_get(starts.load_network(sft, "policy", ready))
    policy = jax.tree.map(np.array, policy)
    placed = starts.load_network(sft, "policy", ready)
    state = ready.init_state(jax.random.key(0), {"policy": placed})
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(placed))
    jax.tree.map(np.testing.assert_array_equal, state.params["policy"], policy)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state.z["policy"], policy)
    for name in ("encoder", "token_embedder"):
        jax.tree.map(
            np.testing.assert_array_equal, state.params["value"][name], policy[name]
        )
    fresh = ready.objective.init_params(
        jax.random.fold_in(jax.random.key(0), runs._INIT_STREAM)
    )
    np.testing.assert_allclose(
        state.params["value"]["value_head"]["kernel"],
        fresh["value"]["value_head"]["kernel"],
        rtol=1e-6,
    )


def test_two_models_of_equal_settings_are_two_vocabularies(tmp_path):
    """By content: both files are called vocabulary.model, with as many pieces."""
    found = []
    for name, line in (("one", "the cat {} sat on {}"), ("two", "we sold {} for {}")):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([line.format(i, 7 * i) for i in range(100)]),
            model_prefix=str(tmp_path / name),
            vocab_size=32,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
        found.append(vocabularies.SentencePieceVocabulary(f"{tmp_path / name}.model"))
    one, two = found
    assert one.to_json() == two.to_json() and one.vocab_size == two.vocab_size
    meta = {"vocabulary": one.to_json()}
    step = tmp_path / "run" / "checkpoints" / "1"
    (step / "meta").mkdir(parents=True)
    one.save(tmp_path / "run")
    # A checkpoint that names its content, and an older one that has it beside itself.
    for stored in ({**meta, "vocabulary_fingerprint": one.fingerprint}, meta):
        for path in (tmp_path / "run", step):
            starts._check_vocabulary(str(path), stored, one)
            with pytest.raises(ValueError, match="trained with another vocabulary"):
                starts._check_vocabulary(str(path), stored, two)
