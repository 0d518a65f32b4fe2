"""A run directory's manifest, and writing files so that a kill cannot tear them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_NAME = "manifest.json"


def write_atomically(path: str | Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_manifest(run_dir: str | Path) -> dict[str, Any]:
    """The manifest of a run, empty if it has none yet."""
    path = Path(run_dir) / _NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def update_manifest(run_dir: str | Path, **entries: Any) -> None:
    """Merges entries into ``manifest.json``."""
    merged = {**read_manifest(run_dir), **entries}
    write_atomically(
        Path(run_dir) / _NAME, json.dumps(merged, indent=2, sort_keys=True) + "\n"
    )


def last_metrics(run_dir: str | Path) -> dict[str, float]:
    """What a run logged last of its training, without the ``train/``."""
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in reversed(lines):
        found = {
            name.removeprefix("train/"): value
            for name, value in json.loads(line).items()
            if name.startswith("train/")
        }
        if found:
            return found
    return {}


def environment() -> dict[str, Any]:
    """Versions and revision: what it takes to find this code again."""
    versions = {"python": platform.python_version()}
    for name in ("jaxalign", *_PACKAGES):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {"versions": versions, "git_revision": _git_revision()}


def _git_revision() -> str | None:
    """The revision of the checkout this package is run from, if it is one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"],
            check=False,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except OSError:
        return None
    return done.stdout.strip() or None
