"""A study: stages that know what they depend on, in one folder.

A stage is a function that writes a file, or a training run. Its *key* is all that its
output depends on: the function's name and source, the content of its input files and
runs, its numbers. ``manifest.json`` keeps every stage's key beside a digest of what
it made, so the same program started again

* keeps a finished stage whose key is the same, whatever randomness made its output;
* goes on with one that was killed;
* refuses another key, naming what differs, unless the stage is to be made again
  (``redo``), and with it each later one whose inputs come out different.

    with Study("runs/mine", redo=("judged.jsonl",)) as study:
        samples = study.file("samples.jsonl", sample, checkpoint=Path("runs/sft"), n=4)
        judged = study.lines("judged.jsonl", judge, rows(samples))
        policy = study.train("dpo", ["runs/dpo.gin"], DATA=judged, TRAIN_STEPS=100)
        study.page("Mine")

Of several processes the first decides, and makes all but training runs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from jaxalign import remote, user_code
from jaxalign.cluster import exclusive
from jaxalign.data import jsonl
from jaxalign.files import file_sha256, json_sha256
from jaxalign.inference import outputs
from jaxalign.training import checkpoints, run_directory
from jaxalign.training.description import describe


class Study:
    """Stages in a folder, each made once; one process writes there at a time.

    Args:
      run_dir: the folder; made if it is missing, and locked while the study is open.
      redo: stages to make again, by name. Later ones are made again too where their
        inputs come out different; after a kill, without being asked a second time.
      say: told one line a stage; `print` by default, None for silence.

    Raises:
      HeldError: when another process has it open.
      ValueError: when `redo` names a stage that the folder does not have, with the
        nearest.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> def write(output, text):
    ...     output.write_text(text)
    >>> with Study(folder, say=None) as study:
    ...     study.file("hello.txt", write, text="hello").read_text()
    'hello'
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        redo: Sequence[str] = (),
        say: Callable[[str], None] | None = print,
    ):
        self.folder = remote.local_only(run_dir, "--run_dir of several runs").absolute()
        self.stages: dict[str, dict[str, Any]] = {}
        self._redo = set(redo)
        self._say = say if say and jax.process_index() == 0 else (lambda line: None)
        self._seen: list[str] = []
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Study:
        with contextlib.ExitStack() as stack:
            stack.enter_context(exclusive.holding(self.folder, "folder of a study"))
            exclusive.in_main(self._read)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self._open.close()

    def _read(self) -> None:
        self.stages = run_directory.read_manifest(self.folder).get("stages", {})
        for name in self._redo - set(self.stages):
            hint = user_code.hint(name, self.stages) or f" It has {list(self.stages)}."
            raise ValueError(f"{self.folder} has no stage {name!r} to redo.{hint}")

    # ---- The three kinds of stages --------------------------------------------------

    def file(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        execution: Mapping[str, Any] | None = None,
        all_processes: bool = False,
        **inputs: Any,
    ) -> Path:
        """A file written by ``function(output=path, **inputs)``.

        Args:
          name: of the file in the study's folder; it may hold slashes.
          function: writes the file whole, or resumes what a killed call of its own
            left. Its source is part of the key, that of what it calls is not.
          execution: further arguments of it, which change nothing of what is written.
          all_processes: it is called by every process of a job, not by the first.
          **inputs: a `Path` counts by the content of its file or run, anything else
            as JSON.

        Raises:
          ValueError: when the stage was made with other inputs, or when its output is
            no longer what was made.
        """

        def make(path: Path) -> None:
            function(output=path, **inputs, **(execution or {}))

        key = _function_key(function)
        return self._stage(name, key, inputs, make, all_processes)

    def lines(
        self,
        name: str,
        function: Callable[..., Sequence[Any]],
        items: Sequence[Any],
        *,
        batch: int = 64,
        **inputs: Any,
    ) -> Path:
        """A JSON Lines file that grows by batches, and goes on after a kill.

        What is written stays: a judge that never says the same twice resumes without
        being asked again.

        Args:
          name: of the file.
          function: ``function(items, **inputs)`` returns one JSON value an item.
          items: JSON values; they are part of the key.
          batch: items a call.
          **inputs: as in `file`.
        """

        def make(path: Path) -> None:
            partial = outputs.partial_path(path)
            starts = range(_keep_batches(partial, batch), len(items), batch)
            with open(partial, "a", encoding="utf-8") as file:
                for start in tqdm(starts, name, disable=None, leave=False):
                    asked = items[start : start + batch]
                    found = function(asked, **inputs)
                    if len(found) != len(asked):
                        raise ValueError(
                            f"The stage {name!r} gave {len(found)} values for "
                            f"{len(asked)} items: expected one an item."
                        )
                    file.writelines(map(jsonl.json_line, found))
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(partial, path)

        counted = {**inputs, "items": json_sha256(list(items)), "batch": batch}
        return self._stage(name, _function_key(function), counted, make)

    def train(
        self,
        name: str,
        gin_files: Sequence[str],
        *,
        bindings: Sequence[str] = (),
        search_paths: Sequence[str | Path] = (),
        execution: Mapping[str, Any] | None = None,
        **macros: Any,
    ) -> Path:
        """A training run in ``folder / name``: ``jaxalign train`` with these settings.

        The command that makes it by itself is told before it begins.

        Args:
          name: of the run directory, which is returned.
          gin_files: as in ``--gin_file``.
          bindings: ``"NAME = VALUE"`` as gin spells it, before `macros`.
          search_paths: folders to look for gin files in.
          execution: macros that change nothing of what is learnt.
          **macros: values of gin macros; a `Path` counts by content.
        """
        from jaxalign import configs
        from jaxalign.training import run as runs
        from jaxalign.training import train as loop

        given = {**macros, **(execution or {})}
        values = {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
        spelt = [*bindings, *(f"{k} = {v!r}" for k, v in values.items())]
        place = f"MODEL_DIR = {str(self.folder / name)!r}"
        read = configs.parse(gin_files, [*spelt, place], search_paths)

        def make(path: Path) -> None:
            flags = [f"--gin_file={file}" for file in gin_files]
            flags += ["--gin." + b.replace(" = ", "=", 1) for b in spelt]
            command = ["jaxalign", "train", *flags, f"--run_dir={path}"]
            self._say(f"$ {shlex.join(command)}")
            run = runs.from_gin()  # which may take the network from the checkpoint
            loop.train(run, configs.config_str())

        # In order: of a user's own files a later one overrides an earlier one.
        key: dict[str, Any] = {"gin files": [[p.name, file_sha256(p)] for p in read]}
        key |= {"bindings": list(bindings)} if bindings else {}
        return self._stage(name, key, macros, make, all_processes=True)

    # ---- What a stage is ------------------------------------------------------------

    def _stage(
        self,
        name: str,
        key: Mapping[str, Any],
        inputs: Mapping[str, Any],
        make: Callable[[Path], None],
        all_processes: bool = False,
    ) -> Path:
        """Makes a stage unless it is kept, and records what it made."""
        path = self.folder / name
        if exclusive.in_main(lambda: self._is_kept(name, path, key, inputs)):
            return path
        started = time.monotonic()
        if all_processes:
            make(path)
        else:
            exclusive.in_main(lambda: make(path))
        seconds = round(time.monotonic() - started, 3)

        def finish() -> None:
            if not path.exists():
                raise ValueError(
                    f"The stage {name!r} ended without writing {path}: its "
                    "function must write the path it is given as `output`."
                )
            key = self.stages[name]["key"]
            made = {"output": content(path), "seconds": seconds}
            self._record(name, key=key, status="finished", **made)

        exclusive.in_main(finish)
        self._say(f"[{len(self._seen)}] {name}: made in {seconds:.1f} s")
        return path

    def _is_kept(
        self, name: str, path: Path, key: Mapping[str, Any], inputs: Mapping[str, Any]
    ) -> bool:
        """Whether a stage is there already; if not, it is recorded as running."""
        saved, key = self.stages.get(name, {}), dict(key)
        for k, value in inputs.items():
            found = _identity(value)
            if _has_key(value):  # its entries under their own names
                key |= {f"{k}: {part}": v for part, v in found.items()}
            else:
                key[k] = found
        key = json.loads(json.dumps(key))  # as it comes back from the manifest
        if name in self._seen:  # asked for twice, as two runs share their data
            if saved.get("key") == key:
                return True
            raise ValueError(f"Two stages of this study are called {name!r}.")
        self._seen.append(name)
        if name in self._redo:  # later ones too, where their inputs come out different
            for entry in self.stages.values():
                entry["stale"] = entry["number"] > saved["number"]
            run_directory.update_manifest(self.folder, stages=self.stages)
        follows = saved.get("stale", False) and saved["key"] != key
        there = _on_disk(path)
        if name in self._redo or follows or (saved and not there):
            for old in there:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            saved = {}
        elif not saved and there:
            raise ValueError(
                f"{path} exists, and no manifest says what it was made with. Move it "
                "away, or give another folder."
            )
        elif saved and saved["key"] != key:
            raise ValueError(
                f"The stage {name!r} in {self.folder} was made with other inputs: "
                f"{outputs.differing(saved['key'], key)}. Give another folder, the "
                f"inputs of then, or --redo={name} to make it again, and what follows "
                "from it."
            )
        if saved.get("status") == "finished":
            if saved["output"] != content(path):
                raise ValueError(
                    f"{path} is no longer what the stage {name!r} made. Put it back, "
                    f"or give --redo={name} to make it again."
                )
            self._say(f"[{len(self._seen)}] {name}: kept")
            return True
        path.parent.mkdir(parents=True, exist_ok=True)
        self._record(name, key=key, status="running")
        self._say(f"[{len(self._seen)}] {name}: {'goes on' if saved else 'begins'}")
        return False

    def _record(self, name: str, **entry: Any) -> None:
        self.stages[name] = {**entry, "number": len(self._seen)}
        run_directory.update_manifest(self.folder, stages=self.stages)

    # ---- One page -------------------------------------------------------------------

    def page(self, title: str, body: str = "") -> Path:
        """Writes ``study.html``: `body`, every stage, and the curves of its runs."""
        from jaxalign.report import study as pages

        if jax.process_index() > 0:
            return self.folder / "study.html"
        stages = {name: self.stages[name] for name in self._seen}
        return pages.write(self.folder, title, stages, body)


def content(path: str | Path) -> str:
    """What a path holds: SHA-256 of a file, the parameters' of a run or checkpoint.

    Raises:
      ValueError: when there is nothing, or a run without parameters.
    """
    if remote.is_remote(path):
        return outputs.policy_key(str(path))
    path = Path(path)
    if path.is_file():
        return file_sha256(path)
    if (path / "meta").is_dir():  # one checkpoint of a run
        return checkpoints.fingerprint(path, None)
    fingerprint = run_directory.read_manifest(path).get("params_fingerprint")
    if fingerprint is None:
        raise ValueError(
            f"{path} is neither a file nor the directory of a run that has saved its "
            "parameters."
        )
    return str(fingerprint)


def _function_key(function: Callable[..., Any]) -> dict[str, Any]:
    """A function's name, the digest of its source, and the values that it holds.

    What knows better what it depends on says so by an attribute ``fingerprint``. The
    names are none that an argument can have.
    """
    if isinstance(function, functools.partial):
        held: Any = {"args": function.args, **function.keywords}
        return _function_key(function.func) | {"partial's arguments": describe(held)}
    kind = function if hasattr(function, "__qualname__") else type(function)
    key: dict[str, Any] = {"function's name": f"{kind.__module__}:{kind.__qualname__}"}
    if hasattr(function, "fingerprint"):
        return key | {"function's fingerprint": function.fingerprint}
    with contextlib.suppress(OSError, TypeError):  # typed at a prompt, or built in
        key["function's source"] = json_sha256(inspect.getsource(kind))
    held = vars(function) if kind is not function else {}
    if inspect.isfunction(function):
        held = inspect.getclosurevars(function).nonlocals
    if held:
        key["function's values"] = describe(held)
    return key


def _identity(value: Any) -> Any:
    """What an input counts by in a key."""
    if isinstance(value, Path) or isinstance(value, str) and remote.is_remote(value):
        return content(value)
    if isinstance(value, list | tuple):
        return [_identity(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _identity(v) for k, v in value.items()}
    return _function_key(value) if _has_key(value) else value


def _has_key(value: Any) -> bool:
    """Whether it is a function, or an object that says what it depends on."""
    return callable(value) or hasattr(value, "fingerprint")


def _on_disk(path: Path) -> list[Path]:
    """What there is of a stage, whole or not; if nothing, any key is a new one."""
    every = [path, *path.parent.glob(f"{path.name}.partial*")]
    return [p for p in every if p.exists()]


def _keep_batches(path: Path, batch: int) -> int:
    """Cuts a file after its last whole batch of lines; how many lines are left."""
    if not path.exists():
        return 0
    with open(path, "r+b") as file:
        lines = [line for line in file if line.endswith(b"\n")]
        kept = lines[: len(lines) // batch * batch]
        file.truncate(sum(map(len, kept)))
    return len(kept)
