"""A training run on the embedded data, as one stage of something larger.

Every stage is an ordinary ``jaxalign train`` run of a packaged gin file; the command
that repeats it by itself is printed before it starts. Its folder says what it was
trained with (`jaxalign.inference.outputs`): under other settings it is refused.
"""

from __future__ import annotations

import ast
import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path

from jaxalign import configs, world
from jaxalign.data.cache import file_sha256
from jaxalign.inference import outputs
from jaxalign.training import checkpoints, run_directory
from jaxalign.training import run as runs
from jaxalign.training import train as loop

# Settings that change where things lie, not what is learnt.
_PLACES = ("CACHE_DIR", "INITIAL_CHECKPOINT_PATH", "DATA", "EVAL_DATA")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run.

    Attributes:
      name: of the run's folder.
      schema: of the embedded data (`jaxalign.world.SCHEMAS`).
      rows: training examples.
      settings: gin macros and their values, as a gin file spells them.
      gin_file: ``runs/<gin_file>.gin``; the stage's name if empty.
    """

    name: str
    schema: str
    rows: int
    settings: Mapping[str, str]
    gin_file: str = ""


def train(
    folder: Path,
    stage: Stage,
    *,
    data: Path,
    seed: int = 0,
    data_seed: int | None = None,
    quiet: bool = False,
) -> Path:
    """Trains a stage in ``folder / stage.name``, or goes on where it stopped.

    Args:
      folder: of the stages' run directories.
      stage: what to train.
      data: folder of the data sets, which are written there if they are missing.
      seed: of the run.
      data_seed: of the data; `seed` if None.
      quiet: print no command.

    Returns:
      The run directory.

    Raises:
      ValueError: when the folder was begun with other settings, naming them.
    """
    macros = _macros(stage, data, seed, data_seed)
    gin_file = f"runs/{stage.gin_file or stage.name}.gin"
    directory = str(folder / stage.name)
    flags = [f"--gin.{name}={value}" for name, value in macros.items()]
    command = ["jaxalign", "train", f"--gin_file={gin_file}", *flags]
    if not quiet:
        text = shlex.join([*command, f"--run_dir={directory}"])
        print(f"\n$ {text}", flush=True)
    key = _key(macros, gin_file)
    outputs.check_folder(Path(directory), key)
    macros["MODEL_DIR"] = repr(directory)
    configs.parse([gin_file], [f"{name} = {value}" for name, value in macros.items()])
    text = configs.config_str()
    if not run_directory.read_manifest(directory):
        outputs.note_folder(Path(directory), key)  # what is unfinished has a key too
    loop.train(runs.from_gin(), text)
    outputs.note_folder(Path(directory), key)
    return Path(directory)


def check(
    folder: Path,
    stage: Stage,
    *,
    data: Path,
    seed: int = 0,
    data_seed: int | None = None,
) -> None:
    """Refuses what `train` would refuse, of a stage whose start may not exist yet."""
    macros = _macros(stage, data, seed, data_seed)
    key = _key(macros, f"runs/{stage.gin_file or stage.name}.gin")
    outputs.check_folder(folder / stage.name, key)


def _macros(
    stage: Stage, data: Path, seed: int, data_seed: int | None
) -> dict[str, str]:
    """What a stage sets; its data are written if they are missing."""
    data_seed = seed if data_seed is None else data_seed
    paths = {}
    for macro, split, size in (
        ("DATA", "train", stage.rows),
        ("EVAL_DATA", "validation", 400),
    ):
        paths[macro] = data / f"{stage.schema}.{split}.{size}.{data_seed}.jsonl"
        world.write_dataset(paths[macro], stage.schema, split, size, data_seed)
    return {
        **{name: repr(str(path)) for name, path in paths.items()},
        "CACHE_DIR": repr(str(data / "cache")),
        "RANDOM_SEED": str(seed),
        **stage.settings,
    }


def _key(macros: Mapping[str, str], gin_file: str) -> dict[str, str]:
    """Everything a stage's parameters depend on, with contents in place of paths."""
    key = {name: value for name, value in macros.items() if name not in _PLACES}
    key["gin_file"] = gin_file
    for name in ("DATA", "EVAL_DATA"):
        key[name] = file_sha256(Path(ast.literal_eval(macros[name])))
    start = macros.get("INITIAL_CHECKPOINT_PATH")
    if start is not None:
        meta = checkpoints.read_meta(ast.literal_eval(start))
        key["INITIAL_CHECKPOINT_PATH"] = meta["policy_fingerprint"]
    return key


# The embedded data's lengths in bytes, and a schedule that suits runs of minutes.
COMMON = {
    "TASK_FEATURE_LENGTHS": "{'inputs': 48, 'targets': 56}",
    "PACKING": "1",
    "EVAL_PERIOD": "100",
    "EVAL_STEPS": "4",
    "CHECKPOINT_PERIOD": "1000",
    "SCHEDULE": "@schedules.cosine()",
    "WARMUP_STEPS": "10",
    "TRAIN_STEPS": "100",
    "LEARNING_RATE": "3e-3",
}
SFT = Stage(
    "sft",
    "supervised",
    8000,
    {
        **COMMON,
        "TRAIN_STEPS": "400",
        "WARMUP_STEPS": "40",
        "BATCH_SIZE": "64",
        "LEARNING_RATE": "4e-2",
    },
)
