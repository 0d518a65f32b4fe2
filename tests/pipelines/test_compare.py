"""The comparison of objectives: complete, at equal compute, and drawn."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxalign import configs, locks, objectives
from jaxalign.pipelines import compare as comparison
from jaxalign.pipelines import quickstart
from jaxalign.report import comparison as page
from jaxalign.training import run_directory
from jaxalign.training import train as loop


def test_every_objective_but_the_start_is_compared():
    compared = {name for name, _ in comparison.SETTINGS.values()}
    policies = {n for n, o in objectives.OBJECTIVES.items() if o.main == "policy"}
    assert compared == policies - {"SFT"}


@pytest.mark.parametrize("name", comparison.SETTINGS)
def test_a_stage_is_a_gin_file_of_its_objective_with_equally_many_responses(name):
    schema, settings = comparison.settings_of(name, steps=10)
    kind = objectives.OBJECTIVES[comparison.SETTINGS[name][0]]
    bindings = [f"{k} = {v!r}" for k, v in (quickstart.COMMON | settings).items()]
    configs.parse([f"runs/{name}.gin"], bindings)
    assert re.search(rf"OBJECTIVE = @.*\b{kind.__name__}\b", configs.config_str())
    per_prompt = 1 if schema == "trajectory" else 2
    responses = settings["BATCH_SIZE"] * settings["PACKING"] * per_prompt
    assert responses == comparison.RESPONSES_PER_STEP


def test_an_unknown_objective_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="dro_v"):
        comparison.settings_of("drov", steps=10)


def test_the_page_shows_every_objective(tmp_path):
    table = {
        name: {"reward": [r, r + 0.1], "kl": [k, k], "tokens": [30.0, 31.0]}
        for name, r, k in (("sft", 0.5, 0.0), ("dpo", 0.8, 1.0), ("simpo", 0.1, 9.0))
    }
    wins = {a: {b: 0.5 for b in table if b != a} for a in table}
    path = tmp_path / "comparison.html"
    results = {"objectives": table, "win_rates": wins}
    page.write(path, results, steps=5, split="test")
    text = path.read_text()
    assert text.count("data:image/svg+xml") == 2
    assert all(f"<td>{name}</td>" in text for name in table)
    assert "0.850 ± 0.071" in text and "2 seeds" in text
    assert comparison.as_text(table).splitlines()[1].startswith("dpo")


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Compares policies that are trained and sampled by nobody."""
    done = []

    def train(run, config):
        name = Path(run.run_dir).name
        done.append(f"{name} for {run.train_steps} steps")
        run_directory.update_manifest(run.run_dir, params_fingerprint=name)

    def dataset(path, **asked):
        path.write_text(repr(asked))

    def sample(policy, prompts, **_):
        done.append(f"answers to {len(prompts)} prompts")
        return (SimpleNamespace(texts=["yes"], tokens=[[1]]) for _ in prompts)

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(quickstart.world, "write_dataset", dataset)
    monkeypatch.setattr(comparison.generation, "sample", sample)
    monkeypatch.setattr(comparison.checkpoints, "load", lambda path, *_: None)
    monkeypatch.setattr(comparison.checkpoints, "network_in_gin", lambda path: None)
    zeros = np.zeros(100)
    monkeypatch.setattr(
        comparison.score, "score_pairs", lambda _, p, **__: (zeros[: len(p)], None)
    )
    monkeypatch.setattr(page, "write", lambda *_, **__: None)

    def run(**settings):
        done.clear()
        common = {"objectives": ["dpo"], "seeds": 1, "steps": 11, "num_prompts": 10}
        comparison.run(run_dir=tmp_path, **(common | settings))
        return list(done)

    run.folder, run.done = tmp_path, done
    return run


def test_what_is_there_serves_the_same_settings_only(compare):
    made = ["sft for 400 steps", "answers to 10 prompts"]
    made += ["dpo for 11 steps", "answers to 10 prompts"]
    assert compare() == made
    assert compare() == []  # again
    files = {p: p.read_bytes() for p in compare.folder.rglob("*") if p.is_file()}
    other = r"'settings.json' .* other inputs: steps=11 .now steps=40"
    with pytest.raises(ValueError, match=other):
        compare(steps=40)
    other = r"prompts.jsonl' .* num_prompts=10 .now num_prompts=20"
    with pytest.raises(ValueError, match=other):
        compare(num_prompts=20)
    with pytest.raises(ValueError, match="steps=11"):
        compare(objectives=["ipo", "dpo"], steps=40)
    assert compare.done == []  # refused before anything is trained, ipo too
    assert files == {p: p.read_bytes() for p in files}
    # Another split or objective is not another setting of what is there.
    assert compare(split="validation", objectives=["ipo"])[1] == "ipo for 11 steps"
    # Asked for again with other settings: what follows is made again with it.
    assert compare(steps=40, redo=["settings.json"])[0] == "dpo for 40 steps"
    manifest = run_directory.read_manifest(compare.folder / "seed0" / "sft")
    sft = {**manifest, "params_fingerprint": "another's"}
    run_directory.update_manifest(compare.folder / "seed0" / "sft", **sft)
    with pytest.raises(ValueError, match="no longer what the stage 'seed0/sft' made"):
        compare(steps=40)


def test_two_comparisons_do_not_share_a_folder(compare):
    with locks.hold(compare.folder, "folder of a comparison"):
        with pytest.raises(locks.HeldError, match="in use by process"):
            compare()
    assert compare.done == []
