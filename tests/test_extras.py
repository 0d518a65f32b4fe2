"""Every extra alone, from a wheel, with the newest packages of the day, does its work.

No constraints: what a user gets who follows the README today. Each Python has one
environment with the package; an extra goes into an environment of its own over it,
where pip sees what is there and puts what it has to change in front of it. Slow: the
environments take minutes and gigabytes, one Python at a time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_run

from jaxalign.training import train as loop

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.13")
# A new process compiles all it runs: minutes on a busy machine.
MINUTES = 60


def call(*command: object, minutes: float = 30, **options: object) -> str:
    """The output of a command; all it said if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=minutes * MINUTES,
        **options,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def interpreter(version: str) -> str | None:
    """A Python of that version: this one, one on the path, or one of pyenv's."""
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    versions = Path(os.environ.get("PYENV_ROOT", "~/.pyenv"), "versions").expanduser()
    candidates = [shutil.which(f"python{version}")]
    candidates += sorted(map(str, versions.glob(f"{version}.*/bin/python")))
    for found in filter(None, candidates):
        with contextlib.suppress(OSError):
            if not subprocess.run([found, "-c", ""], capture_output=True).returncode:
                return found
    return None


class Environment:
    """A virtual environment with the package, and one with an extra over it.

    Args:
      folder: of the environment.
      over: the environment below.
    """

    def __init__(self, folder: Path, over: Environment | None = None):
        self.folder = folder
        self._pip = over._pip if over else folder / "bin" / "python"

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        (found,) = self.folder.glob("lib/python3*/site-packages")
        return found

    def install(self, requirement: str) -> None:
        pip = (self._pip, "-m", "pip", "--python", self.python, "install")
        # An index of this machine stays; constraints of this machine do not.
        environment = {**os.environ, "PIP_CONSTRAINT": ""}
        call(*pip, "-q", "--no-compile", requirement, env=environment)

    def over(self, folder: Path) -> Environment:
        """A new environment that sees all of this one."""
        call(self.python, "-m", "venv", "--without-pip", folder)
        new = Environment(folder, self)
        (new.site_packages / "below.pth").write_text(f"{self.site_packages}\n")
        return new

    def jaxalign(self, *arguments: object, **options: object) -> str:
        return call(self.python, "-m", "jaxalign.cli", *arguments, **options)


# What each extra is for, in an environment with a checkpoint and rows beside it.


def use_plan(environment: Environment, run_dir: Path, rows: Path) -> None:
    flags = ("--topology=v5e:2x2", "--mesh=1,4,1", "--steps=train")
    printed = environment.jaxalign("plan", "--gin_file=runs/sft.gin", *flags)
    assert "Cheapest that fits" in printed


def use_serve(environment: Environment, run_dir: Path, rows: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = (f"--checkpoint={run_dir}", f"--port={port}", "--model=m")
    command = [environment.python, "-m", "jaxalign.cli", "serve", *flags]
    body = json.dumps({"model": "m", "prompt": "say 3", "max_tokens": 3}).encode()
    url = f"http://127.0.0.1:{port}"
    kind = {"Content-Type": "application/json"}
    with subprocess.Popen(command, text=True, stderr=subprocess.PIPE) as process:
        try:
            while True:  # connections wait from the moment that the port is taken
                assert process.poll() is None, process.stderr.read()
                with contextlib.suppress(ConnectionRefusedError, urllib.error.URLError):
                    urllib.request.urlopen(f"{url}/health", timeout=300).close()
                    break
                time.sleep(1)
            request = urllib.request.Request(f"{url}/v1/completions", body, kind)
            with urllib.request.urlopen(request, timeout=900) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] > 0
            with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
                assert b"jaxalign_completion_tokens_total" in answer.read()
        finally:
            process.terminate()
            process.communicate(timeout=60)


def use_constraints(environment: Environment, run_dir: Path, rows: Path) -> None:
    output = rows.with_name("constrained.jsonl")
    flags = (f"--checkpoint={run_dir}", f"--prompts={rows}", f"--output={output}")
    rules = ("--regex=[abc]{3}", "--max_new_tokens=6")
    environment.jaxalign("generate", *flags, *rules)
    for line in output.read_text().splitlines():
        (text,) = json.loads(line).get("responses") or [json.loads(line)["response"]]
        assert len(text) == 3 and set(text) <= set("abc")


def use_plots(environment: Environment, run_dir: Path, rows: Path) -> None:
    code = (
        "from jaxalign.report import comparison\n"
        "figure, axes = comparison.pyplot().subplots()\n"
        "axes.plot([1, 2])\n"
        "print(comparison._figure(figure)[:8])"
    )
    assert call(environment.python, "-c", code).strip() == "<figure>"


def use_metrics(environment: Environment, run_dir: Path, rows: Path) -> None:
    flags = (f"--checkpoint={run_dir}", f"--data={rows}", "--max_new_tokens=4")
    printed = environment.jaxalign("eval", *flags, "--metrics=bleu,rouge")
    assert "bleu" in printed and "rouge" in printed


def use_remote(environment: Environment, run_dir: Path, rows: Path) -> None:
    import buckets

    with buckets.server() as make:
        bucket = make()
        buckets.put_folder(run_dir, f"{bucket}/run")
        output = rows.with_name("scores.jsonl")
        (checkpoint,) = (run_dir / "checkpoints").glob("[0-9]*")
        flags = (f"--data={rows}", f"--output={output}")
        source = f"--checkpoint={bucket}/run/checkpoints/{checkpoint.name}"
        here = {**os.environ, "JAXALIGN_REMOTE_DIR": str(rows.with_name("copies"))}
        environment.jaxalign("score", source, *flags, env=here)
    assert len(output.read_text().splitlines()) == len(rows.read_text().splitlines())


def use_beam(environment: Environment, run_dir: Path, rows: Path) -> None:
    printed = environment.jaxalign(
        "data",
        "--gin_file=runs/sft.gin",
        f"--gin.DATA='{rows}'",
        f"--gin.CACHE_DIR='{rows.with_name('cache')}'",
        "--gin.EVAL_FRACTION=0.0",
        "--beam_options=--runner=DirectRunner",
    )
    assert list(rows.with_name("cache").rglob("*.array_record")), printed


def use_teachers(environment: Environment, run_dir: Path, rows: Path) -> None:
    import fault_server

    with fault_server.serving(lambda body: fault_server.completion(["yes"])) as url:
        made = f"teachers.HTTPTeacher({url!r}, 'm', answers={f'{rows}.a'!r})"
        code = f"from jaxalign import teachers\nprint({made}.generate(['a']))"
        assert call(environment.python, "-c", code).strip() == "[['yes']]"


def use_tokenizers(environment: Environment, run_dir: Path, rows: Path) -> None:
    import foreign_folders

    folder = rows.with_name("tokenizer")
    foreign_folders.write_tokenizer("bpe", folder)
    code = (
        "from jaxalign.vocabularies import TokenizerVocabulary as Vocabulary\n"
        f"text = open({str(folder / 'tokenizer.json')!r}).read()\n"
        "vocabulary = Vocabulary(text, pad_id=0, eos_id=2, start_id=0)\n"
        "print(vocabulary.decode(vocabulary.encode('fox {1}')))"
    )
    assert call(environment.python, "-c", code).strip() == "fox {1}"


def use_zstd(environment: Environment, run_dir: Path, rows: Path) -> None:
    code = (
        "import zstandard; from jaxalign.data.jsonl import read_jsonl\n"
        f"rows, packed = {str(rows)!r}, {f'{rows}.zst'!r}\n"
        "with open(rows, 'rb') as a, open(packed, 'wb') as b:\n"
        "    zstandard.ZstdCompressor().copy_stream(a, b)\n"
        "print([*read_jsonl(packed)] == [*read_jsonl(rows)])"
    )
    assert call(environment.python, "-c", code).strip() == "True"


USES: dict[str, Callable[[Environment, Path, Path], None]] = {
    name.removeprefix("use_"): function
    for name, function in list(globals().items())
    if name.startswith("use_")
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: building leaves folders beside setup.py.
    source = folder / "source"
    source.mkdir()
    for name in ("jaxalign", "tasks", "gin_configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder)
    call(*pip, source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module", params=PYTHONS)
def base(request, tmp_path_factory, wheel) -> Iterator[Environment]:
    """An environment with the package and no extra."""
    python = interpreter(request.param)
    if python is None:
        pytest.fail(f"Python {request.param} is needed: on the path or in pyenv.")
    folder = tmp_path_factory.mktemp("base") / "environment"
    call(python, "-m", "venv", folder)
    environment = Environment(folder)
    environment.install(str(wheel))
    yield environment
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A checkpoint of this environment's."""
    folder = tmp_path_factory.mktemp("run")
    data = tiny_run.write_data(folder / "data.jsonl")
    loop.train(tiny_run.make_run(folder / "run", data, folder, "SFT", train_steps=1))
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("extra", USES)
def test_an_extra_alone_does_its_work(extra, base, wheel, run_dir, tmp_path):
    environment = base.over(tmp_path / "environment")
    rows = tiny_run.write_data(tmp_path / "rows.jsonl", 4)
    try:
        environment.install(f"{wheel}[{extra}]")
        USES[extra](environment, run_dir, rows)
    finally:
        shutil.rmtree(environment.folder)


def test_every_extra_has_its_command():
    """Those that name hardware, services or the tests' own tools apart."""
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **options: found.update(options))
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    others = {"test", "slow-tests", "docs", "gpu", "tpu", "wandb"}
    assert set(found["extras_require"]) - others == set(USES)
