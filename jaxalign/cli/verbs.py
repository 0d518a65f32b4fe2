"""The verbs that are no function of the library: they read gin, list and print."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxalign import configs

# Of the flags of `Settings` that are not called as their macro is.
_MACROS = {"checkpoint": "INITIAL_CHECKPOINT_PATH", "steps": "TRAIN_STEPS"}
_MACROS |= {"seed": "RANDOM_SEED", "run_dir": "MODEL_DIR"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What everyone changes in a run: macros of its gin files as plain flags.

    Attributes:
      data: a file, 'task', 'task:file' or a prepared cache (DATA)
      checkpoint: where training starts, a run directory or checkpoint
        (INITIAL_CHECKPOINT_PATH)
      steps: how many in all (TRAIN_STEPS)
      batch_size: rows of a step, over all devices (BATCH_SIZE)
      learning_rate: the schedule's peak (LEARNING_RATE)
      seed: of initialisation, order and dropout (RANDOM_SEED)
      run_dir: where everything is written (MODEL_DIR)
    """

    data: str | None = None
    checkpoint: str | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    seed: int | None = None
    run_dir: str | None = None

    @classmethod
    def macros(cls) -> dict[str, str]:
        """The macro of each flag."""
        names = [field.name for field in dataclasses.fields(cls)]
        return {n: _MACROS.get(n, n.upper()) for n in names}

    def bindings(self) -> list[str]:
        pairs = zip(self.macros().values(), vars(self).values(), strict=True)
        return [f"{macro} = {value!r}" for macro, value in pairs if value is not None]


@dataclasses.dataclass(frozen=True)
class Job:
    """How processes find each other; see `jaxalign.cluster.distributed`.

    Attributes:
      distributed: auto: join the job of SLURM, MPI, GKE or Cloud TPU, if any; or off
      coordinator_address: HOST:PORT of process 0
      process_count: how many there are
      process_index: which one this is, from 0
      distributed_timeout: seconds to wait for the others: at the start, and for a step
    """

    distributed: str = "auto"
    coordinator_address: str | None = None
    process_count: int | None = None
    process_index: int | None = None
    distributed_timeout: int = 1800

    def join(self) -> None:
        """Joins the job that the flags or the environment describe."""
        from jaxalign.cluster import distributed

        distributed.start(distributed.Settings(*vars(self).values()))


def train(
    *,
    gin: configs.GinFlags,
    settings: Settings,
    dry_run: bool = False,
    profile_steps: str | None = None,
    job: Job,
) -> str | None:
    """Train a model, or go on where a killed run stopped.

    Args:
      dry_run: print the resolved configuration, parameters, batch and memory; stop
      profile_steps: FIRST,LAST: trace these steps for xprof, and for `jaxalign report`
    """
    first, _, last = (profile_steps or "").partition(",")
    try:
        traced = (int(first), int(last or first)) if profile_steps else None
    except ValueError:
        raise configs.ConfigError(
            f"--profile_steps={profile_steps}: expected two steps, FIRST,LAST."
        ) from None
    gin = _with(gin, settings, "train needs a run")
    job.join()
    configs.parse(gin.gin_files, gin.gin_bindings, gin.search_paths)
    from jaxalign.training import dry_run as plan_of
    from jaxalign.training import run as runs
    from jaxalign.training import train

    run = runs.from_gin()
    config = configs.config_str()
    if dry_run:
        return f"{config}\n{plan_of.describe(run)}"
    timeout = job.distributed_timeout
    run = dataclasses.replace(run, timeout=timeout, profile_steps=traced)
    train.train(run, config)
    return None


def train_with(
    objective: str,
    gin_files: Sequence[str | Path],
    settings: Settings,
    macros: Mapping[str, Any],
) -> None:
    """`train`, told in Python's values rather than in flags; see `jaxalign.train`."""
    flags = {macro: name for name, macro in Settings.macros().items()}
    for name in macros.keys() & flags.keys():
        raise configs.ConfigError(f"{name} is the argument {flags[name]}: use that.")
    own = objective if objective.endswith(".gin") else f"runs/{objective}.gin"
    files = [own, *map(str, gin_files)]
    bindings = [f"{name} = {_in_gin(value)}" for name, value in macros.items()]
    train(gin=configs.GinFlags(files, bindings, [], []), settings=settings, job=Job())


def _in_gin(value: Any) -> str:
    """A value as gin spells it."""
    is_reference = isinstance(value, str) and value.startswith(("@", "%"))
    return (
        value
        if is_reference
        else repr(str(value) if isinstance(value, Path) else value)
    )


def data(
    *, gin: configs.GinFlags, settings: Settings, beam_options: str | None = None
) -> str:
    """Check and prepare data; print a summary.

    Args:
      beam_options: tokenise JSONL and Parquet files on Apache Beam (jaxalign[beam])
        with these pipeline options: --beam_options='--direct_num_workers=4
        --direct_running_mode=multi_processing'
    """
    gin = _with(gin, settings, "data needs the run it is for")
    configs.parse(gin.gin_files, gin.gin_bindings, gin.search_paths)
    from jaxalign.training import dry_run
    from jaxalign.training import run as runs

    run = runs.from_gin()
    if beam_options is not None:
        dataset = dataclasses.replace(run.dataset, beam_options=beam_options)
        run = dataclasses.replace(run, dataset=dataset)
    return dry_run.describe_data(run)


def plan(
    *,
    gin: configs.GinFlags,
    topology: Sequence[str],
    mesh: Sequence[str] = (),
    steps: str = "train,score,decode",
    largest_batch: bool = False,
    output: str | None = None,
    settings: Settings,
) -> str:
    """Compile a run for TPU topologies on any machine; report what it needs.

    Args:
      topology: v5e:4x4, v5p:4x4x8, v5e:4x4:2 (two slices), gpu-h100:8 ...; repeatable
      mesh: DATA,FSDP,TENSOR sizes to compare; repeatable; default: MESH, or a few
      steps: what to compile, comma-separated
      largest_batch: also search the largest BATCH_SIZE of the cheapest mesh
      output: FILE.json to write, with FILE.html beside it
    """
    gin = _with(gin, settings, "plan needs a run")
    # The machine's own accelerator, if any, is not asked.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Shapes depend on neither text nor vocabulary, and both may be out of reach here.
    needless = ["VOCABULARY = None", "MIXTURE_OR_TASK_NAME = None", "DATA = 'planned'"]
    configs.parse(gin.gin_files, [*gin.gin_bindings, *needless], gin.search_paths)
    from jaxalign import planning
    from jaxalign.planning import hardware
    from jaxalign.training import run as runs

    found = planning.plan(
        runs.from_gin(),
        topology,
        meshes=[hardware.parse_mesh(text) for text in mesh],
        steps=steps.split(","),
        find_largest_batch=largest_batch,
    )
    if output:
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
        path.with_suffix(".html").write_text(planning.html(found, "jaxalign plan"))
    return planning.table(found)


def tasks() -> str:
    """List the data sets and the gin files."""
    from jaxalign import prepare

    lines = ["Data sets, for --data (alone, or as name:exported_file):"]
    for task in prepare.list_tasks():
        lines.append(f"  {task['name']:<16}{task['doc']}")
        lines.append(f"  {'':<16}schemas: {', '.join(task['schemas'])}")
        for option, default in task["options"].items():
            lines.append(f"  {'':<16}TASK_OPTIONS {option!r}: {default!r}")
    return "\n".join([*lines, "\nGin files:", *(f"  {n}" for n in configs.available())])


def report(run_dir: Sequence[str], *, output: str | None = None) -> str:
    """Write one self-contained HTML page about runs.

    Args:
      run_dir: a run, or a folder of runs; here or in a bucket
      output: HTML file; default: report.html in RUN_DIR, or of several in the folder
        that holds them all
    """
    from jaxalign import report

    return str(report.write_report(run_dir, output))


def completion(shell: Literal["bash", "zsh"]) -> str:
    """Print a script for the shell: source <(jaxalign completion bash), or zsh.

    Args:
      shell: which shell it is for
    """
    from jaxalign.cli import completion, table

    return completion.script(shell, table.known_verbs())


def _with(gin: configs.GinFlags, settings: Settings, needs: str) -> configs.GinFlags:
    """The plain flags among the bindings; mistakes are told before JAX is imported."""
    if not gin.gin_files:
        raise configs.ConfigError(
            f"{needs}: --gin_file=runs/sft.gin, or dpo, kto, dro_v; `jaxalign tasks` "
            "lists all."
        )
    bindings = [*gin.gin_bindings, *settings.bindings()]
    macros = configs.check(gin.gin_files, bindings, gin.search_paths)
    data = macros.get("DATA")
    # A module of the user's may register more names.
    if isinstance(data, str) and macros.get("MIXTURE_OR_TASK_MODULE") is None:
        _check_task(data)
    return gin._replace(gin_bindings=bindings)


def _check_task(data: str) -> None:
    """Refuses a word that is neither a file nor one of the packaged tasks."""
    folder = Path(str(importlib.resources.files("jaxalign.tasks")))
    sources = [path.read_text(encoding="utf-8") for path in folder.glob("*.py")]
    known = re.findall(r'^add_task\(\s*"(\w+)"', "\n".join(sources), re.M)
    if data.isidentifier() and data not in known and not os.path.exists(data):
        near = configs.nearest(data, known, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else f"; tasks: {sorted(known)}"
        raise configs.ConfigError(
            f"No file, task or seqio task is called {data!r}{hint}. A seqio task of "
            "your own needs its module or file in MIXTURE_OR_TASK_MODULE."
        )
