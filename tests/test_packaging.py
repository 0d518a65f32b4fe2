"""What is installed, what it needs, and what may import what."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import jaxalign

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxalign"

# Only these may name what is heavy, and only `tasks` outside of functions.
PREPARATION = ("jaxalign.prepare", "jaxalign.tasks", "jaxalign.interop")
HEAVY = {
    "tensorflow",
    "tensorflow_datasets",
    "tensorflow_text",
    "seqio",
    "apache_beam",
}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_names(path: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [
        normalized(Requirement(line).name)
        for line in lines
        if line and not line.startswith("-")
    ]


def setup_list(name: str) -> list[str]:
    """A list of requirements written in setup.py, its literal members."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return [e.value for e in node.value.elts if isinstance(e, ast.Constant)]
    raise AssertionError(f"setup.py assigns no {name}.")


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package by its installed name."""
    for prefix, folder in (("jaxalign", PACKAGE), ("jaxalign.tasks", ROOT / "tasks")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            yield ".".join((prefix, *parts)), path


def imports(path: Path, functions: bool) -> Iterator[str]:
    """Full names of what a file imports, in or outside of functions."""

    def walk(node: ast.AST, inside: bool) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import) and inside == functions:
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and inside == functions:
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from walk(child, inside or is_function)

    yield from walk(ast.parse(path.read_text()), False)


# The repository.


def test_every_folder_of_modules_is_a_package():
    folders = {path.parent for _, path in modules()}
    assert not [str(f) for f in folders if not (f / "__init__.py").exists()]


def test_tensorflow_stays_in_its_rooms_and_in_functions():
    wrong = []
    for module, path in modules():
        for functions in (False, True):
            for name in imports(path, functions):
                if name.split(".")[0] in HEAVY and (
                    not module.startswith(PREPARATION)
                    or (not functions and not module.startswith("jaxalign.tasks."))
                ):
                    wrong.append(f"{module} imports {name}")
    assert not wrong


def test_importing_the_package_imports_nothing_else():
    code = "import sys, jaxalign; print('jax' in sys.modules, 'gin' in sys.modules)"
    assert run(sys.executable, "-c", code).split() == ["False", "False"]


# The installation that these tests run in.


def test_console_command_version_and_floor():
    distribution = importlib.metadata.distribution("jaxalign")
    assert distribution.version == jaxalign.__version__
    assert [
        point.value
        for point in distribution.entry_points
        if (point.group, point.name) == ("console_scripts", "jaxalign")
    ] == ["jaxalign.cli:main"]
    floor_and_ceiling = distribution.metadata["Requires-Python"].split(",")
    assert sorted(floor_and_ceiling) == ["<3.14", ">=3.11"]


def test_tasks_and_configs_are_found_from_any_folder(tmp_path):
    code = (
        "import importlib.util as u, jaxalign.tasks, json; "
        "from jaxalign import configs; "
        "print(json.dumps([u.find_spec('tasks') is None, "
        "u.find_spec('gin_configs') is None, configs.available()]))"
    )
    no_tasks, no_configs, available = json.loads(
        run(sys.executable, "-c", code, cwd=tmp_path)
    )
    assert no_tasks and no_configs
    assert "runs/dpo.gin" in available


# The requirements.


def pins(file: str) -> dict[str, str]:
    found = {}
    for line in (ROOT / file).read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            found[normalized(name)] = version
    return found


def check_pinned(pinned: dict[str, str], *lists: str) -> None:
    for requirement in (Requirement(r) for name in lists for r in setup_list(name)):
        pin = pinned[normalized(requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement} is not {pin}"


def test_constraints_pin_every_requirement():
    lists = ("TRAIN", "PREPARE", "TEST", "SLOW_TESTS", "PLAN", "DOCS")
    check_pinned(pins("constraints.txt"), *lists)


def test_constraints_with_beam_pin_every_requirement_and_repeat_nothing():
    usual, own = pins("constraints.txt"), pins("constraints-beam.txt")
    check_pinned(usual | own, "TRAIN", "PREPARE", "BEAM")
    assert [name for name in own if own[name] == usual.get(name)] == []


def test_light_requirements_are_exactly_what_training_needs():
    needed: dict[str, set[str]] = {}

    def walk(requirement: Requirement) -> None:
        name = normalized(requirement.name)
        if name in needed and requirement.extras <= needed[name]:
            return
        extras = needed.setdefault(name, set())
        extras |= requirement.extras
        for line in importlib.metadata.distribution(name).requires or []:
            inner = Requirement(line)
            if inner.marker is None or any(
                inner.marker.evaluate({"extra": extra}) for extra in ("", *extras)
            ):
                walk(inner)

    for line in setup_list("TRAIN"):
        walk(Requirement(line))
    assert sorted(requirement_names(ROOT / "requirements-train.txt")) == sorted(needed)


# A machine that only trains.


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """The output of a command; its error output if it fails."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=cwd
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def light(tmp_path_factory) -> Callable[..., str]:
    """Runs commands of an environment made of ``requirements-train.txt``.

    ``light("python", "-c", ...)`` runs in an empty folder, away from the repository.
    """
    folder = tmp_path_factory.mktemp("light")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    environment = folder / "venv"
    run(sys.executable, "-m", "venv", environment)
    pip = (environment / "bin" / "python", "-m", "pip", "install", "--no-deps", "-q")
    run(*pip, "-r", ROOT / "requirements-train.txt")
    # A copy: building leaves folders beside setup.py.
    source = folder / "source"
    source.mkdir()
    for name in ("jaxalign", "tasks", "gin_configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    run(*pip, source)

    def call(program: str, *arguments: str, cwd: Path = elsewhere) -> str:
        return run(environment / "bin" / program, *arguments, cwd=cwd)

    return call


@pytest.mark.slow
def test_light_environment_has_no_tensorflow_and_lacks_nothing_else(light):
    listed = {
        normalized(row["name"])
        for row in json.loads(light("pip", "list", "--format=json"))
    }
    assert not listed & {"tensorflow", "tensorflow-datasets", "seqio", "torch"}
    code = (
        "import importlib.metadata as m, json; "
        "from pip._internal.operations.check import *; "
        "found = check_package_set(create_package_set_from_installed()[0])[0]; "
        "print(json.dumps({k: [str(x[0]) for x in v] for k, v in found.items()}))"
    )
    missing = json.loads(light("python", "-c", code))
    expected = {normalized(Requirement(line).name) for line in setup_list("PREPARE")}
    assert {k: sorted(map(normalized, v)) for k, v in missing.items()} == {
        "jaxalign": sorted(expected)
    }


@pytest.mark.slow
def test_light_environment_imports_every_module(light):
    code = (
        "import importlib, pkgutil, sys, jaxalign\n"
        "found = pkgutil.walk_packages(jaxalign.__path__, 'jaxalign.')\n"
        "names = [m.name for m in found if not m.name.startswith('jaxalign.tasks.')]\n"
        "assert 'jaxalign.models.t5' in names, names\n"
        "for name in names: importlib.import_module(name)\n"
        f"assert not {HEAVY!r} & set(sys.modules)\n"
        "import orbax.checkpoint, grain, tensorboardX, array_record.python\n"
        "from jaxalign import configs\n"
        "assert 'models/t5_1_1_tiny.gin' in configs.available()\n"
        "configs.parse(['models/t5_1_1_tiny.gin'])\n"
        "import copy, gin\n"
        "model = copy.deepcopy(gin.query_parameter('MODEL/gin.macro.value'))\n"
        "print(model.config.emb_dim)\n"
    )
    assert light("python", "-c", code).strip() == "64"


@pytest.mark.slow
def test_light_environment_prepares_trains_scores_and_generates(light, tmp_path):
    """The main job where TensorFlow and seqio are absent, down to a prepared cache."""
    data = tmp_path / "data.jsonl"
    rows = [
        {"prompt": f"say {i}", "chosen": f"it is {i}", "rejected": "no " * (i % 4 + 1)}
        for i in range(60)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = (
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 12, 'targets': 12}",
        "--gin.BATCH_SIZE=8",
        "--gin.TRAIN_STEPS=2",
        "--gin.sampling.Sampler.max_new_tokens=4",
        f"--gin.CACHE_DIR='{tmp_path / 'cache'}'",
    )

    def train(gin_file: str, source: Path, name: str, *more: str) -> Path:
        run_dir = tmp_path / name
        light(
            "jaxalign",
            "train",
            f"--gin_file=runs/{gin_file}.gin",
            f"--gin.DATA='{source}'",
            *small,
            *more,
            f"--run_dir={run_dir}",
        )
        assert json.loads((run_dir / "manifest.json").read_text())["step"] == 2
        return run_dir

    sft = train("sft", data, "sft")
    dpo = train("dpo", data, "dpo", f"--gin.INITIAL_CHECKPOINT_PATH='{sft}'")
    (prepared,) = (tmp_path / "cache").glob("data-preference-*/train")
    data.unlink()  # from here on there is only the cache
    again = train(
        "dpo",
        prepared,
        "again",
        f"--gin.INITIAL_CHECKPOINT_PATH='{sft}'",
        "--gin.EVAL_FRACTION=0.0",
    )
    assert again != dpo
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "say 3", "completion": "it is 3"}\n')
    for verb, flag in (("score", "--data"), ("generate", "--prompts")):
        out = tmp_path / f"{verb}.jsonl"
        light(
            "jaxalign",
            verb,
            f"--checkpoint={dpo}",
            f"{flag}={prompts}",
            f"--output={out}",
        )
        assert json.loads(out.read_text())["num_tokens"] > 0
