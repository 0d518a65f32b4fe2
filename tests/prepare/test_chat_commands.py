"""Chats, tables and folders through the command line, as a user types them."""

from __future__ import annotations

import json
import re

import pytest

from jaxalign import cli

TINY = [
    "--gin.models.T5Config.emb_dim=16",
    "--gin.models.T5Config.num_heads=2",
    "--gin.models.T5Config.head_dim=8",
    "--gin.models.T5Config.mlp_dim=32",
    "--gin.models.T5Config.num_encoder_layers=1",
    "--gin.models.T5Config.num_decoder_layers=1",
    "--gin.CACHE_DIR=cache",
    "--gin.BATCH_SIZE=8",
]


def said(role, text):
    return {"role": role, "content": text}


def question(i):
    return [said("system", "Be brief."), said("user", f"Say {i} again, please")]


FILES = {
    "messages.jsonl": [
        {"messages": [*question(i), said("assistant", f"{i}")]} for i in range(12)
    ],
    "prompt_completion.jsonl": [
        {"prompt": question(i), "completion": [said("assistant", f"{i}")]}
        for i in range(12)
    ],
    "thumbs.jsonl": [
        {"prompt": question(i), "completion": [said("assistant", f"{i}")]}
        | {"label": i % 2 > 0}
        for i in range(12)
    ],
    "implicit.jsonl": [
        {"chosen": [*question(i), said("assistant", f"{i}")]}
        | {"rejected": [*question(i), said("assistant", "no")]}
        for i in range(12)
    ],
    "pairs.jsonl": [
        {"prompt": question(i), "chosen": [said("assistant", f"{i}")]}
        | {"rejected": [said("assistant", "no")]}
        for i in range(12)
    ],
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    for name, rows in FILES.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text(text)
    (folder / "parts").mkdir()
    for i in range(2):
        lines = [f"question {i}.{j},answer {j}\n" for j in range(6)]
        text = "".join(["prompt,completion\n", *lines])
        (folder / "parts" / f"{i}.csv").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def in_folder(work, monkeypatch):
    monkeypatch.chdir(work)


def data(capsys, *argv):
    """What `jaxalign data` prints and says, and its status."""
    status = cli.main(["data", *argv, *TINY])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize(
    ("gin_file", "file"),
    [
        ("sft", "messages.jsonl"),
        ("sft", "prompt_completion.jsonl"),
        ("sft", "implicit.jsonl"),
        ("kto", "thumbs.jsonl"),
        ("kto", "pairs.jsonl"),
        ("dpo", "implicit.jsonl"),
        ("dpo", "pairs.jsonl"),
    ],
)
def test_data_reads_chats_as_they_come(gin_file, file, capsys):
    status, out, err = data(capsys, f"--gin_file=runs/{gin_file}.gin", f"--data={file}")
    assert status == 0, err
    assert re.search(r"rows read +12: 12 kept", out)
    assert re.search(r"chat messages +12 rows", out)


def test_data_reads_a_folder_of_tables_and_tells_shared_prompts(capsys):
    status, out, err = data(
        capsys, "--gin_file=runs/sft.gin", "--data=parts", "--gin.EVAL_DATA=parts/0.csv"
    )
    assert status == 0, err
    assert re.search(r"rows read +12: 12 kept", out)
    assert "6 of 6 rows of the validation data have a prompt that is trained on" in out


def test_data_tells_what_is_too_long(capsys):
    argv = ["--gin_file=runs/sft.gin", "--data=parts", "--gin.EVAL_FRACTION=0.0"]
    lengths = "--gin.TASK_FEATURE_LENGTHS={'inputs': 13, 'targets': 9}"
    status, _, err = data(capsys, *argv, lengths, "--gin.ON_TOO_LONG=error")
    assert status == 0, err
    lengths = lengths.replace("13", "12")
    status, out, err = data(capsys, *argv, lengths, "--gin.ON_TOO_LONG=error")
    assert status == 2 and "0.csv:2: a prompt of 13 tokens" in err
    status, _, err = data(capsys, *argv, lengths, "--gin.ON_TOO_LONG=skipp")
    assert status == 2 and "did you mean 'skip'" in err
    status, _, err = data(capsys, *argv, lengths, "--gin.TRUNCATE=left")
    assert status == 2 and "'start', 'end'" in err


def test_train_and_generate_on_chats(work, capsys, caplog):
    run = [
        *("train", "--gin_file=runs/sft.gin", "--data=messages.jsonl", "--steps=2"),
        *("--gin.CHAT_TEMPLATE=chatml", "--gin.ON_TOO_LONG=skip", "--run_dir=sft"),
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 128, 'targets': 16}",
        *("--gin.sampling.Sampler.max_new_tokens=4", "--gin.EVAL_FRACTION=0.3"),
    ]
    assert cli.main([*run, *TINY]) == 0, capsys.readouterr().err
    (samples, *_) = sorted((work / "sft" / "samples").iterdir())
    line = json.loads(samples.read_text().splitlines()[0])
    assert re.fullmatch(
        r"<\|im_start\|>system\nBe brief\.<\|im_end\|>\n<\|im_start\|>user\nSay \d+ "
        r"again, please<\|im_end\|>\n<\|im_start\|>assistant\n",
        line["prompt"],
    )
    assert re.fullmatch(r"\d+<\|im_end\|>\n", line["target"])
    capsys.readouterr()
    # Another template is another run.
    other = [a.replace("chatml", "turns") for a in run]
    assert cli.main([*other, *TINY]) == 2
    assert "data_fingerprint" in capsys.readouterr().err
    made = ["generate", "--checkpoint=sft", "--prompts=messages.jsonl"]
    made += ["--max_new_tokens=3", "--output=out.jsonl"]
    assert cli.main(made) == 0, capsys.readouterr().err
    # The checkpoint remembers its template.
    given = [*made[:-1], "--chat_template=chatml", "--output=given.jsonl"]
    assert cli.main(given) == 0, capsys.readouterr().err
    assert (work / "given.jsonl").read_bytes() == (work / "out.jsonl").read_bytes()
    given[-2:] = ["--chat_template=turns", "--output=turns.jsonl"]
    assert cli.main(given) == 0, capsys.readouterr().err
    assert (work / "turns.jsonl").read_bytes() != (work / "out.jsonl").read_bytes()
    after = ["train", "--gin_file=runs/dpo.gin", "--data=pairs.jsonl", "--steps=1"]
    after += ["--checkpoint=sft", "--run_dir=dpo", "--dry_run", "--gin.CACHE_DIR=cache"]
    with caplog.at_level("WARNING"):
        assert cli.main(after) == 0, capsys.readouterr().err
    assert "sft learnt chats by CHAT_TEMPLATE='chatml', this run has 'turns'" in (
        caplog.text
    )
    rows = [json.loads(x) for x in (work / "out.jsonl").read_text().splitlines()]
    assert [row["messages"] for row in rows] == [
        row["messages"] for row in FILES["messages.jsonl"]
    ]
    capsys.readouterr()
    made.append("--chat_template=turns")
    assert cli.main(made) == 2 and "chat_template" in capsys.readouterr().err
