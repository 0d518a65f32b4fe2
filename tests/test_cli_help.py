"""What the command line says of itself: help, completion, messages."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

import pytest

from jaxalign import cli
from jaxalign.cli import flags
from jaxalign.configs.scan import find
from jaxalign.pipelines import iteration

PARSERS = {verb: make for verb, (_, make) in cli._VERBS.items()}


def actions(verb):
    return [a for a in PARSERS[verb]()._actions if a.help is not argparse.SUPPRESS]


@pytest.mark.parametrize("verb", PARSERS)
def test_every_flag_has_a_text(verb):
    assert [a.dest for a in actions(verb) if not a.help] == []


@pytest.mark.parametrize(
    ("verb", "shown"),
    [
        ("train", ["the start, and for a step (default: 1800)"]),
        ("generate", ["0: most probable tokens (default: 1.0)", "(default: 128)"]),
        ("eval", ["0: most probable tokens (default: 0.0)"]),
        ("steer", ["(default: fearnhead_clifford)", "(default: 16)"]),
        ("serve", ["port to listen on (default: 8000)", "(default: 127.0.0.1)"]),
        ("iterate", ["how many (default: 3)", "(default: fixed)"]),
        ("compare", ["(default: runs/compare)", "(default: test)"]),
        ("report", ["of several in the folder that holds them all"]),
    ],
)
def test_help_shows_defaults(verb, shown, capsys):
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert [part for part in shown if part not in text] == []
    assert "==SUPPRESS==" not in text and "default: None" not in text


@pytest.mark.parametrize(
    ("verb", "gin_file", "function"),
    [
        ("generate", "runs/generate.gin", "inference/generation.py:generate"),
        ("steer", "runs/steer.gin", "inference/steering.py:steer"),
        ("serve", "runs/serve.gin", "serving/api.py:serve"),
        ("score", "runs/score.gin", "inference/score.py:score"),
        ("eval", "runs/eval.gin", "inference/evaluation.py:evaluate"),
    ],
)
def test_the_defaults_shown_are_those_of_the_gin_file(verb, gin_file, function):
    shown = flags.signature(function)
    text = find(gin_file, []).read_text()
    macros = dict(re.findall(r"^([A-Z_]+) = (\S+)", text, re.MULTILINE))
    bound = re.findall(r"^  (\w+) = %(\w+)", text, re.MULTILINE)
    assert bound
    for name, macro in bound:
        if shown.get(name) is not None:
            assert repr(shown[name]) == macros[macro], name


def test_choices_that_the_parser_repeats():
    (reference,) = (a for a in actions("iterate") if a.dest == "reference")
    assert reference.choices == iteration.REFERENCES


COMPLETE = """
source <(printf '%s' "$SCRIPT")
COMP_WORDS=("$@"); COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
_jaxalign
printf '%s\\n' "${COMPREPLY[@]}"
"""


RUNS = ["runs/dro_p.gin", "runs/dro_v.gin"]


@pytest.fixture(scope="module")
def script():
    """Made by a process of its own, which must not have loaded JAX to do so."""
    code = (
        "import sys; from jaxalign import cli; cli.main(['completion', 'bash']); "
        "assert not {'jax', 'numpy', 'tensorflow'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["gen"], ["generate "]),
        (["train", "--dry"], ["--dry_run"]),
        (["serve", "--po"], ["--port="]),
        (["iterate", "--reference", "=", "f"], ["fixed"]),  # as bash splits words
        (["iterate", "--reference=f"], ["--reference=fixed"]),  # as zsh does
        (["train", "--gin_file", "=", "runs/dro"], RUNS),
        (["generate", "--prompts", "=", "my pro"], ["my prompts.jsonl"]),
        (["completion", "z"], ["zsh"]),
    ],
)
def test_bash_completes(script, words, expected, tmp_path):
    (tmp_path / "my prompts.jsonl").touch()
    done = subprocess.run(
        ["bash", "-c", COMPLETE, "bash", "jaxalign", *words],
        cwd=tmp_path,
        env={"SCRIPT": script},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == expected and done.stderr == ""


def test_zsh_uses_the_same_function(script, capsys):
    assert cli.main(["completion", "zsh"]) == 0
    text = capsys.readouterr().out
    assert text.endswith(script) and "bashcompinit" in text


def serve(*_):
    """A function whose name appears in messages."""


MESSAGES = {
    f"Port 80.\n  In call to configurable 'serve' ({serve})\n"
    "  In call to configurable 'Run' (<class 'x.Run'>) in scope 'a'": "Port 80.",
    f"expected a number, got {serve}.": "expected a number, got serve.",
    f"got {object()}": "got object",
    f"got {serve.__get__(object())}": "got serve",
    f"got {(lambda: 0)}": "got lambda",
    "a < b and <EOS> 0x10": "a < b and <EOS> 0x10",
}


def test_no_python_object_is_shown(monkeypatch, capsys):
    for message, shown in MESSAGES.items():

        def fail(argv, message=message):
            raise ValueError(message)

        monkeypatch.setitem(cli._VERBS, "tasks", (fail, None))
        assert cli.main(["tasks"]) == 2
        assert capsys.readouterr().err == f"ValueError: {shown}\n"


def test_a_good_suggestion_comes_without_the_whole_list(capsys):
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "Unknown verb 'trian'. Did you mean train?\n"
    assert cli.main(["xyzzy"]) == 2
    assert "Known: train, generate" in capsys.readouterr().err
