"""Checkpoints of other projects, described as if they were jaxalign's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxalign import models, remote
from jaxalign.interop.opening import Opened, open_foreign
from jaxalign.training import remote_checkpoints


def opened(path: str | Path) -> Opened | None:
    """The checkpoint of another project at a path; None where it is jaxalign's own."""
    if remote.is_remote(path):
        if remote.holds(str(path), "meta/metadata"):
            return None
    elif any(
        (Path(path) / own).is_dir() for own in (remote_checkpoints.FOLDER, "meta")
    ):
        return None
    return open_foreign(path)


def meta(found: Opened) -> dict[str, Any]:
    """What ``meta`` says of such a checkpoint; all its parameters are read for it."""
    files = (p for p in found.path.rglob("*") if p.is_file())
    signature = sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    told = about(found)
    told["networks"][found.name]["fingerprint"] = _fingerprint(found, tuple(signature))
    return told


def about(found: Opened) -> dict[str, Any]:
    """The same but for the fingerprint; nothing of the parameters is read."""
    vocabulary = found.foreign.vocabulary
    return {
        "format": found.format,
        "step": found.step or 0,
        "main": found.name,
        "networks": {found.name: models.stored(found.model())},
        "vocabulary": vocabulary and vocabulary.to_json(),
        "vocabulary_fingerprint": vocabulary and vocabulary.fingerprint,
        "parents": {},
    }


_known: dict[tuple[Any, ...], str] = {}


def _fingerprint(found: Opened, signature: tuple[Any, ...]) -> str:
    """By the files as they are: a process asks more than once."""
    if signature not in _known:
        _known[signature] = found.fingerprint()
    return _known[signature]
