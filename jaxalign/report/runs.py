"""Reading run directories for a report; whatever is absent is listed, not fatal."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign import remote
from jaxalign.training.metric_writers import CALIBRATION_FILE, read_metrics
from jaxalign.training.profiling import BREAKDOWN

# What is read here, of a run or of one in a folder of runs.
_READ = re.compile(
    r"(^|/)(metrics\.jsonl|config\.gin|samples/\d+\.jsonl"
    rf"|(manifest|results)\.json|{CALIBRATION_FILE}|{BREAKDOWN})$"
)
_MARKS = ("metrics.jsonl", "config.gin", "manifest.json")


@dataclasses.dataclass
class Run:
    """What one run directory holds."""

    path: Path  # the directory
    name: str = ""  # its shortest name that no other run of the report has
    colour: int = 0  # 0-9
    # ``{name: (steps, values)}``, see `read_metrics`
    metrics: dict[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(
        default_factory=dict
    )
    # ``manifest.json``.
    manifest: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: str = ""  # ``config.gin``, verbatim.
    # of the last step that has any
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    samples_step: int | None = None  # that step
    # bins ``(value, target, count)`` of the value network
    calibration: list[tuple[float, float, float]] = dataclasses.field(
        default_factory=list
    )
    # where the time of a step went, if steps were traced
    profile: dict[str, Any] = dataclasses.field(default_factory=dict)
    # sentences for the reader
    missing: list[str] = dataclasses.field(default_factory=list)


def local(run_dir: str | Path) -> Path:
    """The run directory, or a copy of what the report reads of a remote one.

    Raises:
      FileNotFoundError: for a remote path without a run.
    """
    return remote.copy_folder(run_dir, wanted=lambda n: bool(_READ.search(n)))


def find(run_dirs: Iterable[str | Path]) -> list[Path]:
    """The run directories meant: a folder of runs stands for the runs in it.

    Its runs come in the order of its ``results.json``, the others by name.

    Raises:
      FileNotFoundError: for a path that does not exist, with the nearest that does.
    """
    found: list[Path] = []
    for path in map(Path, run_dirs):
        if not path.is_dir():
            siblings = path.parent.iterdir() if path.parent.is_dir() else []
            names = sorted(p.name for p in siblings if p.is_dir())
            near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4)
            hint = f" Nearest: {', '.join(near)}." if near else ""
            raise FileNotFoundError(
                f"{path}: expected a run directory, found none.{hint}"
            )
        order = [name for _, rows in results([path]) for name in rows]
        inside = sorted(
            (p.parent for p in path.glob("*/metrics.jsonl")),
            key=lambda p: (order.index(p.name) if p.name in order else 99, p.name),
        )
        is_run = any((path / mark).exists() for mark in ("metrics.jsonl", "config.gin"))
        found += inside if inside and not is_run else [path]
    return list(dict.fromkeys(found))


def load(paths: Sequence[Path]) -> list[Run]:
    """Reads every run, named and coloured."""
    names = _names([path.resolve() for path in paths])
    runs = []
    for i, (path, name) in enumerate(zip(paths, names, strict=True)):
        run = Run(path, name, i % 10)
        _load_metrics(run)
        run.manifest = _load_json(run, "manifest.json") or {}
        config = path / "config.gin"
        if config.exists():
            run.config = config.read_text(encoding="utf-8", errors="replace")
        else:
            run.missing.append("no config.gin")
        _load_samples(run)
        _load_calibration(run)
        run.profile = _load_json(run, BREAKDOWN, required=False) or {}
        runs.append(run)
    return runs


def _names(paths: Sequence[Path]) -> list[str]:
    parts = 1
    while True:
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(set(paths)) or parts > 20:
            return names
        parts += 1


def _load_metrics(run: Run) -> None:
    try:
        run.metrics = read_metrics(run.path)
    except (OSError, ValueError) as error:
        run.missing.append(f"metrics.jsonl unreadable: {error}")
        return
    if not run.metrics:
        run.missing.append("no metrics.jsonl, or nothing in it yet")


def _load_json(run: Run, name: str, required: bool = True) -> Any:
    path = run.path / name
    if not path.exists():
        if required:
            run.missing.append(f"no {name}")
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        run.missing.append(f"{name} unreadable: {error}")
        return None


def _load_samples(run: Run) -> None:
    by_step = {
        int(path.stem): path
        for path in (run.path / "samples").glob("*.jsonl")
        if path.stem.isdecimal()
    }
    if not by_step:
        run.missing.append("no samples")
        return
    run.samples_step = max(by_step)
    for raw in by_step[run.samples_step].read_bytes().splitlines():
        try:
            row = json.loads(raw)
            str(row["prompt"]), str(row["response"])
        except (ValueError, KeyError, TypeError):
            run.missing.append(f"a malformed line in samples/{run.samples_step}.jsonl")
            continue
        run.samples.append(row)


def _load_calibration(run: Run) -> None:
    found = _load_json(run, CALIBRATION_FILE, required=False)
    if found is None:
        return
    try:
        bins = [
            (float(b["value"]), float(b["target"]), float(b["count"]))
            for b in found["bins"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        run.missing.append(
            f"{CALIBRATION_FILE} has no bins of value, target, count: {error!r}"
        )
        return
    run.calibration = [b for b in bins if np.isfinite(b).all() and b[2] > 0]


def results(folders: Iterable[Path]) -> list[tuple[Path, dict[str, dict[str, Any]]]]:
    """Every ``results.json`` in the folders: ``(path, {row: {column: value}})``."""
    out = []
    for folder in dict.fromkeys(Path(os.path.abspath(f)) for f in folders):
        path = folder / "results.json"
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(table, dict):
            rows = {k: v for k, v in table.items() if isinstance(v, dict)}
            if rows:
                out.append((path, rows))
    return out


def gin_bindings(config: str) -> dict[str, str]:
    """The ``name = value`` bindings of a gin file, values on one line each.

    >>> gin_bindings("# note\\nTRAIN_STEPS = 10\\nf.x = \\\\\\n    [1,\\n     2]\\n")
    {'TRAIN_STEPS': '10', 'f.x': '[1, 2]'}
    """
    found: dict[str, str] = {}
    current = None
    for line in config.splitlines():
        start = re.match(r"([A-Za-z_][\w./]*)\s*=\s*(.*)", line)
        if start:
            current = start[1]
            found[current] = start[2].rstrip("\\").strip()
        elif current and line[:1].isspace() and line.strip():
            more = line.strip().rstrip("\\").strip()
            found[current] = f"{found[current]} {more}".strip()
        else:
            current = None
    return found
