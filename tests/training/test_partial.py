"""Starts from a part of a checkpoint, of every format."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_run

from jaxalign import models
from jaxalign.inference.convert import convert
from jaxalign.interop.folders import flat, unstack
from jaxalign.training import checkpoints, new_run, partial, starts
from jaxalign.training.run import setup
from jaxalign.vocabularies import ByteVocabulary

DEEP = dataclasses.replace(tiny_run.CONFIG, num_decoder_layers=2, scan_layers=False)
HEAD = "decoder/logits_dense/kernel"
RULES = [
    (r"policy/decoder/layers_1/(.*)", r"decoder/layers_0/\1"),
    (f"policy/{HEAD}", None),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A checkpoint with one decoder layer, in all formats."""
    folder = tmp_path_factory.mktemp("partial")
    tiny_run.write_data(folder / "data.jsonl")
    model = models.T5(tiny_run.CONFIG)
    params = models.init_params(model, jax.random.key(7))
    new_run.write(folder / "jaxalign", params, model, ByteVocabulary(125))
    for kind in ("hf", "t5x"):
        convert(str(folder / "jaxalign"), str(folder / kind), format=kind)
    return folder


def _ready(work, run_dir, objective="SFT", kind="jaxalign", model=DEEP, **changes):
    run = tiny_run.make_run(
        run_dir,
        work / "data.jsonl",
        work / "cache",
        objective,
        **{
            "model": models.T5(model),
            "initial_checkpoint_path": str(work / kind),
            "assignment": RULES,
            **changes,
        },
    )
    return setup(run)


@pytest.mark.parametrize("kind", ["jaxalign", "hf", "t5x"])
@pytest.mark.parametrize(
    "scan_layers", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_some_parameters_are_renamed_and_some_left_out(
    kind, scan_layers, work, tmp_path, caplog
):
    caplog.set_level("INFO")
    model = dataclasses.replace(DEEP, scan_layers=scan_layers)
    ready = _ready(work, tmp_path / "run", kind=kind, model=model)
    key = jax.random.key(0)
    state = starts.start(ready, key)
    got = unstack(state.params["policy"])
    fresh = unstack(ready.init_networks(key)["policy"])
    held = flat(checkpoints.load(work / "jaxalign").params)
    assert set(got) == set(fresh)
    for name, leaf in got.items():
        stored = held[name.replace("decoder/layers_1/", "decoder/layers_0/")]
        want = fresh[name] if name == HEAD else stored
        np.testing.assert_array_equal(leaf.read(), want.read(), err_msg=name)
    told = json.loads((tmp_path / "run" / partial.FILE).read_text())["policy"]
    assert told["initialised"] == told["left_over"] == [HEAD]
    copied = "decoder/layers_1/mlp/wo/kernel"
    assert told["loaded"][copied] == ["decoder/layers_0/mlp/wo/kernel"]
    assert told["checkpoint"] == str(work / kind)
    assert f"1 initialised: {HEAD}" in caplog.text


def test_what_a_run_begins_with_is_what_it_is_made_of(work, tmp_path):
    ready = _ready(work, tmp_path / "run", "DPO", reference="online")
    whole = checkpoints.fingerprint(work / "jaxalign")
    parents = starts.parents(ready, None)
    assert parents["initial"] == parents["reference"] != whole
    for changes in ({"assignment": RULES[:1] + RULES[1:] * 2}, {"seed": 1}):
        other = _ready(work, tmp_path / "run", "DPO", reference="online", **changes)
        assert starts.parents(other, None)["initial"] != parents["initial"]
    # The reference is not in the checkpoint: it is written, or made again.
    about = starts.described(ready, parents)
    assert "from" not in about["reference"]
    key = jax.random.key(0)
    state = starts.start(ready, key)
    cached = _ready(work, tmp_path / "run", "DPO")
    went_on = starts.start(cached, key)
    written, load = starts.reference_policy(cached, key, parents, went_on, new=False)
    assert written == parents["reference"]
    jax.tree.map(np.testing.assert_array_equal, load(), state.params["policy"])


@pytest.mark.parametrize(
    ("rules", "model", "told"),
    [
        ([("polcy/.*", None)], DEEP, r"\['polcy/\.\*'\] match no parameter"),
        (
            RULES[1:],
            DEEP,
            r"lacks 'decoder/layers_1/.*nearest it has",
        ),
        ([*RULES, ("policy/x", None)], DEEP, "match no parameter"),
        ([("(", None)], DEEP, "no regular expression"),
        (
            [*RULES, (r"policy/(.*)/mlp/wo/kernel", r"\1/mlp/wi_0/kernel")],
            dataclasses.replace(DEEP, num_decoder_layers=1),
            "match no parameter",
        ),
        (
            RULES,
            dataclasses.replace(DEEP, mlp_dim=24),
            r"mlp/wi_0/kernel must have shape \(16, 24\).*has \(16, 32\).*at random",
        ),
        (RULES, dataclasses.replace(DEEP, num_heads=4, head_dim=4), "another network"),
        (
            [("policy/decoder/layers_1/.*", None), RULES[1]],
            dataclasses.replace(DEEP, scan_layers=True),
            r"leaves out some layers of policy/decoder/decoder/.*start together",
        ),
    ],
)
def test_mistakes(rules, model, told, work, tmp_path):
    ready = _ready(work, tmp_path / "run", model=model, assignment=rules)
    with pytest.raises(ValueError, match=told):
        starts.start(ready, jax.random.key(0))
    assert not (tmp_path / "run" / partial.FILE).exists()
