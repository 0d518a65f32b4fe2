"""Judges named in gin files or on the command line."""

from __future__ import annotations

import math

import pytest

from jaxalign.evaluation import resolve_callable
from jaxalign.evaluation.judges import is_pairwise


def test_modules_methods_and_files(tmp_path):
    assert resolve_callable("math:sqrt") is math.sqrt
    assert resolve_callable("os.path:join")("a", "b") == "a/b"
    assert resolve_callable("fractions:Fraction.from_float")(0.5) == 0.5
    path = tmp_path / "my_judge.py"
    path.write_text("def judge(prompt, response):\n    return len(response)\n")
    assert resolve_callable(f"{path}:judge")("p", "abc") == 3


@pytest.mark.parametrize(
    "spec, message",
    [
        ("math.sqrt", "Expected 'package.module:function' or 'file.py:function'"),
        ("math:", "Expected 'package.module:function'"),
        ("math:sqr", "'math' has no 'sqr'. Did you mean 'sqrt'"),
        ("matth:sqrt", "no module named 'matth'. Did you mean 'math'"),
        (
            "jaxalign.evaluation.judge:score",
            "no module named 'jaxalign.evaluation.judge'. Did you mean 'judges'",
        ),
        ("math.deep:sqrt", "'math' is a module, not a package; use 'math:function'"),
    ],
)
def test_mistakes_name_the_nearest(spec, message):
    with pytest.raises(ValueError, match=message):
        resolve_callable(spec)


def test_what_is_not_callable_is_refused():
    message = "'math:pi' is a float, not a function"
    with pytest.raises(TypeError, match=message) as refused:
        resolve_callable("math:pi")
    assert isinstance(refused.value, ValueError)  # a user's mistake: no traceback


def test_missing_files_name_the_nearest(tmp_path):
    (tmp_path / "judge.py").write_text("")
    with pytest.raises(ValueError, match="no file .*juge.py. Did you mean 'judge.py'"):
        resolve_callable(f"{tmp_path}/juge.py:score")


def test_errors_inside_a_module_are_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        resolve_callable("needs_more:judge")


def test_arguments_tell_judges_apart():
    assert not is_pairwise(lambda prompt, response: 0.0)
    assert not is_pairwise(lambda prompt, response, scale=1.0: 0.0)
    assert is_pairwise(lambda prompt, a, b: 0.5)

    class Judge:
        def __call__(self, prompt, a, b):
            return 0.5

    assert is_pairwise(Judge())
