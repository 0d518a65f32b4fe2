"""The data doctor: what it writes, killed or not; graded data; what it refuses."""

from __future__ import annotations

import json
import re

import pytest

from jaxalign import world
from jaxalign.data.bad_rows import DataError, FieldError
from jaxalign.pipelines import pairs, preference_strength, strengths
from jaxalign.pipelines import study as studies

TINY = [f"models.T5Config.{k} = {v}" for k, v in (
    ("emb_dim", 16), ("num_heads", 2), ("head_dim", 8), ("mlp_dim", 32),
    ("num_encoder_layers", 1), ("num_decoder_layers", 1))]  # fmt: skip
TINY += [
    "TASK_FEATURE_LENGTHS = {'inputs': 48, 'targets': 56}",
    "BATCH_SIZE = 8",
    "run.Run.sampler = None",
]
SETTINGS = {"members": 3, "folds": 2, "shared_trunk": True, "steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    rows = world.rows("preference", "train", 24, 0)
    with open(folder / "data.jsonl", "w") as file:
        for i, row in enumerate(rows):
            wrong = i % 5 == 0
            if wrong:
                row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
            more = {"id": i, "margin": 0.5, "planted": wrong}
            file.write(json.dumps({**row, **more}) + "\n")
    return folder


def doctor(folder, name, **changes):
    return preference_strength.run(
        data=str(folder / "data.jsonl"),
        run_dir=str(folder / name),
        bindings=TINY,
        **{**SETTINGS, **changes},
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(folder):
    return doctor(folder, "whole", truth="planted")


def test_a_row_keeps_its_fields_and_gains_its_strength(folder, whole):
    rows = lines(folder / "data.jsonl")
    found = lines(folder / "whole" / "strengths.jsonl")
    told = {"strength_mean", "strength_std", "band", "action"}
    assert all(set(f) - set(r) == told for f, r in zip(found, rows, strict=True))
    assert [{k: f[k] for k in r} for f, r in zip(found, rows, strict=True)] == rows
    assert len({f["strength_mean"] for f in found}) > 12
    # Each pair was scored by the models of the other fold, by all three heads.
    for part in (0, 1):
        scored = lines(folder / "whole" / f"scores/fold{part}.0.jsonl")
        mine = [i for i, r in enumerate(rows) if pairs.fold(r["prompt"], 2) == part]
        assert [s["pair"] for s in scored] == mine
        assert {len(s["differences"]) for s in scored} == {3}
        seen = {
            r["prompt"] for r in lines(folder / "whole" / f"folds/fold{part}.jsonl")
        }
        assert not seen & {rows[i]["prompt"] for i in mine} and seen
    assert "AUROC of low strength for labels known to be wrong: 0." in whole


def test_the_cleaned_file_has_the_action_taken_and_the_reason(folder, whole):
    rows = lines(folder / "data.jsonl")
    graded = lines(folder / "whole" / "strengths.jsonl")
    for row, before, grade in zip(
        lines(folder / "whole" / "cleaned.jsonl"), rows, graded, strict=True
    ):
        sides = ("chosen", "rejected")
        if row["flipped"]:
            assert (
                grade["strength_mean"] < 0 and row["original_chosen"] == row["rejected"]
            )
            assert row["margin"] == pytest.approx(-grade["strength_mean"])
            sides = sides[::-1]
        else:
            assert row["margin"] == pytest.approx(grade["strength_mean"])
        assert (row["chosen"], row["rejected"]) == tuple(before[s] for s in sides)
        assert row["original_margin"] == before["margin"] and row["id"] == before["id"]
        assert row["reason"].startswith("strength ") and grade["band"] in row["reason"]
        assert row["action"] == grade["action"]
    assert sum(r["flipped"] for r in lines(folder / "whole" / "cleaned.jsonl")) == 2


def test_the_page_shows_what_was_found(folder, whole):
    text = (folder / "whole" / "study.html").read_text()
    for said in (
        "models that had not seen it",
        "known to be wrong",
        "The most suspicious pairs",
        "Mean strength along the file",
        "The longer response was chosen",
    ):
        assert said in text
    assert text.count("<article>") == 20 and "<svg" in text


def test_a_killed_study_ends_with_the_same_bytes(folder, whole, monkeypatch):
    moments = [
        (studies.Study, "train", 2),
        (strengths, "differences", 1),
        (preference_strength.page, "body", 1),
    ]
    for owner, name, at in moments:
        calls, real = [], getattr(owner, name)

        def killed(*args, calls=calls, real=real, at=at, **kwargs):
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, killed)
            doctor(folder, "killed", truth="planted")
    doctor(folder, "killed", truth="planted")
    for name in ("pairs.jsonl", "strengths.jsonl", "cleaned.jsonl"):
        a, b = ((folder / n / name).read_bytes() for n in ("whole", "killed"))
        assert a == b
    with pytest.raises(ValueError, match="was made with other inputs: mode"):
        doctor(folder, "killed", mode="bands")


GRADED = {
    "chosen": ["Human: Hi", "Assistant: Hello.", "Human: Bye", "Assistant: Bye!"],
    "rejected": ["Human: Hi", "Assistant: Hello.", "Human: Bye", "Assistant: No."],
    "chosen score list": [1.0, 2.0],
    "rejected score list": [0.0, 3.0],
    "mean preference difference": 0.0,
    "std preference difference": 1.0,
    "GPT4 label": 0,
}


def graded(i):
    row = {**GRADED, "chosen": [*GRADED["chosen"][:-1], f"Assistant: {i}"]}
    return {**row, "chosen score list": [float(i), i * 0.5], "GPT4 label": i % 3 - 1}


def test_graded_data_of_the_paper_needs_no_training(tmp_path, monkeypatch):
    monkeypatch.setattr(studies.Study, "train", None)
    data = tmp_path / "graded.jsonl"
    data.write_text("".join(json.dumps(graded(i)) + "\n" for i in range(20)))
    said = preference_strength.run(
        data=str(data), run_dir=str(tmp_path / "run"), mode="soft_margin"
    )
    found = lines(tmp_path / "run" / "strengths.jsonl")
    assert found[4]["strength_mean"] == pytest.approx(((4 - 0) + (2 - 3)) / 2)
    assert found[4]["strength_std"] == pytest.approx(2.5)
    assert found[0]["action"] == "margin+smooth" and found[19]["band"] == "strong"
    assert found[4]["chosen score list"] == [4.0, 2.0]
    row = lines(tmp_path / "run" / "cleaned.jsonl")[4]
    assert row["prompt"] == "Human: Hi\n\nAssistant: Hello.\n\nHuman: Bye"
    assert (
        row["chosen"] == "Assistant: 4" and row["original_chosen"][-1] == row["chosen"]
    )
    assert "AUROC" in said
    assert "The scores came with the data" in (tmp_path / "run/study.html").read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"chosen score list": [1.0]}, "rejected score list.*as many as.*1"),
        ({"chosen score list": ["a", 1]}, "a list of numbers"),
        ({"chosen score list": [float("nan"), 1]}, "finite numbers"),
        ({"rejected": ["Assistant: No."]}, "a prompt's turns"),
        ({"rejected": ["Else", "Assistant: No."]}, "the turns of chosen"),
        ({"chosen": 3}, "a list of turns"),
    ],
)
def test_a_bad_graded_row_is_named(tmp_path, change, says):
    with pytest.raises(FieldError) as error:
        pairs.graded_pair({**GRADED, **change})
    assert re.search(says, str(error.value.at("f", 1)))
    data = tmp_path / "graded.jsonl"
    data.write_text(json.dumps(GRADED) + "\n" + json.dumps({**GRADED, **change}) + "\n")
    with pytest.raises(DataError, match="graded.jsonl"):
        pairs.read(data, None, "error")
    assert len(pairs.read(data, None, "skip")) == 1


def test_what_cannot_be_is_refused_before_any_training(folder, monkeypatch):
    monkeypatch.setattr(studies.Study, "train", None)
    for changes, says in (
        ({"folds": 1}, "--folds 0 or at least 2"),
        ({"members": 0}, "--members must be at least 1"),
        ({"flip_share": 2.0}, "flip_share must lie in"),
        (
            {"gin_files": ["runs/dpo.gin"]},
            "DPO trains no scores.*runs/reward_model.gin",
        ),
        ({"bindings": [*TINY, "READ = 'pair_mean'", "CENTRE = 0.0"]}, "compares two"),
    ):
        with pytest.raises(ValueError, match=says):
            preference_strength.run(
                data=str(folder / "data.jsonl"),
                run_dir=str(folder / "refused"),
                **{"bindings": TINY, **SETTINGS, "shared_trunk": False, **changes},
            )
    one = folder / "one.jsonl"
    one.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n' * 3)
    with pytest.raises(ValueError, match="All 3 pairs fall into 1 of 2 folds"):
        preference_strength.run(
            data=str(one), run_dir=str(folder / "one"), bindings=TINY, **SETTINGS
        )
