"""Rounds of sampling, judging and training: what each is made of, and resumption."""

from __future__ import annotations

import json

import pytest
import tiny_run

from jaxalign import cli, judges
from jaxalign.pipelines import verdicts
from jaxalign.pipelines.study import Study
from jaxalign.training import run_directory
from jaxalign.training.train import train

GROUPS = [("p", ["aa", "b", "cccc"]), ("q", ["x", "y"]), ("r", [])]


def judged_rows(judge, schema):
    asked = judges.resolve(f"{__file__}:{judge}")
    return verdicts.training_rows(verdicts.verdicts(GROUPS, asked), schema)


def length(prompt, response):
    return len(response)


def longer(prompt, a, b):
    return 0.5 + 0.5 * ((len(a) > len(b)) - (len(a) < len(b)))


@pytest.mark.parametrize(
    ("judge", "margin"), [("length", 3.0), ("longer", 1.0)], ids=["score", "preference"]
)
def test_pairs_are_the_best_against_the_worst(judge, margin):
    rows, _, tied = judged_rows(judge, "preference")
    pair = {"prompt": "p", "chosen": "cccc", "rejected": "b", "margin": margin}
    assert rows == [pair] and tied == 2


def test_trajectories_keep_every_response_and_its_score():
    rows, mean, tied = judged_rows("length", "trajectory")
    assert [r["reward"] for r in rows] == [2, 1, 4, 1, 1]
    assert mean == pytest.approx(9 / 5) and tied == 1


def test_the_best_response_is_what_supervised_training_gets():
    rows, _, _ = judged_rows("length", "supervised")
    assert rows == [{"prompt": "p", "completion": "cccc"}]


def test_a_response_without_a_verdict_is_left_out():
    found = [{"prompt": "p", "responses": ["a", "b", "c"], "scores": [1.0, None, 0.0]}]
    rows, mean, tied = verdicts.training_rows(found, "trajectory")
    assert [r["completion"] for r in rows] == ["a", "c"] and (mean, tied) == (0.5, 0)


def test_rationales_cannot_be_made_of_scores():
    with pytest.raises(ValueError, match="schema 'rationale'"):
        judged_rows("length", "rationale")


def test_a_file_that_describes_no_run_is_told_in_one_line(tmp_path, capsys):
    own = tmp_path / "own.gin"
    own.write_text("TRAIN_STEPS = 5\n")
    paths = ("initial", "prompts", "run_dir")
    asked = [f"--{name}={tmp_path / name}" for name in paths]
    argv = ["iterate", f"--gin_file={own}", "--judge=math:sqrt", *asked]
    assert cli.main(argv) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("ConfigError: No run to repeat in ") and "runs/dpo" in said
    assert not (tmp_path / "run_dir").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With an initial policy, prompts and a judge."""
    folder = tmp_path_factory.mktemp("rounds")
    data = tiny_run.write_data(folder / "data.jsonl", 12)
    train(tiny_run.make_run(folder / "sft", data, folder, "SFT", train_steps=2))
    # A judge that never says the same twice, and writes down that it was asked.
    calls = str(folder / "calls")
    (folder / "judge.py").write_text(
        "import random\n\n\n"
        "def length(prompt, response):\n"
        f"    with open({calls!r}, 'a') as file:\n"
        "        file.write('x')\n"
        "    return len(response) + random.random()\n"
    )
    return folder


def command(folder, run_dir, *more):
    config = tiny_run.CONFIG
    settings = {
        f"models.T5Config.{name}": getattr(config, name)
        for name in (
            "vocab_size",
            "emb_dim",
            "num_heads",
            "head_dim",
            "mlp_dim",
            "num_encoder_layers",
            "num_decoder_layers",
        )
    }
    settings |= {
        "TRAIN_STEPS": 2,
        "BATCH_SIZE": 8,
        "TASK_FEATURE_LENGTHS": {"inputs": 12, "targets": 12},
        "CACHE_DIR": str(folder / "cache"),
        "sampling.Sampler.max_new_tokens": 4,
    }
    return [
        "iterate",
        *(f"--gin.{name}={value!r}" for name, value in settings.items()),
        f"--initial={folder / 'sft'}",
        f"--prompts={folder / 'data.jsonl'}",
        f"--judge={folder / 'judge.py'}:length",
        f"--run_dir={folder / run_dir}",
        "--rounds=2",
        "--prompts_per_round=8",
        "--max_new_tokens=6",
        *more,
    ]


@pytest.mark.parametrize(
    "reference", ["refreshed", pytest.param("fixed", marks=pytest.mark.slow)]
)
def test_rounds_chain_and_hold_on_to_the_reference_asked_for(folder, reference, capsys):
    argv = command(folder, reference, f"--reference={reference}")
    assert cli.main(argv) == 0
    assert "round 2: samples score" in capsys.readouterr().out
    home = folder / reference
    initial = run_directory.read_manifest(folder / "sft")["networks"]["policy"]
    first, second = (
        run_directory.read_manifest(home / f"round{n}" / "train") for n in (1, 2)
    )
    assert first["parents"] == {"initial": initial, "reference": initial}
    start = first["networks"]["policy"]
    held = {"fixed": initial, "refreshed": start}[reference]
    assert second["parents"] == {"initial": start, "reference": held}
    rows = [json.loads(x) for x in (home / "rounds.jsonl").read_text().splitlines()]
    assert rows[1]["sampled_from"] == rows[0]["policy"]
    asked = [
        [json.loads(x)["prompt"] for x in path.read_text().splitlines()]
        for path in (home / f"round{n}" / "prompts.jsonl" for n in (1, 2))
    ]
    assert asked[1][:4] == [f"say {i}" for i in (8, 9, 10, 11)]
    assert asked[1][4:] == asked[0][:4]  # round again
    # The same command once more: nothing is sampled, judged or trained again.
    kept = [*home.rglob("samples.jsonl"), *home.rglob("verdicts.jsonl")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    asked = (folder / "calls").read_text()
    assert len(kept) == 4 and cli.main(argv) == 0
    assert before == {path: path.stat().st_mtime_ns for path in kept}
    assert (folder / "calls").read_text() == asked
    again = run_directory.read_manifest(home / "round2" / "train")
    assert again["params_fingerprint"] == second["params_fingerprint"]
    # Other settings: refused, and the folder is as it was.
    capsys.readouterr()
    files = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    assert cli.main([*argv, "--num_samples=8", "--temperature=0.2"]) == 2
    error = capsys.readouterr().err
    assert "num_samples=4, temperature=1.0 (now num_samples=8, temp" in error
    assert "--redo=round1/samples.jsonl" in error
    assert files == {p: p.read_bytes() for p in home.rglob("*") if p.is_file()}
    # Another objective makes other rows of the same verdicts.
    assert cli.main([*argv, "--gin_file=runs/dro_v.gin"]) == 2
    error = capsys.readouterr().err
    assert "schema='preference' (now schema='trajectory')" in error
    assert files == {p: p.read_bytes() for p in home.rglob("*") if p.is_file()}


def test_a_verdict_is_asked_for_once(tmp_path):
    samples = tmp_path / "samples.jsonl"
    samples.write_text(
        "".join(
            json.dumps({"prompt": f"say {i}", "response": text, "sample": n}) + "\n"
            for i in range(6)
            for n, text in enumerate((f"{i}", f"{i} {i}", f"{i}", " "))
        )
    )
    (tmp_path / "noisy.py").write_text(
        "calls = []\n\n\n"
        "def noisy(prompt, response):\n"
        "    calls.append(prompt)\n"
        "    if len(calls) == 8:\n"
        "        raise KeyboardInterrupt\n"
        "    return float(len(calls))\n"
    )
    noisy = judges.resolve(f"{tmp_path / 'noisy.py'}:noisy")

    def judged(judge):
        groups = verdicts.groups(samples)
        with Study(tmp_path / "study", say=None) as study:
            return study.lines(
                "v.jsonl", verdicts.verdicts, groups, batch=1, judge=judge
            )

    with pytest.raises(KeyboardInterrupt):
        judged(noisy)
    partial = tmp_path / "study" / "v.jsonl.partial"
    left = partial.read_text()
    partial.write_text(left + '{"prompt": "sa')  # torn by a kill
    found = judged(noisy).read_text()
    assert left.count("\n") == 3 and found.startswith(left)
    rows = [json.loads(line) for line in found.splitlines()]
    assert [r["responses"] for r in rows] == [[f"{i}", f"{i} {i}"] for i in range(6)]
    assert [r["scores"][0] for r in rows] == [1.0, 3.0, 5.0, 9.0, 11.0, 13.0]
    assert judged(noisy).read_text() == found
    with pytest.raises(ValueError, match="judge: .*noisy of"):
        judged(judges.resolve(f"{__file__}:length"))


@pytest.mark.parametrize(
    ("gin_file", "message"),
    [
        ("runs/rdpo.gin", "RDPO trains on data of the schema 'rationale'"),
        ("runs/kto.gin", "--gin.DESIRABLE_ABOVE=0.5"),
    ],
)
def test_an_objective_that_judged_samples_cannot_serve(
    folder, capsys, gin_file, message
):
    argv = command(folder, "impossible", f"--gin_file={gin_file}")
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "impossible").exists()  # nothing was sampled


def test_mistakes_are_named_before_anything_runs(folder, capsys):
    argv = command(folder, "mistaken", "--num_samples=1")
    assert cli.main(argv) == 2
    assert "at least 2, got 1" in capsys.readouterr().err
    (folder / "same.py").write_text("def same(prompt, response):\n    return 1.0\n")
    argv = command(folder, "tied", f"--judge={folder / 'same.py'}:same")
    assert cli.main(argv) == 2
    assert "told no two responses" in capsys.readouterr().err
