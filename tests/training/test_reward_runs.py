"""An ensemble trained on pairs, and all that its checkpoint is good for."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest
import tiny_run

from jaxalign import judges, objectives
from jaxalign.inference import score
from jaxalign.objectives.base import Step
from jaxalign.serving import rerank
from jaxalign.training import checkpoints, scoring, standard
from jaxalign.training import train as loop

SETTINGS = {"members": 3, "member_share": 0.6, "aggregate": "penalised"}


def job(folder, name, **changes):
    data = folder / "data.jsonl"
    if not data.exists():
        tiny_run.write_data(data)
    run = tiny_run.make_run(folder / name, data, folder / "cache", **changes)
    kind = functools.partial(objectives.BradleyTerry, **SETTINGS)
    return dataclasses.replace(run, objective=kind)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a whole run of four steps."""
    folder = tmp_path_factory.mktemp("reward")
    loop.train(job(folder, "whole", train_steps=4))
    return folder


@pytest.fixture(scope="module")
def rows(work):
    return [json.loads(line) for line in (work / "data.jsonl").read_text().splitlines()]


def test_a_checkpoint_says_what_its_scores_are_standardised_by(work):
    ready = loop.setup(job(work, "whole", train_steps=4))
    network = checkpoints.load(work / "whole", "reward")
    feed, objective = ready.inputs.train, ready.objective
    found = []
    for number in range(feed.steps_per_epoch):
        batch = feed.batch(number)
        outputs = objective.outputs({"reward": network.params}, Step(batch))
        found.append(np.asarray(outputs, np.float64)[batch["response_mask"] > 0])
    values = np.concatenate(found)
    told = network.meta["score_stats"]
    assert told["count"] == len(values) > 60
    np.testing.assert_allclose(told["mean"], values.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(told["deviation"], values.std(0), rtol=1e-4)
    assert np.shape(told["mean"]) == (3, 1)


def test_a_run_that_goes_on_says_the_same(work):
    loop.train(job(work, "twice", train_steps=2))
    loop.train(job(work, "twice", train_steps=4))
    whole, twice = (checkpoints.newest_meta(work / n) for n in ("whole", "twice"))
    assert twice["score_stats"] == whole["score_stats"]
    assert twice["params_fingerprint"] == whole["params_fingerprint"]


def test_members_see_other_prompts_and_the_same_ones_always(work):
    ready = loop.setup(job(work, "whole", train_steps=4))
    objective = ready.objective
    seen = {}
    for number in range(2 * ready.inputs.train.steps_per_epoch):
        batch = ready.inputs.train.batch(number)
        prompt = np.broadcast_to(
            np.arange(batch["prompt_mask"].shape[1]), batch["prompt_mask"].shape
        )
        votes = np.asarray(objective.seen(batch, prompt))[..., 0]
        for b, p in np.argwhere(batch["prompt_mask"] > 0):
            told = votes[b, p].tolist()
            assert seen.setdefault(int(batch["prompt_id"][b, p]), told) == told
    shares = np.mean(list(seen.values()), axis=0)
    assert (np.abs(shares - 0.6) < 0.25).all()
    assert len({tuple(v) for v in seen.values()}) > 4


def test_it_judges_by_standard_scores_of_a_shared_prompt(work, rows, monkeypatch):
    path = work / "whole"
    prompts = [row["prompt"] for row in rows[:4] for _ in range(3)]
    responses = [t for r in rows[:4] for t in (r["chosen"], r["rejected"], "other")]
    network = checkpoints.load(path, "reward")

    def outputs(params, batch):
        found = network.model.apply({"params": params}, batch, method="outputs")
        return {"response_all": found[..., 0]}

    raw = scoring.score_texts(
        outputs, network.params, network.vocabulary, prompts, responses
    )["response_all"].astype(np.float64)
    told = network.meta["score_stats"]
    z = (raw - np.ravel(told["mean"])) / np.ravel(told["deviation"])
    begun = []
    encode = scoring.meshes.put_batch
    monkeypatch.setattr(
        scoring.meshes, "put_batch", lambda *a: begun.append(a[1]) or encode(*a)
    )
    for query, expected in (
        ("", z.mean(1) - z.std(1)),
        ("?aggregate=worst", z.min(1)),
        ("?aggregate=penalised&penalty=0.5", z.mean(1) - 0.5 * z.std(1)),
        ("?aggregate=mean&scale=raw", raw.mean(1)),
    ):
        judge = judges.resolve(f"reward:{path}{query}")
        found = judge(prompts, responses)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    # Four prompts are four encoder rows, not twelve.
    assert sum(int(batch["prompt_mask"].sum()) for batch in begun) == 4 * 4
    names = ("", "?scale=raw", "?aggregate=worst", "?penalty=2")
    prints = {judges.resolve(f"reward:{path}{n}").fingerprint for n in names}
    assert len(prints) == 4


def test_several_runs_are_an_ensemble(work, rows):
    loop.train(job(work, "member0", train_steps=1, seed=1))
    loop.train(job(work, "member1", train_steps=1, seed=2))
    prompts, responses = ([row[k] for row in rows[:5]] for k in ("prompt", "chosen"))
    each = [
        judges.resolve(f"reward:{work}/member{i}")(prompts, responses) for i in (0, 1)
    ]
    worst = judges.resolve(f"reward:{work}/member*?aggregate=worst")
    found = worst(prompts, responses)
    np.testing.assert_allclose(found, np.min(each, axis=0), rtol=1e-6)
    with pytest.raises(FileNotFoundError, match="no run directory fits"):
        judges.resolve(f"reward:{work}/nothing*")


@pytest.mark.parametrize(
    ("query", "says"),
    [
        (
            "agregate=worst",
            "expected name=value of aggregate.*did you mean 'aggregate'",
        ),
        ("aggregate=wurst", "must be one of .*did you mean 'worst'"),
        ("penalty=-1", "must be a number, at least 0"),
        ("penalty=x", "must be a number"),
    ],
)
def test_settings_that_cannot_be_are_refused(query, says):
    with pytest.raises(ValueError, match=says):
        judges.resolve(f"reward:runs/rm?{query}")


def test_files_of_pairs_and_of_completions_are_scored(work, rows, caplog):
    judge = f"reward:{work / 'whole'}"
    pairs = work / "pairs.jsonl"
    kept = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in kept))
    output = work / "scored_pairs.jsonl"
    with caplog.at_level("INFO"):
        assert score.score(judge=judge, data=str(pairs), output=str(output)) == 60
    assert "of 60 pairs" in caplog.text
    found = [json.loads(line) for line in output.read_text().splitlines()]
    judged = judges.resolve(judge)
    for side in ("chosen", "rejected"):
        scores = judged([r["prompt"] for r in rows], [r[side] for r in rows])
        told = [row[f"{side}_score"] for row in found]
        np.testing.assert_allclose(told, scores, rtol=1e-4, atol=1e-5)
    assert [{k: r[k] for k in kept[0]} for r in found] == kept
    single = work / "scored.jsonl"
    data = str(work / "data.jsonl")
    assert score.score(judge=judge, data=data, output=str(single)) == 60
    again = [json.loads(line)["score"] for line in single.read_text().splitlines()]
    # Every completion of these rows is the chosen response.
    np.testing.assert_allclose(
        again, [r["chosen_score"] for r in found], rtol=1e-3, atol=1e-4
    )
    before = single.read_bytes()
    assert score.score(judge=judge, data=data, output=str(single)) == 60
    assert single.read_bytes() == before
    with pytest.raises(ValueError, match="made with other settings: judge"):
        score.score(judge=f"{judge}?scale=raw", data=data, output=str(single))
    with pytest.raises(ValueError, match="row 1 has a field 'score' already"):
        score.score(judge=judge, data=str(single), output=str(work / "twice.jsonl"))


def test_it_is_what_the_server_reranks_with(work):
    path = str(work / "whole")
    assert rerank.is_reward_model(path)
    app = rerank.of_checkpoint(path, model=None)
    assert [route.path for route in app.routes][:2] == ["/v1/rerank", "/v1/score"]


def test_heads_that_tell_nothing_apart_are_told(work, monkeypatch, caplog):
    ready = loop.setup(job(work, "whole", train_steps=4))
    one = np.ones((4, 2, 3, 1), np.float32), np.ones((4, 2), np.float32)
    found = standard.Standard(ready)
    found._compiled = lambda state, batch: one
    told = found.of(None)["score_stats"]
    assert np.ravel(told["deviation"]).tolist() == [1.0] * 3
    assert "3 of 3 heads" in caplog.text
