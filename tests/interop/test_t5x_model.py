"""T5X's own trainer on jaxalign's objectives, where a checkout of it is at hand."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from jaxalign import models, objectives
from jaxalign.interop import t5x, t5x_features, t5x_model

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "support" / "t5x_trainer.py"
CONFIG = models.T5Config(384, 16, 2, 8, 32, 1, 1)


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    source = os.environ.get("T5X_SRC")
    if not source:
        pytest.skip(
            "T5X_SRC must name a folder with checkouts of t5x, airio and jestimator "
            "(and, in deps, of what they need and this environment lacks)."
        )
    folder = tmp_path_factory.mktemp("t5x")
    page = (ROOT / "docs" / "t5x.md").read_text()
    (text,) = re.findall(r"^```gin\n(.*?)^```", page, re.M | re.S)
    (folder / "page.gin").write_text(text)
    parts = ("t5x", "airio", "jestimator", "deps")
    path = [str(ROOT), *(os.path.join(source, part) for part in parts)]
    # One device: T5X gives all that there are to its model axis.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    run = subprocess.run(
        [sys.executable, SCRIPT, folder, folder / "page.gin"],
        env=environment | {"PYTHONPATH": os.pathsep.join(path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    lines = (line for line in run.stdout.splitlines() if line.startswith("{"))
    return [json.loads(line) for line in lines]


def _of(facts, what):
    found = {fact["case"]: fact for fact in facts if fact["what"] == what}
    assert found
    return found


def test_twenty_steps_of_t5xs_trainer_give_the_losses_of_ours(facts):
    found = _of(facts, "losses")
    assert set(found) == {"DROV", "DPO", "DROV scanned"}
    for fact in found.values():
        assert len(fact["found"]) == fact["step"] == 20
        np.testing.assert_allclose(fact["found"], fact["wanted"], rtol=1e-5)
        assert fact["parameters"] < 1e-5 and fact["reference"] == 0
        assert fact["metrics"] > 15


def test_microbatches_are_refused(facts):
    message = _of(facts, "microbatches")["DPO"]["message"]
    assert "Set trainer.Trainer.num_microbatches = None" in message


def test_a_t5x_checkpoint_starts_every_network(facts):
    found = _of(facts, "starts")
    assert found["DROV"]["equal"] == dict.fromkeys(
        ("policy", "value", "reference", "value_head"), True
    )
    assert found["DPO"]["equal"] == {"policy": True, "reference": True}
    assert {fact["step"] for fact in found.values()} == {7}


def test_scores_logits_and_greedy_answers_are_the_networks(facts):
    for fact in _of(facts, "answers").values():
        assert fact["scores"] < 1e-4 and fact["logits"] < 1e-3
        assert fact["tokens"] and fact["shape"] == [4, 16]


def test_train_py_runs_the_pages_gin_file(facts):
    fact = _of(facts, "train.py")["DPO"]
    assert fact["last"] == fact["step"] == 4
    assert fact["width"] == 64 and fact["equal"]


def _objective(kind=objectives.DPO):
    return kind(model=models.T5(CONFIG))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"objective": _objective(), "reference": "moving"}, "must be one of"),
        ({"objective": _objective(objectives.BCO)}, "BCO adds up"),
        (
            {"objective": _objective(), "model": models.ScalarModel(CONFIG)},
            "Give the network once",
        ),
    ],
)
def test_what_t5x_has_no_room_for_is_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        t5x.as_t5x_model(vocabulary=None, optimizer_def=None, **settings)


def test_without_t5x_the_message_says_where_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "t5x", None)
    t5x_model._model_class.cache_clear()
    with pytest.raises(ImportError, match="google-research/t5x"):
        t5x_model._model_class()


def _converted(objective, rows, lengths, **settings):
    tf = pytest.importorskip("tensorflow")
    pytest.importorskip("seqio")
    signature = {
        name: tf.TensorSpec(
            [None] if isinstance(value, list) else [],
            tf.float32 if isinstance(value, float) else tf.int32,
        )
        for name, value in rows[0].items()
    }
    ds = tf.data.Dataset.from_generator(lambda: rows, output_signature=signature)
    kind = t5x_features.converter(objective, **settings)
    (batch,) = kind(pack=False)(ds, lengths).batch(len(rows)).as_numpy_iterator()
    return batch


ROWS = [
    {"inputs": [5, 6, 1], "chosen": [7, 8, 9, 1], "rejected": [4, 1]},
    {"inputs": [5, 1], "chosen": [7, 8, 9, 2, 1], "rejected": [7, 8, 9, 2, 4, 1]},
]


def test_pairs_become_the_feeds_own_batch():
    from jaxalign import data
    from jaxalign.data.plan import Placement, RowShape

    batch = _converted(_objective(), ROWS, {"inputs": 4, "targets": 4})
    wanted = []
    for i, row in enumerate(ROWS):
        ids = {name: np.array(value, np.int32) for name, value in row.items()}
        wanted.append(
            data.to_arrays(
                [
                    data.Row(
                        key=str(i),
                        prompts=[ids["inputs"]],
                        responses=[ids["chosen"], ids["rejected"]],
                        response_prompt=[0, 0],
                        response_kind=[0, 0],
                        response_reward=[float("nan")] * 2,
                        response_label=[-1, -1],
                        pairs=[(0, 1, 0.0)],
                    )
                ],
                Placement(np.array([0]), np.arange(2), inputs=4, targets=4),
                RowShape(4, 2, 4, prompts=1, responses=2, pairs=1),
                prompt_ids=[-1],
            )
        )
    assert batch["pair_mask"].tolist() == [[1.0], [0.0]]  # equal once they are cut
    assert set(batch) == set(wanted[0])
    for name, value in batch.items():
        np.testing.assert_array_equal(value, np.stack([w[name] for w in wanted]), name)


def test_rewards_and_cached_references_are_numbers_of_the_task():
    rows = [
        {"inputs": [5, 1], "targets": [7, 1], "reward": r, "ref_logps": -r}
        for r in (0.5, 2.0)
    ]
    objective, lengths = _objective(objectives.DROV), {"inputs": 3, "targets": 2}
    batch = _converted(objective, rows, lengths, cached_reference=True)
    assert batch["response_reward"].tolist() == [[0.5], [2.0]]
    assert batch["response_ref_logps"].tolist() == [[-0.5], [-2.0]]
    params = objective.init_params(jax.random.key(0))
    loss, _ = objective.batch_loss(params, batch)
    assert np.isfinite(loss)
    lacking = [{k: v for k, v in row.items() if k != "reward"} for row in rows]
    with pytest.raises(ValueError, match="lacks the feature 'reward'"):
        _converted(objective, lacking, lengths)


def test_what_seqio_cannot_feed_is_refused():
    with pytest.raises(ValueError, match="KTO trains on rows that hold several"):
        t5x_features.converter(_objective(objectives.KTO))
    pytest.importorskip("seqio")
    with pytest.raises(ValueError, match="DatasetConfig.pack = False"):
        t5x_features.converter(_objective())(pack=True)
    pads_with_1 = types.SimpleNamespace(pad_id=1, eos_id=2, path="x")
    with pytest.raises(ValueError, match="seqio has no vocabulary with the ids"):
        t5x_model._seqio(pads_with_1)
