"""``jaxalign score``: a killed run ends with the bytes of one that was not."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import tiny_run

from jaxalign import models
from jaxalign import vocabularies as vocabs
from jaxalign.inference import generation, outputs, score
from jaxalign.training import checkpoints, scoring


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Scores a file of rows with a tiny network."""
    model = models.T5(tiny_run.CONFIG)
    params = models.init_params(model, jax.random.key(0))
    vocabulary = vocabs.ByteVocabulary(extra_ids=125)
    meta = {"networks": {"policy": {"fingerprint": "abc"}}}
    policy = checkpoints.Network(model, params, vocabulary, meta, None)
    monkeypatch.setattr(generation, "load", lambda *_: (policy, None))
    monkeypatch.setattr(outputs, "policy_key", lambda _: "abc")
    data = tiny_run.write_data(tmp_path / "data.jsonl")

    def run(name, **settings):
        output = tmp_path / name
        settings = {"checkpoint": "sft", "data": str(data), "batch_size": 4} | settings
        assert score.score(output=str(output), **settings) == 60
        return output

    return run


def kill_at(monkeypatch, batch: int) -> list[int]:
    """Ends the pass at a batch; returns the list of the batches that were begun."""
    real, begun = scoring.meshes.put_batch, []

    def put(*args):
        begun.append(1)
        if len(begun) == batch:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(scoring.meshes, "put_batch", put)
    return begun


def test_a_killed_run_goes_on_and_leaves_the_same_bytes(run, monkeypatch):
    whole = run("whole.jsonl")
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    assert lines[7]["prompt"] == "say 7" and lines[7]["num_tokens"] == 8
    assert all(np.isfinite(line["logp"]) for line in lines)
    monkeypatch.setattr(scoring, "SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at(patch, 3)
        run("killed.jsonl")
    folder = whole.parent
    assert len(list(folder.glob("killed.jsonl.*.unfinished-0.npz"))) == 1
    with monkeypatch.context() as patch:
        begun = kill_at(patch, 0)
        # Other settings take nothing from it; the same go on.
        with pytest.raises(KeyboardInterrupt):
            kill_at(patch, 1)
            run("killed.jsonl", field_map={"completion": "chosen"})
        begun = kill_at(patch, 0)
        killed = run("killed.jsonl")
    assert killed.read_bytes() == whole.read_bytes()
    assert not list(folder.glob("*.unfinished-*"))
    with monkeypatch.context() as patch:
        before = kill_at(patch, 0)
        run("again.jsonl")
    assert len(before) == len(begun) + 2


def test_a_finished_output_is_kept_for_the_same_settings_only(run, monkeypatch):
    output = run("out.jsonl")
    monkeypatch.setattr(generation, "load", None)
    run("out.jsonl", batch_size=8)
    with pytest.raises(ValueError, match="was made with other settings: on_bad_row"):
        run("out.jsonl", on_bad_row="skip")
    assert output.exists()
