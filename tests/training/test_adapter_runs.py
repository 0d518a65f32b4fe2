"""Runs that train an adapter: what their checkpoints hold, and what reads them."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_run

import jaxalign
from jaxalign import models
from jaxalign.inference.convert import convert
from jaxalign.interop.folders import unstack
from jaxalign.models import adapters
from jaxalign.training import checkpoints, fingerprints, leafwise, run_directory
from jaxalign.training import train as loop

LORA = adapters.LoRA(rank=3, targets="attention/|mlp/")


def job(folder, name, objective="DPO", **changes):
    data, cache = folder / "data.jsonl", folder / "cache"
    if not data.exists():
        tiny_run.write_data(data)
    settings = {"train_steps": 4, "adapter": LORA, **changes}
    return tiny_run.make_run(folder / name, data, cache, objective, **settings)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base, and a whole run of an adapter on it."""
    folder = tmp_path_factory.mktemp("adapters")
    loop.train(job(folder, "sft", "SFT", train_steps=2, adapter=None))
    loop.train(on_base(folder, "whole"))
    return folder


def on_base(folder, name, **changes):
    start = {"initial_checkpoint_path": str(folder / "sft")}
    return job(folder, name, **{**start, **changes})


def prints(run):
    return run_directory.read_manifest(run)["networks"]


def close(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_its_checkpoint_has_no_array_of_the_base(work):
    run = work / "whole"
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [x["train/loss"] for x in lines if "train/loss" in x]
    assert losses[0] == np.float32(np.log(2.0)) and losses[-1] < 0.69
    folder = run / "checkpoints" / "4"
    meta = checkpoints.read_meta(run)
    about = meta["networks"]["policy"]
    assert about["base"]["from"] == str(work / "sft")
    assert about["base"]["fingerprint"] == prints(work / "sft")["policy"]
    found = checkpoints.load_adapter(run)
    assert found.adapter == LORA
    leaves = fingerprints.leaf_names(found.own)
    assert all(adapters.is_adapter(name) for name in leaves) and leaves
    with ocp.StandardCheckpointer() as reader:
        for item in ("policy", "state"):
            tree = reader.metadata(folder / item).item_metadata.tree
            sizes = {x.shape for x in jax.tree.leaves(tree) if hasattr(x, "shape")}
            whole = {x.shape for x in jax.tree.leaves(found.base) if x.ndim > 1}
            assert sizes and not sizes & whole, item
    base = checkpoints.load(work / "sft").params
    jax.tree.map(np.testing.assert_array_equal, found.base, base)


def test_it_goes_on_to_the_bit(work):
    loop.train(on_base(work, "twice", train_steps=2))
    loop.train(on_base(work, "twice"))
    assert prints(work / "twice") == prints(work / "whole")
    ours, theirs = (checkpoints.load_adapter(work / n).own for n in ("twice", "whole"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_it_is_read_by_its_path_merged_and_starts_another_run(work):
    found = checkpoints.load(work / "whole")
    apart = checkpoints.load_adapter(work / "whole")
    expanded = apart.adapter.expand(adapters.overlay(apart.base, apart.own))
    close(found.params, adapters.merge(expanded))
    policy = jaxalign.load(str(work / "whole"))
    prompts, answers = ["say 1", "say 2"], ["it is 1", "no"]
    merged = policy.score(prompts, answers)
    base = jaxalign.load(str(work / "sft")).score(prompts, answers)
    assert abs(np.subtract(merged, base)).max() > 1e-3
    ready = loop.setup(job(work, "next", initial_checkpoint_path=str(work / "whole")))
    state = loop.starts.start(ready, jax.random.key(0))
    close(state.frozen["policy"], found.params)
    described = loop.starts.described(ready, loop.starts.parents(ready, None))
    assert described["policy"]["base"]["fingerprint"] == found.fingerprint


@pytest.mark.parametrize(
    "name",
    [
        "whole",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("layers_stacked", "head", "random")
        ),
    ],
)
def test_it_is_read_leaf_by_leaf_merged(work, name):
    """For conversion, and starts with a part of it."""
    loop.train(leaf_by_leaf_job(work, name))
    found = leafwise.opened(work / name)
    wanted = checkpoints.load(work / name)
    read = {path: leaf.read() for path, leaf in found.leaves.items()}
    close(read, {path: x.read() for path, x in unstack(wanted.params).items()})
    assert not found.model.config.scan_layers
    stop = convert(str(work / name), str(work / f"{name}_hf"), format="hf", verify=True)
    assert "largest difference" in stop, stop


def leaf_by_leaf_job(work, name):
    if name == "layers_stacked":
        config = dataclasses.replace(tiny_run.CONFIG, scan_layers=True)
        dora = dataclasses.replace(LORA, dora=True)
        return on_base(work, name, model=models.T5(config), adapter=dora, train_steps=1)
    if name == "head":
        kept = {"trainable": "policy/decoder/logits_dense"}
        return on_base(work, name, adapter=adapters.IA3(), train_steps=1, **kept)
    if name == "random":
        return job(work, name, train_steps=1)
    return on_base(work, name)


@pytest.mark.slow
def test_in_the_step_in_microbatches_and_scanned_it_is_the_same_run(work):
    """The reference comes of the base that is there; nothing is loaded for it."""
    ways = {"data": 2, "fsdp": 2, "tensor": 2}
    changes = {"reference": "online", "num_microbatches": 2, "mesh": ways}
    ready = loop.setup(on_base(work, "online", **changes))
    assert set(ready.abstract_state.networks) == {"policy"}
    loop.train(on_base(work, "online", **changes))
    whole = checkpoints.load(work / "whole").params
    close(checkpoints.load(work / "online").params, whole)
    config = dataclasses.replace(tiny_run.CONFIG, scan_layers=True)
    scanned = {"model": models.T5(config)}
    loop.train(on_base(work, "scanned", train_steps=2, **scanned))
    loop.train(on_base(work, "scanned"))  # goes on with its layers apart
    close(checkpoints.load(work / "scanned").params, whole)


def test_a_base_that_is_gone_or_another_is_told(work):
    loop.train(job(work, "other", "SFT", train_steps=1, adapter=None, seed=1))
    aside = work / "aside"
    shutil.move(work / "sft", aside)
    try:
        with pytest.raises(FileNotFoundError, match="adapter of .*sft, which is gone"):
            checkpoints.load(work / "whole")
        shutil.copytree(work / "other", work / "sft")
        with pytest.raises(ValueError, match="other parameters now: expected the"):
            checkpoints.load(work / "whole")
    finally:
        shutil.rmtree(work / "sft", ignore_errors=True)
        shutil.move(aside, work / "sft")


@pytest.mark.slow
def test_from_random_weights_it_holds_its_base_too(work):
    loop.train(job(work, "from_random", train_steps=2))
    loop.train(job(work, "from_random"))
    loop.train(job(work, "random_whole"))
    assert prints(work / "from_random") == prints(work / "random_whole")
    held = checkpoints.read_meta(work / "from_random")["networks"]
    assert "base" not in held["policy"]
    checkpoints.load(work / "from_random")


@pytest.mark.slow
def test_what_trains_beside_an_adapter_is_in_its_checkpoint(work):
    changes = {"trainable": "policy/decoder/logits_dense", "train_steps": 2}
    loop.train(on_base(work, "beside", **changes))
    found = checkpoints.load_adapter(work / "beside")
    assert "kernel" in found.own["decoder"]["logits_dense"]
    merged = checkpoints.load(work / "beside").params
    head = found.own["decoder"]["logits_dense"]["kernel"]
    np.testing.assert_array_equal(merged["decoder"]["logits_dense"]["kernel"], head)
    base = found.base["decoder"]["logits_dense"]["kernel"]
    assert abs(head - base).max() > 0


@pytest.mark.slow
def test_trainable_alone_keeps_whole_checkpoints_and_goes_on_to_the_bit(work):
    changes = {"trainable": "policy/decoder/", "adapter": None}
    loop.train(on_base(work, "part", train_steps=2, **changes))
    loop.train(on_base(work, "part", **changes))
    loop.train(on_base(work, "part_whole", **changes))
    assert prints(work / "part") == prints(work / "part_whole")
    found = checkpoints.load(work / "part").params
    base = checkpoints.load(work / "sft").params
    for name in ("encoder", "token_embedder"):
        jax.tree.map(np.testing.assert_array_equal, found[name], base[name])
    assert prints(work / "part") != prints(work / "sft")
    with pytest.raises(ValueError, match="trainable: saved 'policy/dec.*now None"):
        loop.train(on_base(work, "part", adapter=None))


def test_another_adapter_is_another_run(work):
    other = dataclasses.replace(LORA, alpha=8.0)
    with pytest.raises(ValueError, match="adapter.alpha: saved 16.0, now 8.0"):
        loop.train(on_base(work, "whole", adapter=other))
    with pytest.raises(ValueError, match="'moving' is the average of whole policies"):
        loop.setup(on_base(work, "x", reference="moving"))
    with pytest.raises(ValueError, match="logits_dense, which take no adapter"):
        loop.setup(on_base(work, "x", adapter=adapters.LoRA(targets="decoder/")))
