"""Reading run directories for a report; whatever is absent is listed, not fatal."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign import remote
from jaxalign.configs.names import did_you_mean
from jaxalign.training.metric_writers import CALIBRATION_FILE, read_metrics
from jaxalign.training.profiling import BREAKDOWN

# What is read here, of a run or of one in a folder of runs.
_READ = re.compile(
    r"(^|/)(metrics\.jsonl|config\.gin|samples/\d+\.jsonl"
    rf"|(manifest|results)\.json|{CALIBRATION_FILE}|{BREAKDOWN})$"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What one run directory holds."""

    path: Path
    name: str  # the shortest that no other run of the report has
    colour: int  # 0-9
    metrics: dict[str, tuple[np.ndarray, np.ndarray]]  # steps and values by name
    manifest: dict[str, Any]
    config: str  # ``config.gin``, verbatim
    samples: list[dict[str, Any]]  # of the last step that has any
    samples_step: int | None
    calibration: list[tuple[float, float, float]]  # value, target, count of each bin
    profile: dict[str, Any]  # where the time of a step went, if steps were traced
    missing: list[str]  # sentences for the reader


def local(run_dir: str | Path) -> Path:
    """The run directory, or a copy of what the report reads of a remote one."""
    return remote.copy_folder(run_dir, wanted=lambda n: bool(_READ.search(n)))


def find(run_dirs: Iterable[str | Path]) -> list[Path]:
    """The run directories meant: a folder of runs stands for the runs in it.

    Its runs come in the order of its ``results.json``, the others by name.
    """
    found: list[Path] = []
    for path in map(Path, run_dirs):
        if not path.is_dir():
            beside = [p.name for p in path.parent.glob("*/")]
            raise FileNotFoundError(
                f"{path}: expected a run directory, found none."
                f"{did_you_mean(path.name, beside)}"
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
    full = [path.resolve() for path in paths]
    for parts in range(1, 22):  # of the paths, until no two runs are called the same
        names = ["/".join(path.parts[-parts:]) for path in full]
        if len(set(names)) == len(set(full)):
            break
    return [
        _run(path, name, i % 10)
        for i, (path, name) in enumerate(zip(paths, names, strict=True))
    ]


def _run(path: Path, name: str, colour: int) -> Run:
    missing: list[str] = []
    metrics, config = {}, ""
    try:
        metrics = read_metrics(path)
        if not metrics:
            missing.append("no metrics.jsonl, or nothing in it yet")
    except (OSError, ValueError) as error:
        missing.append(f"metrics.jsonl unreadable: {error}")
    manifest = _json(path / "manifest.json", missing) or {}
    if (path / "config.gin").exists():
        config = (path / "config.gin").read_text(encoding="utf-8", errors="replace")
    else:
        missing.append("no config.gin")
    samples = _samples(path, missing)
    bins = _calibration(path, missing)
    profile = _json(path / BREAKDOWN, missing, required=False) or {}
    read = (metrics, manifest, config, *samples, bins, profile, missing)
    return Run(path, name, colour, *read)


def _json(path: Path, missing: list[str], required: bool = True) -> Any:
    if not path.exists():
        missing += [f"no {path.name}"] * required
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        missing.append(f"{path.name} unreadable: {error}")
        return None


def _samples(path: Path, missing: list[str]) -> tuple[list[dict[str, Any]], int | None]:
    """Rows of the last step that has samples, and that step."""
    files = (path / "samples").glob("*.jsonl")
    by_step = {int(file.stem): file for file in files if file.stem.isdecimal()}
    if not by_step:
        missing.append("no samples")
        return [], None
    rows, step = [], max(by_step)
    for raw in by_step[step].read_bytes().splitlines():
        try:
            row = json.loads(raw)
            str(row["prompt"]), str(row["response"])
            rows.append(row)
        except (ValueError, KeyError, TypeError):
            missing.append(f"a malformed line in samples/{step}.jsonl")
    return rows, step


def _calibration(path: Path, missing: list[str]) -> list[tuple[float, float, float]]:
    found = _json(path / CALIBRATION_FILE, missing, required=False)
    if found is None:
        return []
    names = ("value", "target", "count")
    try:
        bins = [tuple(float(b[name]) for name in names) for b in found["bins"]]
    except (KeyError, TypeError, ValueError) as error:
        what = f"{CALIBRATION_FILE} has no bins of {', '.join(names)}"
        missing.append(f"{what}: {error!r}")
        return []
    return [b for b in bins if np.isfinite(b).all() and b[2] > 0]


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
