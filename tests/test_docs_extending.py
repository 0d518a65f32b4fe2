"""docs/extending.md: its files, commands and Python do what the page says."""

from __future__ import annotations

import json
import pathlib
import re
import shlex
import sys

import pytest

from jaxalign import cli
from jaxalign.training import run_directory

TEXT = (pathlib.Path(__file__).parents[1] / "docs/extending.md").read_text()
SECTIONS = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
# A file is named in the line above its block; other blocks of Python are run, and so
# are indented commands.
FILE = re.compile(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```", re.M | re.S)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
COMMAND = re.compile(r"^    (jaxalign .*(?:\n {8}.*)*)", re.M)
# What makes a training run a matter of seconds.
SMALL = (
    "models.T5Config.emb_dim=16",
    "models.T5Config.mlp_dim=32",
    "models.T5Config.num_encoder_layers=1",
    "models.T5Config.num_decoder_layers=1",
    "TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 8}",
    "BATCH_SIZE=4",
    "sampling.Sampler.max_new_tokens=2",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All files of the page, in the working folder of a user who has nothing yet."""
    folder = tmp_path_factory.mktemp("extending")
    files = dict(FILE.findall(TEXT))
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder / "home"))
        patch.setattr(sys, "path", [p for p in sys.path if p])
        yield folder
    for name in files:
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.fixture(autouse=True)
def registries():
    """What the examples register reaches no other test."""
    yield
    from jaxalign.prepare import tasks

    tasks._TASKS.pop("quiz", None)
    if "seqio" in sys.modules:
        import seqio

        if "sums" in seqio.TaskRegistry.names():
            seqio.TaskRegistry.remove("sums")


@pytest.mark.parametrize("title, text", SECTIONS, ids=[title for title, _ in SECTIONS])
def test_a_section_does_what_it_says(title, text, folder, capsys):
    for command in COMMAND.findall(text):
        _, verb, *flags = shlex.split(command.replace("\\\n", ""))
        flags = [re.sub(r"^--steps=\d+$", "--steps=2", flag) for flag in flags]
        if verb == "train":
            flags += [f"--gin.{setting}" for setting in SMALL]
        status = cli.main([verb, *flags])
        assert status == 0, capsys.readouterr().err
    rest = FILE.sub("", text)
    for block in PYTHON.findall(rest):
        exec(compile(block, f"extending.md, {title}", "exec"), {})
    assert COMMAND.search(text) or PYTHON.search(rest), "nothing was run"


def manifest(folder, name):
    return run_directory.read_manifest(folder / "runs" / name)


def test_the_runs_are_what_the_page_says(folder):
    """After the sections: their runs took the numbers and the data they were given."""
    assert manifest(folder, "hinge")["identity"]["objective"]
    augment = manifest(folder, "masked")["identity"]["augment"]
    assert augment.startswith("masked(share=0.3) of ")
    stages = manifest(folder, "sums")["stages"]
    assert {s["status"] for s in stages.values()} == {"finished"}
    demos = (folder / "runs/sums/demos.jsonl").read_text().splitlines()
    assert json.loads(demos[23]) == {"prompt": "2 plus 3", "completion": "5"}
