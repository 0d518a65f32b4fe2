"""docs/start.md, typed by somebody with a checkpoint: files, commands and Python."""

from __future__ import annotations

import pathlib
import re
import shlex
import sys

import jax
import pytest
import tiny_run

from jaxalign import cli, models, vocabularies
from jaxalign.interop import huggingface
from jaxalign.training import run_directory

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "docs/start.md").read_text()
FILE = re.compile(r"^`([\w.]+)`,[^\n]*:\n\n```\w+\n(.*?)^```", re.M | re.S)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
COMMAND = re.compile(r"^    (jaxalign .*(?:\n {8}.*)*)", re.M)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with `flan-t5-small`, small as it need not be to be typed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    model = models.T5(tiny_run.CONFIG)
    params = models.init_params(model, jax.random.key(0))
    vocabulary = vocabularies.ByteVocabulary(extra_ids=125)
    huggingface.write("flan-t5-small", params, model, vocabulary)
    for name, text in FILE.findall(TEXT):
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_first_five_minutes(folder, capsys):
    assert (folder / "pairs.jsonl").exists()
    blocks, commands = PYTHON.findall(TEXT), COMMAND.findall(TEXT)
    assert len(blocks) == 2 and len(commands) == 2
    namespace = {}
    for block in blocks:
        text = re.sub(r"\b(steps|max_new_tokens)=\d+", r"\1=2", block)
        exec(compile(text, "start.md", "exec"), namespace)
    assert (folder / "aligned/model.safetensors").is_file()
    called = run_directory.read_manifest(folder / "runs/dpo")
    for command in commands:
        _, verb, *argv = shlex.split(command.replace("\\\n", ""))
        argv = [re.sub(r"^--steps=\d+$", "--steps=2", flag) for flag in argv]
        if verb == "train":  # into a folder of its own, to be compared
            argv = [flag.replace("runs/dpo", "runs/typed") for flag in argv]
            argv[0] = "--gin_file=runs/dpo.gin"
        assert cli.main([verb, *argv]) == 0, capsys.readouterr().err
    typed = run_directory.read_manifest(folder / "runs/typed")
    assert typed["params_fingerprint"] == called["params_fingerprint"]
    assert (folder / "runs/dpo/report.html").is_file()


def test_the_readme_shows_the_same_call():
    readme = PYTHON.findall((ROOT / "README.md").read_text())
    assert readme == PYTHON.findall(TEXT)[:1]
