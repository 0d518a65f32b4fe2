"""A reward model and its policy in turn: what a round is made of, and resumption."""

from __future__ import annotations

import json

import pytest
import tiny_run

from jaxalign import cli
from jaxalign.pipelines import meta_rm
from jaxalign.pipelines import policy_samples as stages
from jaxalign.training.train import train

SETTINGS = (
    "TASK_FEATURE_LENGTHS = {'inputs': 12, 'targets': 12}",
    "BATCH_SIZE = 8",
    "run.Run.sampler = None",
)
POLICY = """
from __gin__ import dynamic_registration
from jaxalign.training import run

include 'runs/dpo.gin'
TRAIN_STEPS = 1
"""


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sampled(path, **texts):
    """A file as `generate` writes it."""
    return write(
        path,
        [
            {"prompt": prompt, "sample": i, "response": text}
            for prompt, responses in texts.items()
            for i, text in enumerate(responses)
        ],
    )


def test_a_rounds_data_are_preferences_and_all_pairs_of_samples(tmp_path):
    data = write(
        tmp_path / "data.jsonl",
        [
            {"prompt": str(i), "chosen": "a", "rejected": "b", "pair_smoothing": 0.25}
            for i in range(3)
        ],
    )
    pairs, output = tmp_path / "pairs.jsonl", tmp_path / "both.jsonl"
    stages.write_pairs(pairs, data, ["pair_samples", "pair_smoothing"])
    samples = sampled(
        tmp_path / "samples.jsonl", p=["x", "y", "x", "z"], q=["x", " "], r=["u", "v"]
    )
    stages.write_data(output, pairs, samples)
    found = lines(output)
    assert [row["prompt"] for row in found] == ["0", "1", "2", "p", "r", "p"]
    preference = {"chosen": "a", "rejected": "b", "margin": 0.0, "pair_samples": 0}
    assert found[0]["pairs"] == [preference | {"pair_smoothing": 0.25}]
    # Of three different samples three pairs; of a single one none.
    assert [
        (p["chosen"], p["rejected"], p["pair_samples"]) for p in found[3]["pairs"]
    ] == [("x", "y", 3), ("x", "z", 3), ("y", "z", 3)]


def test_a_round_without_two_different_samples_is_refused(tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", [])
    samples = sampled(tmp_path / "samples.jsonl", p=["x", "x"], q=["y", ""])
    with pytest.raises(ValueError, match="no prompt has two different samples"):
        stages.write_data(tmp_path / "round1" / "data.jsonl", pairs, samples)


def test_scores_are_measured_where_there_are_two(tmp_path):
    judged = write(
        tmp_path / "judged.jsonl",
        [{"scores": s} for s in ([0.0, 1.0, 3.0], [5.0, None], [1.0, 1.0])],
    )
    assert stages.apart(judged) == pytest.approx((2.0 + 0.0) / 2)
    judged = write(
        tmp_path / "pairs.jsonl",
        [{"scores": s} for s in ([1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [None, 0.0])],
    )
    assert stages.accuracy(judged).mean == pytest.approx(2 / 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a policy, a reward model and preferences."""
    folder = tmp_path_factory.mktemp("meta")
    data = tiny_run.write_data(folder / "data.jsonl", 12)
    for name, objective in (("sft", "SFT"), ("rm", "BradleyTerry")):
        train(tiny_run.make_run(folder / name, data, folder, objective, train_steps=2))
    (folder / "policy.gin").write_text(POLICY + "\n".join(SETTINGS))
    return folder


def turns(folder, name, **changes):
    settings = {
        "initial": str(folder / "sft"),
        "reward": str(folder / "rm"),
        "data": str(folder / "data.jsonl"),
        "prompts": str(folder / "data.jsonl"),
        "held_out": str(folder / "data.jsonl"),
        "run_dir": str(folder / name),
        "bindings": SETTINGS,
        "policy_gin_files": [str(folder / "policy.gin")],
        "rounds": 1,
        "prompts_per_round": 4,
        "num_samples": 3,
        "max_new_tokens": 4,
    }
    return meta_rm.run(**{**settings, **changes})


def test_rounds_go_on_after_a_kill_and_may_be_more(folder, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages.verdicts, "training_rows", killed)
        with pytest.raises(KeyboardInterrupt):
            turns(folder, "run")
    home = folder / "run"
    done = {p: p.stat().st_mtime_ns for p in home.glob("round1/*.jsonl")}
    names = {"prompts", "samples", "data", "before", "verdicts", "held_out"}
    assert {p.stem for p in done} == names and not (home / "rounds.jsonl").exists()
    said = turns(folder, "run", rounds=2)
    assert all(p.stat().st_mtime_ns == at for p, at in done.items())
    one, two = lines(home / "rounds.jsonl")
    assert (one["round"], two["round"]) == (1, 2) and len(said.splitlines()) == 2
    assert one["sampled_from"] == str(folder / "sft")
    assert two["sampled_from"] == one["policy"] == str(home / "round1/train")
    assert two["reward"] == str(home / "round2/reward")
    # The second round's reward model began as the first's, on other samples.
    asked = [lines(home / f"round{n}/prompts.jsonl") for n in (1, 2)]
    assert not {r["prompt"] for r in asked[0]} & {r["prompt"] for r in asked[1]}
    stages_of = json.loads((home / "manifest.json").read_text())["stages"]
    key = stages_of["round2/reward"]["key"]
    assert key["INITIAL_CHECKPOINT_PATH"] == stages_of["round1/reward"]["output"]
    # One epoch of 12 preferences and as many rows of samples, two rows in one.
    metrics = lines(home / "round1/reward/metrics.jsonl")
    spreads = [row for row in metrics if any("meta/spread" in k for k in row)]
    assert spreads, metrics
    held = lines(home / "round1/held_out.jsonl")
    right = sum(a > b for a, b in (row["scores"] for row in held))
    assert one["accuracy"] == pytest.approx(right / 12)
    assert one["apart"] >= 0.0 and one["apart_before"] >= 0.0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_samples": 1}, "--num_samples must be at least 2"),
        ({"rounds": 0}, "--rounds at least 1"),
        ({"gin_files": ["runs/reward_model.gin"]}, "No run of MetaRM in runs/reward"),
        ({"policy_gin_files": ["runs/rorpo.gin"]}, "judged samples cannot give"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(folder, changes, says):
    with pytest.raises(ValueError, match=says):
        turns(folder, "refused", **changes)
    assert not (folder / "refused").exists()


def test_it_is_a_verb(capsys):
    assert cli.main(["meta_rm", "--help"]) == 0
    assert "--policy_gin_files" in capsys.readouterr().out
