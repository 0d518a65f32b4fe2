"""A run directory's manifest, and what it takes to find its code again."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import threading
from pathlib import Path
from typing import Any

from jaxalign.data import jsonl
from jaxalign.files import write_atomically

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_NAME = "manifest.json"
_LOCK = threading.Lock()  # a checkpoint that is complete is told by another thread


def read_manifest(run_dir: str | Path) -> dict[str, Any]:
    """The manifest of a run, empty if it has none yet.

    Raises:
      ValueError: when it is not what was written.
    """
    path = Path(run_dir) / _NAME
    if not path.exists():
        return {}
    found = jsonl.read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it is no JSON object. Delete it.")
    return found


def update_manifest(run_dir: str | Path, **entries: Any) -> None:
    """Merges entries into ``manifest.json``."""
    with _LOCK:
        merged = {**read_manifest(run_dir), **entries}
        text = jsonl.dumps(merged, indent=2, sort_keys=True) + "\n"
        write_atomically(Path(run_dir) / _NAME, text)


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
