"""West-of-N: each stage's rule, a study killed or not, what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_run

from jaxalign import cli, judges
from jaxalign.inference import evaluation, generation
from jaxalign.pipelines import held_out, pools, west_of_n
from jaxalign.pipelines import study as studies
from jaxalign.training.train import train

TINY = [f"models.T5Config.{k} = {v}" for k, v in (
    ("emb_dim", 16), ("num_heads", 2), ("head_dim", 8), ("mlp_dim", 32),
    ("num_encoder_layers", 1), ("num_decoder_layers", 1))]  # fmt: skip
TINY += [
    "TASK_FEATURE_LENGTHS = {'inputs': 48, 'targets': 56}",
    "BATCH_SIZE = 8",
    "TRAIN_STEPS = 2",
    "EVAL_FRACTION = 0.0",
    "run.Run.sampler = None",
]


def length(prompt, response):
    return None if response == "?" else float(len(response.strip()))


def longer(prompt, a, b):
    if "?" in (a, b):
        return None
    return 0.5 + 0.4 * float(np.sign(len(a) - len(b)))


def judge(name):
    return judges.resolve(f"{__file__}:{name}")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def pool(prompt, *responses):
    return {"prompt": prompt, "responses": list(responses), "n": 5}


# ---- Stages -------------------------------------------------------------------------


def test_a_pool_has_its_distinct_responses_and_how_many_were_drawn(tmp_path):
    drawn = [("p", ["a", "b", "a ", ""]), ("p", ["c", "c", "c", "c"])]
    samples = write(
        tmp_path / "samples.jsonl",
        [
            {"prompt": p, "response": r, "sample": i, "prompt_source": "web", "x": 1}
            for p, texts in drawn
            for i, r in enumerate(texts)
        ],
    )
    own = {"prompt": "p", "prompt_source": "web", "n": 4}
    assert pools.pools(samples) == [
        {**own, "responses": ["a", "b"]},
        {**own, "responses": ["c"]},
    ]


@pytest.mark.parametrize("name", ["length", "longer"])
def test_best_and_worst_of_a_pool_and_what_gives_no_pair(name):
    found = pools.selected(
        [
            pool("p", "aa", "b", "cccc", "ddd"),
            pool("q", "a"),
            pool("r", "aa", "bb", "cc"),
            pool("s"),
        ],
        judge(name),
    )
    assert (found[0]["best"], found[0]["worst"]) == (2, 1)
    sure = 1 / (1 + np.exp(-3.0)) if name == "length" else 0.9
    assert found[0]["p_conf"] == pytest.approx(sure)
    assert [f.get("dropped") for f in found] == [None, pools.ONE, pools.TIE, pools.ONE]
    assert ("scores" in found[0]) == (name == "length")


@pytest.mark.parametrize("name", ["length", "longer"])
def test_a_response_without_a_verdict_is_refused_by_its_prompt(name):
    with pytest.raises(ValueError, match="no verdict on .*'what is it'.*learnt from"):
        pools.selected([pool("what is it", "aa", "?", "b")], judge(name))


def rows(sources=None):
    sources = sources or [None] * 8
    return [
        {
            "prompt": f"p{i}",
            "chosen": "a",
            "rejected": "b",
            "p_conf": 0.55 + 0.05 * i,
            "logp_chosen": -float(i),
            "logp_rejected": -2.0,
            "n": 4,
            **({"prompt_source": s} if s else {}),
        }
        for i, s in enumerate(sources)
    ]


def test_filters_keep_what_is_sure_and_usual_and_say_why_not():
    kept, left = pools.filtered(rows(), 0.0, 0.0)
    assert len(kept) == 8 and not left and {k["source"] for k in kept} == {"west_of_n"}
    kept, left = pools.filtered(rows(), 0.5, 0.0)
    assert [k["prompt"] for k in kept] == ["p4", "p5", "p6", "p7"]
    assert {row["dropped"] for row in left} == {pools.UNSURE}
    kept, left = pools.filtered(rows(), 0.0, 0.5)
    assert [k["prompt"] for k in kept] == ["p0", "p1", "p2", "p3"]
    assert {row["dropped"] for row in left} == {pools.UNLIKELY}
    assert pools.filtered([], 0.5, 0.5) == ([], [])


def test_filters_leave_the_shares_of_sources():
    # The confident half is all of b's and none but one of a's.
    found = rows(["a", "a", "a", "a", "b", "a", "b", "b"])
    kept, left = pools.filtered(found, 0.5, 0.0)
    shares = [k["prompt_source"] for k in kept]
    # Of a 1 of 5 passed: of b's three one fifth is 1, the surest.
    assert shares == ["a", "b"] and kept[1]["prompt"] == "p7"
    assert sum(row["dropped"] == pools.UNEVEN for row in left) == 2


def test_held_out_prompts_are_neither_learnt_from_nor_sampled_for(tmp_path):
    def human(prompt):
        return {"prompt": prompt, "chosen": "yes", "rejected": "no", "from": "web"}

    data = write(tmp_path / "data.jsonl", [human("One?"), human("Two?"), human("One?")])
    test = write(tmp_path / "t.jsonl", [human("two? "), human("Three?")])
    places = [tmp_path / name for name in ("human.jsonl", "test.jsonl", "asked.jsonl")]
    for path, held in zip(places, (False, True), strict=False):
        held_out.write_pairs(path, data, test, held, None, "error")
    assert [r["prompt"] for r in lines(places[0])] == ["One?", "One?"]
    assert [r["prompt"] for r in lines(places[1])] == ["two? ", "Three?"]
    held_out.write_prompts(places[2], None, *places[:2], "from", None)
    assert lines(places[2]) == [{"prompt": "One?", "prompt_source": "web"}]
    more = write(tmp_path / "p.jsonl", [{"prompt": p} for p in ("TWO?", "new", "new ")])
    held_out.write_prompts(places[2], more, *places[:2], None, None)
    assert lines(places[2]) == [{"prompt": "new"}]
    with pytest.raises(ValueError, match="No prompt has the field 'site'"):
        held_out.write_prompts(places[2], more, *places[:2], "site", None)
    none = write(tmp_path / "none.jsonl", [{"prompt": "Two?"}])
    with pytest.raises(ValueError, match="All 1 prompts .* held out"):
        held_out.write_prompts(places[2], none, *places[:2], None, None)
    with pytest.raises(ValueError, match="No pair .* is to learn from"):
        held_out.write_pairs(places[0], test, test, False, None, "error")


def test_without_a_test_file_a_tenth_of_the_prompts_is_held_out(tmp_path):
    data = tiny_run.write_data(tmp_path / "data.jsonl", 200)
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, held in zip(paths, (False, True), strict=True):
        held_out.write_pairs(path, data, None, held, None, "error")
    learnt, kept = ({r["prompt"] for r in lines(path)} for path in paths)
    assert not learnt & kept and len(learnt | kept) == 200 and 8 < len(kept) < 35


# ---- The study ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("west")
    data = tiny_run.write_data(folder / "data.jsonl", 24)
    train(tiny_run.make_run(folder / "sft", data, folder, "SFT", train_steps=2))
    return folder


def west(folder, name, **changes):
    settings = {"num_samples": 3, "max_new_tokens": 6, "batch_size": 8, **changes}
    return west_of_n.run(
        data=str(folder / "data.jsonl"),
        policy=str(folder / "sft"),
        run_dir=str(folder / name),
        bindings=TINY,
        **settings,
    )


@pytest.fixture(scope="module")
def whole(folder):
    return west(folder, "whole")


FILES = ("human", "test", "prompts", "base.gaps", "round1/samples",
         "round1/selected", "round1/likely", "round1/pairs", "round1/data",
         "round1/model.gaps")  # fmt: skip


def test_a_round_is_what_the_paper_does(folder, whole):
    home = folder / "whole"
    chosen = lines(home / "round1/selected.jsonl")
    asked = [r["prompt"] for r in lines(home / "prompts.jsonl")]
    assert [c["prompt"] for c in chosen] == asked
    for row in chosen:
        if "dropped" not in row:
            assert row["best"] == int(np.argmax(row["scores"]))
            assert row["worst"] == int(np.argmin(row["scores"]))
    kept = lines(home / "round1/pairs.jsonl")
    told = {"prompt", "chosen", "rejected", "p_conf", "logp_chosen", "logp_rejected"}
    assert kept and {*kept[0]} == told | {"n", "source"}
    assert all(k["p_conf"] > 0.5 and k["n"] == 3 for k in kept)
    # Log-probabilities are of the texts, not of the tempered samples.
    logp = judge_of(folder)([k["prompt"] for k in kept], [k["chosen"] for k in kept])
    assert [k["logp_chosen"] for k in kept] == pytest.approx(logp.tolist(), rel=1e-5)
    mixed = lines(home / "round1/data.jsonl")
    sources = [row["source"] for row in mixed]
    assert sources.count("human") == sources.count("west_of_n") == len(mixed) / 2
    unseen = {r["prompt"] for r in lines(home / "test.jsonl")}
    assert unseen and not unseen & ({r["prompt"] for r in mixed} | {*asked})
    table = lines(home / "rounds.jsonl")
    assert [row["round"] for row in table] == [0, 1]
    assert table[1]["became"]["pairs"] == len(kept)
    assert table[1]["became"]["pools"] == len(asked)
    assert "base: " in whole and "round 1: " in whole and "held-out pairs" in whole
    text = (home / "study.html").read_text()
    assert "How sure the labels are" in text and text.count("<article>") > 1


def judge_of(folder):
    return judges.resolve(f"likelihood:{folder / 'sft'}")


def test_a_run_is_evaluated_by_its_path(folder, whole, monkeypatch):
    monkeypatch.chdir(folder)
    found = evaluation.evaluate(checkpoint="whole/base", data="data.jsonl")
    (told,) = found["models"].values()
    scores = judges.resolve("reward:whole/base?scale=raw")
    rows = lines(folder / "data.jsonl")
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (
        scores(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected")
    )
    assert told["accuracy"]["mean"] == pytest.approx(np.mean(chosen > rejected))
    loss = np.log1p(np.exp(rejected.astype(float) - chosen))
    assert told["log_loss"]["mean"] == pytest.approx(loss.mean(), rel=1e-5)


def test_a_killed_study_ends_with_the_same_bytes(folder, whole, monkeypatch):
    moments = [
        (generation, "_lines", 9),
        (pools, "filtered", 1),
        (studies.Study, "train", 2),
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
            west(folder, "killed")
        if owner is generation:  # of a pool no more than the batch in hand is lost
            left = folder / "killed/round1/samples.jsonl.partial"
            assert len(lines(left)) == 8 * 3
    west(folder, "killed")
    for name in FILES:
        a, b = (
            (folder / n / f"{name}.jsonl").read_bytes() for n in ("whole", "killed")
        )
        assert a == b, name
    with pytest.raises(ValueError, match="was made with other inputs: confidence"):
        west(folder, "killed", confidence_quantile=0.5)


@pytest.mark.slow
def test_rounds_label_with_the_model_of_the_round_before(folder, whole):
    base = f"reward:{folder / 'whole/base'}?scale=raw"
    west(folder, "two", rounds=2, base=base)
    stages = json.loads((folder / "two/manifest.json").read_text())["stages"]
    first, second = (stages[f"round{n}/selected.jsonl"]["key"] for n in (1, 2))
    of = "judge: function's fingerprint"
    assert first[of] == judges.resolve(base).fingerprint
    model = judges.resolve(f"reward:{folder / 'two/round1/model'}?scale=raw")
    assert second[of] == model.fingerprint != first[of]
    a, b = (folder / "two" / f"round{n}/samples.jsonl" for n in (1, 2))
    assert a.read_bytes() != b.read_bytes()
    assert a.read_bytes() == (folder / "whole/round1/samples.jsonl").read_bytes()


def test_a_judge_that_tells_nothing_apart_ends_the_round(folder):
    base = folder / "flat.py"
    base.write_text("def flat(prompt, response):\n    return 1.0\n")
    with pytest.raises(ValueError, match=r"no pool gave a pair .*tie: \d+.*pairs: 0"):
        west(folder, "flat", base=f"{base}:flat")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_samples": 1}, "--num_samples must be at least 2"),
        ({"rounds": 0}, "--rounds 1"),
        ({"confidence_quantile": 1.0}, "--confidence_quantile must lie"),
        ({"gin_files": ("runs/dpo.gin",)}, "DPO trains no rewards"),
        ({"gin_files": ("runs/eval.gin",)}, "No run in runs/eval.gin"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(folder, changes, said):
    with pytest.raises(ValueError, match=said):
        west(folder, "refused", **changes)
    assert not (folder / "refused").exists()


def test_the_command_has_its_flags(capsys):
    assert cli.main(["west_of_n", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--confidence_quantile" in said and "of a pool, N" in said
