"""The gin glue: look-up, precedence, round trips and the texts of errors."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import gin
import pytest
from gin_macros import macro

from jaxalign import configs
from jaxalign.configs import ConfigError

# A module that gin files of these tests import.
MODULE = """
import dataclasses

@dataclasses.dataclass
class Model:
    width: int = 4
    depth: int = 2
    name: str = "small"

def train(model, steps, data=None, lengths=None, text=""):
    return {"model": model, "steps": steps, "data": data, "lengths": lengths,
            "text": text}

def unmentioned(rate=1.0):
    return rate
"""

MODEL = """
from __gin__ import dynamic_registration
import gin_toy

WIDTH = 8
MODEL = @gin_toy.Model()
gin_toy.Model:
  width = %WIDTH
  depth = 3
"""

RUN = """
from __gin__ import dynamic_registration
import gin_toy
include "models/toy.gin"

DATA = %gin.REQUIRED
STEPS = 10
LENGTHS = {"inputs": 16, "targets": %STEPS}
WIDTH = 16

gin_toy.train:
  model = %MODEL
  steps = %STEPS
  data = %DATA
  lengths = %LENGTHS
"""


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory):
    """Importable once for all tests: gin's registry outlives a test."""
    folder = tmp_path_factory.mktemp("module")
    (folder / "gin_toy.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with gin files."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "toy.gin").write_text(MODEL)
    (tmp_path / "run.gin").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train():
    import gin_toy

    return configs.configured(gin_toy.train)()


def error(*args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        configs.parse(*args, **kwargs)
    return str(caught.value)


# Values and precedence.


def test_files_then_bindings_override():
    files = configs.parse(["run.gin"], ["DATA='d'", "STEPS = 7", "Model.depth=5"])
    got = train()
    assert [file.as_posix() for file in files] == ["run.gin", "models/toy.gin"]
    assert dataclasses.asdict(got["model"]) == {
        "width": 16,  # the run file's value comes after its include's
        "depth": 5,
        "name": "small",
    }
    assert got["steps"] == 7
    assert got["data"] == "d"
    assert got["lengths"] == {"inputs": 16, "targets": 7}


def test_a_later_file_overrides_an_earlier_one(folder):
    (folder / "mine.gin").write_text("DATA = 'mine'\nSTEPS = 3\n")
    configs.parse(["run.gin", "mine.gin"])
    assert (train()["steps"], train()["data"]) == (3, "mine")


def test_an_include_in_the_middle_overrides_only_what_is_above(folder):
    (folder / "inner.gin").write_text("A = 'inner'\nB = 'inner'\n")
    (folder / "outer.gin").write_text("A = 'outer'\ninclude 'inner.gin'\nB = 'outer'\n")
    configs.parse(["outer.gin"])
    assert (macro("A"), macro("B")) == ("inner", "outer")


def test_names_imported_above_an_include_hold_below_it(folder):
    (folder / "late.gin").write_text(
        "from __gin__ import dynamic_registration\nimport gin_toy\n"
        "gin_toy.Model.depth = 1\ninclude 'models/toy.gin'\ngin_toy.Model.depth = 9\n"
    )
    configs.parse(["late.gin"])
    assert macro("MODEL").depth == 9


def test_parse_replaces_the_earlier_configuration():
    configs.parse(["run.gin"], ["DATA='a'", "STEPS=3"])
    configs.parse(["run.gin"], ["DATA='b'"])
    assert (macro("STEPS"), macro("DATA")) == (10, "b")


def test_a_flag_can_bring_a_configurable_that_files_import():
    configs.parse(["run.gin"], ["DATA=@gin_toy.unmentioned", "train.text='x'"])
    assert train()["data"]() == 1.0


def test_configured_leaves_unmentioned_functions_alone():
    def function():
        return 1

    assert configs.configured(function) is function


# Look-up.


def test_the_working_folder_comes_before_search_paths_and_package(folder):
    packaged = configs.available()[0] if configs.available() else "runs/none.gin"
    (folder / packaged).parent.mkdir(exist_ok=True)
    (folder / packaged).write_text("A = 'working folder'\n")
    (folder / "elsewhere" / packaged).parent.mkdir(parents=True)
    (folder / "elsewhere" / packaged).write_text("A = 'search path'\n")
    configs.parse([packaged], search_paths=["elsewhere"])
    assert macro("A") == "working folder"
    (folder / packaged).unlink()
    configs.parse([packaged], search_paths=["elsewhere"])
    assert macro("A") == "search path"


def test_a_gin_file_imports_modules_of_the_working_folder(folder, monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    (folder / "gin_toy_here.py").write_text("def twice(x, n=2):\n    return x * n\n")
    text = "from __gin__ import dynamic_registration\nimport gin_toy_here\n"
    (folder / "own.gin").write_text(text + "F = @gin_toy_here.twice\n")
    configs.parse(["own.gin"])
    function = macro("F")
    assert configs.bound(function) is function
    configs.parse(["own.gin"], ["gin_toy_here.twice.n = 3"])
    function = configs.bound(macro("F"))
    assert function.keywords == {"n": 3} and function("a") == "aaa"


def test_an_include_beside_its_file_is_found(folder):
    (folder / "deep").mkdir()
    (folder / "deep" / "base.gin").write_text("A = 1\n")
    (folder / "deep" / "top.gin").write_text("include 'base.gin'\n")
    configs.parse(["deep/top.gin"])
    assert macro("A") == 1


def test_packaged_files_are_found_from_any_folder():
    root = Path(configs.__file__).parents[2]
    names = {
        p.relative_to(root / "gin_configs").as_posix()
        for p in (root / "gin_configs").rglob("*.gin")
    }
    assert set(configs.available()) == names


def test_unknown_file_names_the_nearest(folder):
    text = error(["runs/no_such_file.gin"])
    assert "'runs/no_such_file.gin' not found in the working folder" in text
    assert "Nearest: run.gin" in error(["rum.gin"])


def test_unknown_include_names_file_and_line(folder):
    (folder / "bad.gin").write_text("A = 1\ninclude 'models/tory.gin'\n")
    text = error(["bad.gin"])
    assert text.startswith("bad.gin:2: gin file 'models/tory.gin' not found")


def test_circular_includes_are_refused(folder):
    (folder / "a.gin").write_text("include 'b.gin'\n")
    (folder / "b.gin").write_text("include 'a.gin'\n")
    assert "a.gin -> b.gin -> a.gin" in error(["a.gin"])


# What would have no effect, or does not exist.


def test_unknown_macro_is_refused_before_anything_is_imported():
    text = error(["run.gin"], ["DATA='d'", "STEP=3"])
    assert "no parsed gin file sets or reads a macro named STEP" in text
    assert "Nearest: STEPS" in text
    assert "Macros of" not in text  # a good suggestion comes alone
    text = error(["run.gin"], ["DATA='d'", "XYZZY=3"])
    assert "Macros of run.gin: DATA, LENGTHS, MODEL, STEPS, WIDTH." in text


def test_a_bad_flag_is_refused_before_anything_is_imported(folder):
    (folder / "import.gin").write_text(
        "from __gin__ import dynamic_registration\nimport absent_module\nA = 1\n"
    )
    assert "a macro named B" in error(["import.gin"], ["B=2"])
    assert "absent_module" in error(["import.gin"], ["A=2"])


def test_macro_names_are_compared_without_case():
    assert "Nearest: DATA" in error(["run.gin"], ["data='d'"])


def test_a_macro_that_another_flag_reads_is_accepted():
    configs.parse(["run.gin"], ["DATA='d'", "STEPS=%MINE", "MINE=4"])
    assert train()["steps"] == 4


def test_macros_without_value_are_all_listed(folder):
    (folder / "two.gin").write_text("A = %gin.REQUIRED\nB = %STEPZ\nSTEPS = 1\n")
    text = error(["two.gin"])
    assert "These macros have no value: A, STEPZ." in text
    assert "STEPZ: set --gin.STEPZ=VALUE (two.gin reads it). Nearest: STEPS." in text


def test_required_macro_names_the_flag():
    assert "DATA: set --gin.DATA=VALUE (run.gin reads it)" in error(["run.gin"])


@pytest.mark.parametrize("binding", ["Model.widht=3", "gin_toy.Model.widht=3"])
def test_unknown_parameter_on_the_command_line(binding):
    text = error(["run.gin"], ["DATA='d'", binding])
    assert text.startswith(f"--gin.{binding}: ")
    assert "Nearest: width." in text and "Its parameters" not in text


def test_unknown_parameter_in_a_file_names_the_line(folder):
    (folder / "bad.gin").write_text(MODEL + "\ngin_toy.Model.dept = 3\n")
    text = error(["bad.gin"])
    assert text.startswith("bad.gin:11: ")
    assert "Nearest: depth." in text


def test_unknown_parameter_below_an_include_keeps_its_line(folder):
    (folder / "bad.gin").write_text(RUN + "\ngin_toy.Model.dept = 3\n")
    assert error(["bad.gin"], ["DATA='d'"]).startswith("bad.gin:17: ")


def test_unknown_configurable_on_the_command_line():
    text = error(["run.gin"], ["DATA='d'", "Modle.width=3"])
    assert "no parsed gin file mentions Modle" in text
    assert "Nearest: Model" in text


def test_a_configurable_that_no_file_mentions_would_have_no_effect():
    text = error(["run.gin"], ["DATA='d'", "gin_toy.unmentioned.rate=2.0"])
    assert "no parsed gin file mentions gin_toy.unmentioned" in text


def test_unknown_reference_on_the_command_line():
    text = error(["run.gin"], ["DATA=@gin_toy.Modell()"])
    assert "gin_toy has no Modell. Nearest: Model." in text


def test_unknown_attribute_in_a_file(folder):
    (folder / "bad.gin").write_text(MODEL.replace("gin_toy.Model:", "gin_toy.Modle:"))
    text = error(["bad.gin"])
    assert text.startswith("bad.gin:7: gin_toy has no Modle. Nearest: Model.")


def test_name_that_was_not_imported(folder):
    (folder / "bad.gin").write_text(MODEL + "\ngin_toi.Model.depth = 1\n")
    text = error(["bad.gin"])
    assert text.startswith("bad.gin:11: 'gin_toi' was not provided by an import")
    assert "Nearest: gin_toy." in text


def test_unknown_module(folder):
    (folder / "bad.gin").write_text(
        "from __gin__ import dynamic_registration\nfrom jaxalign import confgs\n"
    )
    text = error(["bad.gin"])
    assert text.startswith("bad.gin:2: No module named 'jaxalign.confgs'")
    assert "Nearest: jaxalign.configs" in text


def test_syntax_errors_name_file_and_line(folder):
    (folder / "bad.gin").write_text("A = 1\nB = word\n")
    assert error(["bad.gin"]).startswith("bad.gin:2: ")
    (folder / "open.gin").write_text("A = 1\nB = [1,\n")
    assert "a bracket or quote is not closed" in error(["open.gin"])


# Round trips.


def test_config_str_reproduces_the_run(folder):
    long_text = 'It\'s a "long" text\nwith {braces}, ümlauts and 🙂. ' * 20
    configs.parse(["run.gin"], ["DATA=['a.jsonl', None]", f"train.text={long_text!r}"])
    first, written = train(), configs.config_str()
    (folder / "saved").mkdir()
    (folder / "saved" / "config.gin").write_text(written)
    (folder / "models" / "toy.gin").unlink()  # it must need no other file
    configs.parse(["saved/config.gin"])
    assert configs.config_str() == written
    assert train() == first
    assert first["text"] == long_text


def test_the_saved_config_takes_the_same_flags(folder):
    configs.parse(["run.gin"], ["DATA='a'"])
    (folder / "config.gin").write_text(configs.config_str())
    configs.parse(["config.gin"], ["STEPS=2", "Model.width=1"])
    got = train()
    assert (got["steps"], got["model"].width, got["data"]) == (2, 1, "a")
    assert "Nearest: STEPS" in error(["config.gin"], ["STEP=3"])


def test_operative_config_holds_the_defaults_of_what_was_called(folder):
    configs.parse(["run.gin"], ["DATA='a'"])
    assert "name = 'small'" not in gin.operative_config_str()
    train()
    written = gin.operative_config_str()
    assert "gin_toy.Model.name = 'small'" in written
    (folder / "operative.gin").write_text(written)
    first = train()
    configs.parse(["operative.gin"])
    assert train() == first


# Flags.


def test_parse_flags_takes_gin_flags_and_leaves_the_rest():
    flags = configs.parse_flags(
        [
            "--gin_file=a.gin",
            "--run_dir=x",
            "--gin.B=[1, 2]",
            "--gin_file",
            "b.gin",
            "--gin.a/M.p='q=r'",
            "--gin_bindings=C = 3",
            "--gin_search_paths=p,q",
            "out",
        ]
    )
    assert flags.gin_files == ["a.gin", "b.gin"]
    assert flags.gin_bindings == ["B=[1, 2]", "a/M.p='q=r'", "C = 3"]
    assert flags.search_paths == ["p", "q"]
    assert flags.rest == ["--run_dir=x", "out"]


@pytest.mark.parametrize(
    "flag, expected",
    [
        ("--gin.Model.name=small", "--gin.Model.name=\"'small'\""),
        ("--gin.NONE=true", "--gin.NONE=True"),
        ("--gin.NONE=null", "--gin.NONE=None"),
        ("--gin.NONE=[1, 2", "bracket and quote closed"),
        ("--gin.NONE='a", "bracket and quote closed"),
        ("--gin.NONE=1.O", "gin cannot parse the value 1.O"),
        ("--gin.STEPS=1o", "gin cannot parse the value 1o. Its default is 10."),
        ("--gin.STEPS=many", "gin cannot parse the value many"),
        ("--gin.NONE", "--gin.NONE=VALUE"),
        ("--gin.NONE=", "--gin.NONE=VALUE"),
        ("--gin.=3", "is not a name"),
        ("--gin.STEPS=1\nY=2", "gin cannot parse the value"),
        ("--gin_files=a.gin", "known: --gin_file"),
        ("--gin_file=", "--gin_file needs a value"),
    ],
)
def test_malformed_flags_say_what_to_write(folder, flag, expected):
    (folder / "run.gin").write_text(RUN + "\nNONE = None\n")
    with pytest.raises(ConfigError) as caught:
        configs.check(["run.gin"], configs.parse_flags([flag]).gin_bindings)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "value", ["my.jsonl", "/a/b c.jsonl", "gs://a/b", "it's", "2024_pairs.jsonl"]
)
def test_text_needs_no_quotes_where_a_string_belongs(folder, value):
    text = "A = 'a'\nB = None\n"
    (folder / "texts.gin").write_text(text)
    configs.parse(["texts.gin"], [f"A={value}", f"B = {value}"])
    assert macro("A") == macro("B") == value


def test_defaults_are_weaker_than_every_file(folder):
    (folder / "own.gin").write_text("A = 2\nC = %B\n")
    read = configs.parse(["own.gin"], ["B=x"], defaults="A = 1\nB = None\n")
    assert [macro(name) for name in "ABC"] == [2, "x", "x"]
    assert [path.name for path in read] == ["own.gin"]


def test_importing_the_glue_imports_neither_tensorflow_nor_jax():
    code = (
        "import sys, jaxalign.configs; "
        "print(sorted({m.split('.')[0] for m in sys.modules} "
        "& {'tensorflow', 'seqio', 'jax'}))"
    )
    got = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert got.stdout.strip() == "[]"
