"""Runs that train a soft prompt: what their checkpoints hold, and what reads them."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_run

import jaxalign
from jaxalign import models
from jaxalign.inference.steering import steer
from jaxalign.models import adapters
from jaxalign.training import announce, checkpoints, run_directory
from jaxalign.training import train as loop

PROMPT, NAME = adapters.SoftPrompt(length=3), "soft_prompt"
PROMPTS, ANSWERS = ["say 1", "say 22"], ["it is 1", "no"]


def job(folder, name, objective="DPO", **changes):
    data, cache = folder / "data.jsonl", folder / "cache"
    if not data.exists():
        tiny_run.write_data(data)
    start = {"initial_checkpoint_path": str(folder / "sft"), "adapter": PROMPT}
    settings = {"train_steps": 4, **start, **changes}
    return tiny_run.make_run(folder / name, data, cache, objective, **settings)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base, and a whole run of a soft prompt before it, two prompts in a row."""
    folder = tmp_path_factory.mktemp("prompts")
    bare = {"initial_checkpoint_path": None, "adapter": None}
    loop.train(job(folder, "sft", "SFT", train_steps=2, **bare))
    loop.train(job(folder, "whole"))
    return folder


def rows(run):
    return np.asarray(checkpoints.load_adapter(run).own["token_embedder"][NAME])


def test_its_checkpoint_holds_its_rows_alone_and_goes_on_to_the_bit(work):
    found = checkpoints.load_adapter(work / "whole")
    assert found.adapter == PROMPT
    assert jax.tree.map(np.shape, found.own) == {"token_embedder": {NAME: (3, 16)}}
    base = checkpoints.load(work / "sft").params
    jax.tree.map(np.testing.assert_array_equal, found.base, base)
    ready = loop.setup(job(work, "unused"))
    told = "\n".join(announce.describe(ready.run, ready, 0))
    shape = ready.inputs.train.shape
    assert f"rows of {shape.encoder_length} tokens {3 * shape.prompts} longer" in told
    begun = loop.starts.start(ready, jax.random.key(0)).params["policy"]
    assert abs(rows(work / "whole") - begun["token_embedder"][NAME]).max() > 1e-4
    loop.train(job(work, "twice", train_steps=2))
    loop.train(job(work, "twice"))
    one, two = (run_directory.read_manifest(work / n) for n in ("whole", "twice"))
    assert one["networks"] == two["networks"]
    np.testing.assert_array_equal(rows(work / "twice"), rows(work / "whole"))


@pytest.mark.slow
def test_in_the_step_in_microbatches_and_scanned_it_is_the_same_run(work):
    """The reference is the base without the rows; nothing is loaded for it."""
    ways = {"data": 2, "fsdp": 2, "tensor": 2}
    config = dataclasses.replace(tiny_run.CONFIG, scan_layers=True)
    changes = {"reference": "online", "num_microbatches": 2, "mesh": ways}
    changes |= {"model": models.T5(config)}
    ready = loop.setup(job(work, "online", **changes))
    assert set(ready.abstract_state.networks) == {"policy"}
    assert set(ready.abstract_state.params["policy"]) == {"token_embedder"}
    loop.train(job(work, "online", **changes))
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(rows(work / "online"), rows(work / "whole"), **close)


def test_it_is_read_by_its_path(work, tmp_path):
    policy = jaxalign.load(str(work / "whole"))
    params = policy.network.params
    np.testing.assert_array_equal(params["token_embedder"][NAME], rows(work / "whole"))
    ids = [policy.network.vocabulary.encode(t) + [1] for t in (*PROMPTS, *ANSWERS)]
    width = max(map(len, ids))
    tokens = np.array([x + [0] * (width - len(x)) for x in ids], np.int32)
    inputs, targets = tokens[:2], tokens[2:, None]
    batch = {
        "encoder_input_tokens": inputs,
        "encoder_segment_ids": (inputs > 0).astype(np.int32),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (0, 0), (1, 0)))[..., :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.float32),
        "decoder_segment_ids": (targets > 0).astype(np.int32),
        "prompt_mask": np.ones((2, 1), np.float32),
        "response_mask": np.ones((2, 1), np.float32),
        "response_prompt": np.zeros((2, 1), np.int32),
    }
    wanted = models.response_logps(policy.network.model, params, batch)[:, 0]
    found = policy.score(PROMPTS, ANSWERS)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    base = jaxalign.load(str(work / "sft")).score(PROMPTS, ANSWERS)
    assert abs(np.subtract(found, base)).max() > 1e-2
    texts = policy.generate(PROMPTS, num_samples=2, max_new_tokens=5)
    assert [len(x) for x in texts] == [2, 2]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    output = tmp_path / "steered.jsonl"
    steer(
        checkpoint=str(work / "whole"),
        prompts=str(file),
        output=str(output),
        regex="(yes|no)",
        max_new_tokens=6,
    )
    steered = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["prompt"] for row in steered} == set(PROMPTS)
    assert {row["response"] for row in steered} <= {"yes", "no"}


def test_it_is_merged_into_nothing_and_starts_no_run(work, tmp_path):
    policy = jaxalign.load(str(work / "whole"))
    for format in ("hf", "jaxalign"):
        with pytest.raises(ValueError, match="cannot be merged.*--format=peft"):
            policy.save(tmp_path / "out", format=format)
        assert not (tmp_path / "out").exists()
    start = str(work / "whole")
    for changes in (
        {"initial_checkpoint_path": start, "adapter": None},
        {"initial_checkpoint_path": start},
        {"reference_checkpoint_path": start, "reference": "online"},
    ):
        with pytest.raises(ValueError, match="a soft prompt, which cannot be merged"):
            loop.train(job(work, "next", **changes))


def test_a_longer_one_is_another_run(work):
    with pytest.raises(ValueError, match="adapter.length: saved 3, now 4"):
        loop.train(job(work, "whole", adapter=adapters.SoftPrompt(length=4)))
