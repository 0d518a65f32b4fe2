"""A user's own Python: found where it is, run once, named when it is missing."""

from __future__ import annotations

import math
import os
import sys

import pytest

from jaxalign import user_code

JUDGE = """
from __future__ import annotations
import dataclasses

@dataclasses.dataclass
class Rubric:
    words: int = 6

RUNS = []

def score(prompt, response):
    return -abs(len(response.split()) - Rubric().words)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    return tmp_path


def test_a_file_may_hold_dataclasses_under_postponed_annotations(folder):
    (folder / "json.py").write_text(JUDGE)  # a name that stands in for nothing
    assert user_code.resolve_callable("json.py:score")("p", "a b") == -4
    import json

    assert json.loads("1") == 1


def test_a_file_may_import_what_lies_in_the_working_folder(folder):
    (folder / "own_words_of_mine.py").write_text("WORDS = 6\n")
    (folder / "judge.py").write_text("from own_words_of_mine import WORDS\n")
    assert user_code.load_module("judge.py").WORDS == 6


def test_a_file_is_run_once_until_it_changes(folder):
    (folder / "mine.py").write_text(JUDGE)
    module = user_code.load_module("mine.py")
    assert user_code.load_module(str(folder / "mine.py")) is module
    first = user_code.fingerprint(module)
    (folder / "mine.py").write_text(JUDGE + "\nCHANGED = True\n")
    assert user_code.load_module("mine.py").CHANGED
    assert user_code.fingerprint(module) != first


def test_an_edit_in_the_same_second_counts(folder, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for answer in (1, 2):  # as long and as old: what Python knows its bytecode by
        (folder / "mine.py").write_text(f"ANSWER = {answer}\n")
        os.utime(folder / "mine.py", (1e9, 1e9))
        assert user_code.load_module("mine.py").ANSWER == answer


def test_what_a_file_raises_comes_through_every_time(folder):
    (folder / "broken.py").write_text("raise RuntimeError('mine')")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="mine"):
            user_code.load_module("broken.py")


def test_modules_of_the_working_folder_are_found_last(folder):
    (folder / "own_tasks_of_mine.py").write_text("HERE = 1\n")
    (folder / "textwrap.py").write_text("raise RuntimeError\n")
    assert user_code.load_module("own_tasks_of_mine").HERE == 1
    assert user_code.resolve_callable("textwrap:dedent")(" a") == "a"


def test_missing_modules_and_files_name_the_nearest(folder):
    (folder / "judge.py").write_text(JUDGE)
    with pytest.raises(ValueError, match=r"no file jugde\.py\. Did you mean 'judge"):
        user_code.load_module("jugde.py")
    with pytest.raises(ValueError, match="no module named 'jugde'. Did you mean"):
        user_code.load_module("jugde")
    with pytest.raises(ValueError, match="'judge' has no 'scor'. Did you mean 'score'"):
        user_code.resolve_callable("judge.py:scor")


def test_modules_methods_and_files(tmp_path):
    assert user_code.resolve_callable("math:sqrt") is math.sqrt
    assert user_code.resolve_callable("os.path:join")("a", "b") == "a/b"
    assert user_code.resolve_callable("fractions:Fraction.from_float")(0.5) == 0.5
    path = tmp_path / "my_judge.py"
    path.write_text("def judge(prompt, response):\n    return len(response)\n")
    assert user_code.resolve_callable(f"{path}:judge")("p", "abc") == 3


@pytest.mark.parametrize(
    "spec, message",
    [
        ("math.sqrt", "Expected 'package.module:function' or 'file.py:function'"),
        ("math:", "Expected 'package.module:function'"),
        ("math:sqr", "'math' has no 'sqr'. Did you mean 'sqrt'"),
        ("matth:sqrt", "no module named 'matth'. Did you mean 'math'"),
        (
            "jaxalign.evaluation.compar:score",
            "no module named 'jaxalign.evaluation.compar'. Did you mean 'compare'",
        ),
        ("math.deep:sqrt", "'math' is a module, not a package; use 'math:function'"),
    ],
)
def test_mistakes_name_the_nearest(spec, message):
    with pytest.raises(ValueError, match=message):
        user_code.resolve_callable(spec)


def test_what_is_not_callable_is_refused():
    message = "'math:pi' is a float, not a function"
    with pytest.raises(TypeError, match=message) as refused:
        user_code.resolve_callable("math:pi")
    assert isinstance(refused.value, ValueError)  # a user's mistake: no traceback


def test_missing_files_name_the_nearest(tmp_path):
    (tmp_path / "judge.py").write_text("")
    with pytest.raises(ValueError, match="no file .*juge.py. Did you mean 'judge.py'"):
        user_code.resolve_callable(f"{tmp_path}/juge.py:score")


def test_errors_inside_a_module_are_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        user_code.resolve_callable("needs_more:judge")
