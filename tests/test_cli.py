"""The command line as a user meets it."""

from __future__ import annotations

import json
import logging

import pytest
import tiny_run

from jaxalign import cli

TINY = [
    "--gin.models.T5Config.emb_dim=16",
    "--gin.models.T5Config.num_heads=2",
    "--gin.models.T5Config.head_dim=8",
    "--gin.models.T5Config.mlp_dim=32",
    "--gin.models.T5Config.num_encoder_layers=1",
    "--gin.models.T5Config.num_decoder_layers=1",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 12, 'targets': 12}",
    "--gin.BATCH_SIZE=8",
    "--gin.TRAIN_STEPS=3",
    "--gin.sampling.Sampler.max_new_tokens=4",
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny_run.write_data(folder / "data.jsonl")
    return folder


@pytest.fixture(autouse=True)
def in_folder(work, monkeypatch):
    monkeypatch.chdir(work)  # packaged gin files must be found from any folder


def flags(gin_file="runs/sft.gin", *more):
    return [
        f"--gin_file={gin_file}",
        "--data=data.jsonl",
        "--gin.CACHE_DIR=cache",
        *TINY,
        *more,
    ]


@pytest.fixture(scope="module")
def trained(work):
    # Not through the function-scoped fixture: made once for this file.
    import os

    before = os.getcwd()
    os.chdir(work)
    told = logging.FileHandler(work / "told.txt")
    logging.getLogger("jaxalign").addHandler(told)
    try:
        assert cli.main(["train", *flags(), "--run_dir=sft"]) == 0
    finally:
        os.chdir(before)
        logging.getLogger("jaxalign").removeHandler(told)
        told.close()
    return work / "sft"


def test_help_lists_every_verb(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    for verb in cli.known_verbs():
        assert f"\n  {verb} " in text


def test_unknown_verb_names_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert "Did you mean train" in capsys.readouterr().err


def test_train_writes_a_whole_run_directory(trained):
    names = {p.name for p in trained.iterdir()}
    assert names >= {"config.gin", "metrics.jsonl", "manifest.json", "samples"}


def test_train_tells_what_it_is_how_it_goes_and_what_is_next(trained, work):
    told = (work / "told.txt").read_text().splitlines()
    said = [
        "SFT of a T5: ",
        "Data: ",
        "Start: random weights",
        "Steps 0 to 3, 8 rows each",
        "Compiling the training step",
        "Compiled the training step in ",
        "Evaluation after step 3: ",
        f"Finished at step 3: {trained}/checkpoints/3",
        f"Next: jaxalign generate --checkpoint={trained} ",
    ]
    at = [next(i for i, x in enumerate(told) if x.startswith(part)) for part in said]
    assert at == sorted(at) and ", loss " in told[at[6]]
    assert not (trained / ".lock").exists()


def test_config_of_a_run_reproduces_it(trained, work):
    config = str(trained / "config.gin")
    assert cli.main(["train", f"--gin_file={config}", "--run_dir=again"]) == 0
    first, again = (
        json.loads((work / name / "manifest.json").read_text())["params_fingerprint"]
        for name in ("sft", "again")
    )
    assert first == again


def test_score_and_generate_and_eval(trained, work, capsys):
    assert (
        cli.main(
            ["score", "--checkpoint=sft", "--data=data.jsonl", "--output=scores.jsonl"]
        )
        == 0
    )
    rows = [json.loads(x) for x in (work / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == 60
    # Bytes and EOS, in the file's order, with every field of the row kept.
    assert [r["num_tokens"] for r in rows] == [len(r["completion"]) + 1 for r in rows]
    assert all(r["logp"] < 0 for r in rows) and rows[3]["prompt"] == "say 3"
    arguments = ["--checkpoint=sft", "--max_new_tokens=4", "--temperature=0.7"]
    assert (
        cli.main(
            [
                "generate",
                *arguments,
                "--prompts=data.jsonl",
                "--num_samples=2",
                "--output=samples.jsonl",
            ]
        )
        == 0
    )
    lines = (work / "samples.jsonl").read_text().splitlines()
    assert [json.loads(x)["sample"] for x in lines[:4]] == [0, 1, 0, 1]
    assert len(lines) == 120
    (work / "judges.py").write_text("def length(prompt, response):\n    return 1.0\n")
    capsys.readouterr()
    judge = f"--judge={work / 'judges.py'}:length"
    compare = ["--data=data.jsonl", "--baseline=sft", judge, "--metrics=exact_match"]
    compare.append("--output=evaluated.json")
    assert cli.main(["eval", *arguments, *compare]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed)
    assert result["comparison"]["win_rate"]["mean"] == 0.5
    assert result["metrics"] == {"exact_match": 0.0}
    # What is finished is kept, and only for the same settings.
    score = ["score", "--checkpoint=sft", "--data=data.jsonl", "--output=scores.jsonl"]
    written = ("scores.jsonl", "evaluated.json")
    before = {name: (work / name).stat().st_mtime_ns for name in written}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxalign.inference.generation.load", None)  # nothing is loaded
        assert cli.main(score) == 0
        assert cli.main([*score, "--batch_size=2"]) == 0
        assert "60 lines written" in capsys.readouterr().out
        assert cli.main(["eval", *arguments, *compare]) == 0
        assert capsys.readouterr().out == printed
        for argv in (
            [*score, "--gin.FIELD_MAP={'completion': 'prompt'}"],
            ["eval", *arguments, *compare, "--seed=1"],
            ["steer", "--checkpoint=sft", "--prompts=data.jsonl", score[-1]],
        ):
            assert cli.main(argv) == 2
            (said,) = [x for x in capsys.readouterr().err.splitlines() if "Error" in x]
            assert " was made with other settings: " in said
    assert before == {name: (work / name).stat().st_mtime_ns for name in written}


def test_score_equals_what_generation_reports(trained, work):
    cli.main(
        [
            "generate",
            "--checkpoint=sft",
            "--prompts=data.jsonl",
            "--output=own.jsonl",
            "--max_new_tokens=24",
        ]
    )
    rows = [json.loads(x) for x in (work / "own.jsonl").read_text().splitlines()]
    # Text that survives decoding and encoding, and ended by itself.
    whole = [
        r
        for r in rows
        if r["num_tokens"] == len(r["response"].encode()) + 1 and r["response"].strip()
    ]
    (work / "back.jsonl").write_text(
        "".join(
            json.dumps({"prompt": r["prompt"], "completion": r["response"]}) + "\n"
            for r in whole
        )
    )
    if whole:
        cli.main(
            [
                "score",
                "--checkpoint=sft",
                "--data=back.jsonl",
                "--output=rescored.jsonl",
            ]
        )
        lines = (work / "rescored.jsonl").read_text().splitlines()
        for row, line in zip(whole, lines, strict=True):
            assert json.loads(line)["logp"] == pytest.approx(row["logp"], abs=1e-3)


def test_dry_run_prints_the_plan_and_writes_nothing(work, capsys, caplog):
    caplog.set_level("INFO", "jaxalign")
    assert cli.main(["train", *flags("runs/dro_v.gin"), "--dry_run"]) == 0
    first = caplog.messages[0]
    assert first.startswith("Network: models/t5_1_1_tiny.gin (the default")
    assert first.endswith(" parameters")
    assert "DROV starts from random weights" in caplog.text
    text = capsys.readouterr().out
    for part in (
        "TRAIN_STEPS = 3",
        "DROV of a T5: ",
        "policy/encoder/layers_0/attention/query/kernel",
        "value/value_head/kernel",
        "encoder_input_tokens",
        "temporaries of a step",
        "occupancy",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--gin.TRAIN_STEP=3", "TRAIN_STEPS"),
        ("--gin.EVAL_DATA=nothing.jsonl", "nothing.jsonl"),
        ("--gin.models.T5Config.num_head=2", "num_heads"),
        ("--gin.ACTIVATION_DTYPE='float16'", "65504"),
        ("--gin.PACKING=None", None),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(argument, message, capsys):
    status = cli.main(["train", *flags(), argument, "--run_dir=never", "--dry_run"])
    error = capsys.readouterr().err
    if message is None:
        assert status == 0, error
        return
    assert status == 2
    assert message in error and "Traceback" not in error


def test_kto_needs_two_prompts_in_a_row(capsys):
    arguments = flags("runs/kto.gin", "--gin.PACKING=None")
    assert cli.main(["train", *arguments, "--run_dir=never"]) == 2
    assert "packing" in capsys.readouterr().err.lower()


BAD_LINES = {
    "missing": '{"prompt": "a", "chosen": "b"}',
    "wrong type": '{"prompt": "a", "chosen": "b", "rejected": 3}',
    "empty": '{"prompt": "a", "chosen": "", "rejected": "c"}',
    "duplicate": '{"prompt": "a", "prompt": "z", "chosen": "b", "rejected": "c"}',
}


def test_data_names_file_line_and_field_of_bad_rows(work, capsys):
    good = '{"prompt": "p", "chosen": "b", "rejected": "c"}'
    lines = [good, *BAD_LINES.values(), *[good] * 8]
    body = "\n".join(lines).encode() + b'\n{"prompt": "\xff", "chosen": "b"}\n{"pro'
    (work / "bad.jsonl").write_bytes(body)
    arguments = [
        "data",
        "--gin_file=runs/dpo.gin",
        "--gin.DATA='bad.jsonl'",
        "--gin.CACHE_DIR='cache'",
        "--gin.EVAL_FRACTION=0.0",
    ]
    assert cli.main(arguments) != 0
    error = capsys.readouterr().err
    for place in (
        "bad.jsonl:2: rejected",
        "bad.jsonl:3: rejected",
        "bad.jsonl:4: chosen",
        "bad.jsonl:5: prompt",
        "bad.jsonl:14",
        "bad.jsonl:15",
    ):
        assert place in error, (place, error)
    assert cli.main([*arguments, "--gin.ON_BAD_ROW='skip'"]) == 0
    assert "9 kept, 6 rejected" in capsys.readouterr().out


def test_tasks_lists_data_sets_and_gin_files(capsys):
    assert cli.main(["tasks"]) == 0
    text = capsys.readouterr().out
    assert "ultrafeedback" in text and "runs/dpo.gin" in text


def test_report_of_runs(trained, work, capsys):
    assert cli.main(["report", "sft"]) == 0
    page = capsys.readouterr().out.strip()
    assert "</html>" in (work / page).read_text()
    # Of several, in the folder that holds them all, as the help says.
    assert cli.main(["report", "sft", "sft"]) == 0
    assert capsys.readouterr().out.strip() == str(trained / "report.html")


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_steer_keeps_constraints_and_weighs(trained, work):
    import re

    (work / "wishes.jsonl").write_text(
        '{"prompt": "say 1", "id": 7}\n'
        '{"prompt": "say 2", "include": ["at", "9"]}\n'
        '{"prompt": "say 3", "more_prompts": ["say 4"]}\n'
    )
    (work / "liking.py").write_text(
        "def nines(prompt, response):\n"
        "    assert prompt.startswith('say ')\n"
        "    return response.count('9')\n"
    )
    command = [
        "steer",
        "--checkpoint=sft",
        "--prompts=wishes.jsonl",
        "--output=steered.jsonl",
        "--regex=[a-z9 ]{2,5}",
        f"--potential={work / 'liking.py'}:nines",
        "--beta=0.5",
        "--num_particles=4",
        "--expansion=2",
        "--max_new_tokens=6",
        "--batch_size=2",
    ]
    assert cli.main(command) == 0
    rows = read_lines(work / "steered.jsonl")
    by_prompt = {}
    for row in rows:
        assert re.fullmatch("[a-z9 ]{2,5}", row["response"])
        assert row["num_tokens"] == len(row["response"]) + 1
        assert row["log_evidence"] < 2.0 * 5 and row["logp"] < 0.0
        by_prompt.setdefault(row["prompt"], []).append(row)
    assert list(by_prompt) == ["say 1", "say 2", "say 3"]
    assert all(
        "at" in r["response"] and "9" in r["response"] for r in by_prompt["say 2"]
    )
    assert by_prompt["say 1"][0]["id"] == 7
    for found in by_prompt.values():
        assert abs(sum(r["weight"] for r in found) - 1.0) < 1e-6
        assert [r["weight"] for r in found] == sorted(
            (r["weight"] for r in found), reverse=True
        )


def test_steer_fills_templates_and_names_mistakes(trained, work, capsys):
    (work / "one.jsonl").write_text('{"prompt": "say 1"}\n')
    command = [
        "steer",
        "--checkpoint=sft",
        "--prompts=one.jsonl",
        "--output=filled.jsonl",
        "--num_particles=2",
        "--max_new_tokens=6",
        "--batch_size=1",
    ]
    assert cli.main([*command, "--template=it[BLANK]!"]) == 0
    for row in read_lines(work / "filled.jsonl"):
        assert row["response"].startswith("it") and row["response"].endswith("!")
    command[3] = "--output=other.jsonl"
    for flags_, message in (
        (["--template=it"], r"has no [BLANK] in it"),
        (["--template=[BLANK]", "--regex=a"], "a template excludes regex"),
        (["--regex=(a"], "is no regular expression"),
        (["--potential=liking.py:nines", "--beta=0"], "beta must be above 0"),
        (["--resampling=best"], "resampling must be one of"),
    ):
        capsys.readouterr()
        assert cli.main([*command, *flags_]) == 2
        assert message in capsys.readouterr().err


def test_serve_starts_a_server_for_the_checkpoint(trained, monkeypatch):
    from jaxalign.serving import server

    started = []
    monkeypatch.setattr(
        server,
        "run",
        lambda config, sock: started.extend([config.app, *sock.getsockname()]),
    )
    assert cli.main(["serve", "--checkpoint=sft", "--port=0"]) == 0  # any that is free
    app, host, port = started
    assert host == "127.0.0.1" and port > 0
    assert "/v1/completions" in {route.path for route in app.routes}
