"""Files of prompts to files of responses: resumed runs give the same bytes."""

from __future__ import annotations

import dataclasses
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sacrebleu
import tiny_run

from jaxalign import decoding, locks, models
from jaxalign import vocabularies as vocabs
from jaxalign.decoding import Sampling
from jaxalign.inference import evaluation as inference
from jaxalign.inference import generation, score
from jaxalign.training import checkpoints

SETTINGS = {
    "checkpoint": "sft",
    "num_samples": 3,
    "batch_size": 2,  # windows of 32 prompts
    "max_new_tokens": 5,
    "slots": 2,
    "temperature": 0.8,
}


@pytest.fixture(scope="module")
def policy():
    model = models.T5(tiny_run.CONFIG)
    params = models.init_params(model, jax.random.key(0))
    vocabulary = vocabs.ByteVocabulary(extra_ids=125)
    return checkpoints.Network(
        model,
        params,
        vocabulary,
        {"networks": {"policy": {"fingerprint": "abc"}}},
        None,
    )


@pytest.fixture
def run(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "load", lambda path, *_: policy)
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"say {'long ' * (i % 7)}{i}", "id": i} for i in range(40)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"prompt": f"say {i}", "id": i} for i in range(40)]
    short = tmp_path / "short.jsonl"  # of one padded length: one compilation
    short.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def generate(name, **changes):
        output = tmp_path / name
        of = short if changes.pop("short", False) else prompts
        arguments = SETTINGS | {"prompts": str(of), "output": str(output)}
        return generation.generate(**(arguments | changes)), output

    return generate


def _interrupt(monkeypatch, after: int) -> None:
    """Ctrl-C when so many prompts have been written."""
    original, calls = generation._lines, []

    def lines(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(generation, "_lines", lines)


def test_a_resumed_run_gives_the_bytes_of_an_unbroken_one(run, monkeypatch):
    count, output = run("whole.jsonl")
    whole = output.read_bytes()
    assert count == 120 == whole.count(b"\n")
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [(row["id"], row["sample"]) for row in rows] == [
        (i, n) for i in range(40) for n in range(3)
    ]
    with monkeypatch.context() as patch:
        _interrupt(patch, after=37)
        with pytest.raises(KeyboardInterrupt):
            run("broken.jsonl")
    broken = output.with_name("broken.jsonl")
    partial = output.with_name("broken.jsonl.partial")
    left = partial.read_bytes()
    assert whole.startswith(left) and left.count(b"\n") == 111
    assert not broken.exists()
    about = output.with_name("broken.jsonl.partial.json").read_bytes()
    # As it was left; torn inside a line, and inside a prompt; before the first line.
    for size in (len(left), len(left) - 7, len(whole) // 3, 5):
        partial.write_bytes(left[:size])
        partial.with_name(partial.name + ".json").write_bytes(about)
        broken.unlink(missing_ok=True)
        assert run("broken.jsonl")[0] == 120
        assert broken.read_bytes() == whole
        assert not partial.exists()
        assert not partial.with_name(partial.name + ".json").exists()


def test_other_settings_do_not_go_on(run, monkeypatch):
    with monkeypatch.context() as patch:
        _interrupt(patch, after=2)
        with pytest.raises(KeyboardInterrupt):
            run("broken.jsonl")
    with pytest.raises(ValueError, match=r"other settings: seed=0 \(now seed=1\)"):
        run("broken.jsonl", seed=1)


def test_a_finished_output_is_kept_and_only_for_the_same_settings(
    run, policy, monkeypatch, tmp_path
):
    monkeypatch.setattr(checkpoints, "read_meta", lambda path: policy.meta)
    count, output = run("done.jsonl", short=True, max_new_tokens=2, num_samples=1)
    before = output.read_bytes()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert "done.jsonl.settings.json" in names

    def again(name="done.jsonl", **changes):
        same = {"short": True, "max_new_tokens": 2, "num_samples": 1}
        return run(name, **(same | changes))[0]

    with monkeypatch.context() as patch:
        patch.setattr(generation, "load", None)  # nothing is loaded to say so
        # What changes no text is no other setting.
        assert again() == count == again(batch_size=4, slots=1)
        with pytest.raises(ValueError, match=r"seed=0 \(now seed=1\)"):
            again(seed=1)
        with pytest.raises(ValueError, match="checkpoint='abc' .now checkpoint='abd'"):
            patch.setitem(policy.meta["networks"]["policy"], "fingerprint", "abd")
            again()
    with pytest.raises(ValueError, match="prompts="):
        again(short=False)
    # Settings speak for the bytes that they were written for, and for no others.
    output.write_bytes(before + b"{}\n")
    with pytest.raises(ValueError, match="it was changed since"):
        again()
    output.rename(tmp_path / "moved.jsonl")
    with pytest.raises(ValueError, match="there is no moved.jsonl.settings.json"):
        again("moved.jsonl")
    assert again() == count and output.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, "moved.jsonl"])


def test_an_unfinished_output_is_never_written_through_a_link(run, tmp_path):
    (tmp_path / "victim").write_text("precious")
    partial = tmp_path / "linked.jsonl.partial"
    partial.symlink_to("victim")
    with pytest.raises(ValueError, match=r"linked.jsonl.partial is a symbolic link"):
        run("linked.jsonl", short=True)
    with pytest.raises(ValueError, match="is a symbolic link"):
        inference.write_jsonl(tmp_path / "linked.jsonl", [{}])
    assert (tmp_path / "victim").read_text() == "precious"
    partial.unlink()
    partial.mkdir()
    with pytest.raises(ValueError, match="is not a file"):
        inference.write_jsonl(tmp_path / "linked.jsonl", [{}])
    assert not (tmp_path / "linked.jsonl").exists()


def test_of_two_writers_the_second_is_refused(run, tmp_path):
    with locks.hold(tmp_path / "one.jsonl", "output", is_file=True):
        with pytest.raises(locks.HeldError, match="one.jsonl is in use by process"):
            run("one.jsonl", short=True)
    assert not list(tmp_path.glob("*one.jsonl*"))


def test_a_mesh_and_other_batches_change_no_text(run, policy, monkeypatch):
    _, output = run("whole.jsonl")
    calls = []

    def load(path, network="policy", mesh=None):
        calls.append(mesh)
        params = policy.params
        if mesh is not None:
            like = checkpoints.on_mesh(policy.model, mesh)
            params = jax.device_put(params, jax.tree.map(lambda s: s.sharding, like))
        return checkpoints.Network(
            policy.model, params, policy.vocabulary, policy.meta, None
        )

    monkeypatch.setattr(checkpoints, "load", load)
    _, other = run("mesh.jsonl", mesh={"data": 4, "fsdp": 2}, batch_size=16, slots=None)
    assert calls[-1] is not None
    texts = [
        [json.loads(line)["response"] for line in path.read_text().splitlines()]
        for path in (output, other)
    ]
    assert texts[0] == texts[1]


def test_log_probabilities_equal_scoring(run, policy):
    # Letters only, so that texts survive decoding and encoding.
    letters = {b + 3 for b in b"abcdefghijklmnopqrstuvwxyz "}
    vocabulary = policy.vocabulary
    bad = [
        [i]
        for i in range(vocabulary.vocab_size)
        if i not in letters and i != vocabulary.eos_id
    ]
    prompts = [f"say {i}" for i in range(12)]
    found = list(
        generation.sample(
            policy,
            prompts,
            num_samples=2,
            sampling=Sampling(bad_words=bad, length_penalty=(1, 3.0)),
            max_new_tokens=12,
        )
    )
    rows = [
        (prompt, text, logp)
        for prompt, generated in zip(prompts, found, strict=True)
        for text, tokens, logp in zip(
            generated.texts, generated.tokens, generated.logp, strict=True
        )
        if tokens[-1] == vocabulary.eos_id and text == text.strip()
    ]
    assert len(rows) > 5
    logps, _ = score.score_pairs(policy, [row[:2] for row in rows])
    assert [row[2] for row in rows] == pytest.approx(logps.tolist(), abs=1e-4)


def test_constraints_hold_in_every_response(run):
    _, output = run(
        "digits.jsonl", short=True, regex="(yes|no), [0-9]{1,3}!", max_new_tokens=10
    )
    texts = [json.loads(line)["response"] for line in output.read_text().splitlines()]
    assert all(re.fullmatch(r"(yes|no), [0-9]{1,3}!", text) for text in texts)
    assert len(set(texts)) > 5
    _, output = run("phrases.jsonl", short=True, include=["ab", "c"], max_new_tokens=8)
    texts = [json.loads(line)["response"] for line in output.read_text().splitlines()]
    assert all("ab" in text and "c" in text for text in texts)


def test_a_constraint_that_no_response_can_meet_is_refused(run):
    with pytest.raises(ValueError, match="meets the constraint"):
        run("never.jsonl", regex="[0-9]{3}", include=["a"])


def test_beams_equal_beam_search_on_arrays(run, policy):
    _, output = run(
        "beams.jsonl",
        short=True,
        num_beams=3,
        num_samples=2,
        temperature=1.0,
        slots=None,
    )
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    ids = [*policy.vocabulary.encode(lines[20]["prompt"]), 1]
    search = decoding.BeamSearch(3)
    found = decoding.beam_search(
        policy.model,
        policy.params,
        np.array([ids]),
        max_new_tokens=5,
        search=search,
        num_return=2,
    )
    for n in range(2):
        length = int(found.lengths[0, n])
        tokens = found.tokens[0, n, :length].tolist()
        assert lines[20 + n]["response"] == policy.vocabulary.decode(tokens)
        assert lines[20 + n]["num_tokens"] == length
        score = float(found.scores[0, n])
        assert lines[20 + n]["score"] == pytest.approx(score, rel=1e-4)
        assert lines[20 + n]["logp"] == pytest.approx(score * length, rel=1e-4)
    # Scoring the same text gives the same log-probability.
    pair = (lines[20]["prompt"], lines[20]["response"])
    if found.tokens[0, 0, int(found.lengths[0, 0]) - 1] == 1:
        logps, _ = score.score_pairs(policy, [pair])
        assert logps[0] == pytest.approx(lines[20]["logp"], abs=1e-3)


def test_an_interrupted_search_gives_the_bytes_of_an_unbroken_one(run, monkeypatch):
    settings = {"num_beams": 2, "num_samples": 2, "temperature": 1.0, "slots": None}
    settings["short"] = True
    _, output = run("whole.jsonl", **settings)
    with monkeypatch.context() as patch:
        _interrupt(patch, after=13)
        with pytest.raises(KeyboardInterrupt):
            run("broken.jsonl", **settings)
    _, resumed = run("broken.jsonl", **settings)
    assert resumed.read_bytes() == output.read_bytes()


def test_minimum_bayes_risk_keeps_one_sample_of_each_pool(run):
    _, pools = run("pools.jsonl", short=True, num_samples=4)
    count, output = run("chosen.jsonl", short=True, num_samples=4, mbr="chrf")
    samples = [json.loads(line) for line in pools.read_text().splitlines()]
    chosen = [json.loads(line) for line in output.read_text().splitlines()]
    assert count == len(chosen) == 40
    for i, line in enumerate(chosen):
        pool = [s["response"] for s in samples[4 * i : 4 * i + 4]]
        best = decoding.minimum_bayes_risk(
            pool, lambda h, r: sacrebleu.sentence_chrf(h, [r]).score
        )
        assert line["response"] == pool[best] and line["utility"] >= 0


def test_contrastive_search_writes_one_response(run):
    settings = {"num_samples": 1, "temperature": 1.0, "slots": None, "top_k": 3}
    count, output = run(
        "contrastive.jsonl", short=True, contrastive_alpha=0.6, **settings
    )
    assert count == 40 == output.read_text().count("\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 2, "contrastive_alpha": 0.5}, "two searches"),
        ({"num_beams": 2, "temperature": 0.7}, "Beam search has no temperature"),
        ({"num_samples": 1, "mbr": "chrf"}, "at least 2"),
        ({"mbr": "chrff"}, "did you mean 'chrf'"),
        ({"num_groups": 2}, "need num_beams"),
    ],
)
def test_settings_that_would_not_count_are_refused(run, changes, message):
    changes = {"slots": None, "temperature": 1.0, **changes}
    with pytest.raises(ValueError, match=message):
        run("refused.jsonl", **changes)


def test_logits_that_are_not_finite_are_refused_before_a_line_is_written(
    policy,
):
    broken = types.SimpleNamespace(texts=[""], logp=[float("nan")], tokens=[[1]])
    with pytest.raises(ValueError, match="logits are not finite"):
        list(generation._lines({}, broken))
    params = jax.tree.map(lambda x: x * jnp.nan, policy.params)
    damaged = dataclasses.replace(policy, params=params)
    with pytest.raises(ValueError, match="response_logps of response 0 is nan"):
        score.score_pairs(damaged, [("a", "b")], batch_size=2)
