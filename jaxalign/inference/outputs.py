"""An output is used again only under the key of everything it depends on.

Beside a finished ``OUTPUT`` lies ``OUTPUT.settings.json``: what was asked for, and the
SHA-256 of what was written, so that settings that lie beside another file than theirs
speak for nothing. The same key: the output is kept. Another: it is refused, and what
differs is named. What is made in several stages: `jaxalign.pipelines.study`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from jaxalign import files, remote
from jaxalign.cluster import exclusive
from jaxalign.data import jsonl
from jaxalign.files import file_sha256
from jaxalign.training import checkpoints

_log = logging.getLogger(__name__)

Key = Mapping[str, Any]


def settings_path(path: Path) -> Path:
    """Where the settings of an output lie."""
    return path.with_name(path.name + ".settings.json")


def finished(path: Path, key: Key) -> dict[str, Any] | None:
    """What was noted of a finished output, if it was made under this key.

    Args:
      path: the output.
      key: everything it depends on, as JSON.

    Returns:
      The entries given to `finish`, with ``"lines"``; None if there is no output yet.

    Raises:
      ValueError: when there is one that was made under another key, or by another hand.
    """
    if not path.exists():
        return None
    noted = _noted(path)
    if noted.get("sha256") != file_sha256(path):
        raise _unknown(path, "it was changed since")
    refuse_other(f"{path} was made", noted["asked"], key)
    return noted


def kept(output: str | Path | None, key: Callable[[], Key]) -> int:
    """Looks, before anything is loaded, whether an output is there already.

    Of several processes the first looks, and all are told.

    Args:
      output: where it will be; None, or an address in a bucket, is made always.
      key: makes the key, where there is something to compare it with.

    Returns:
      The lines of the output if it is finished under this key; -1 if there is none.

    Raises:
      ValueError: as `finished`, in every process.
    """
    if output is None or remote.is_remote(output):
        return -1
    path = Path(output)

    def look() -> int:
        noted = finished(path, key()) if path.exists() else None
        return -1 if noted is None else noted["lines"]

    lines = exclusive.in_main(look)
    if lines >= 0:
        _log.info("%s was finished with these settings: nothing to do.", output)
    return lines


def input_key(path: str | Path) -> str:
    """The SHA-256 of an input of JSON Lines, here or in a bucket.

    Raises:
      ValueError: when it is none, such as a folder.
      OSError: when it cannot be read.
    """
    jsonl.check_format(path)
    return file_sha256(remote.copy(path))


def policy_key(checkpoint: str) -> str:
    """The fingerprint of the policy that a checkpoint or a run directory stands for."""
    return checkpoints.fingerprint(checkpoint)


def finish(path: Path, key: Key, **noted: Any) -> None:
    """Writes down what an output was made with, before it takes its name.

    Args:
      path: the output; its content is still in ``path.partial``.
      key: everything it depends on.
      **noted: what else is worth keeping of how it was made.
    """
    partial = partial_path(path)
    with open(partial, "rb") as file:
        lines = sum(1 for _ in file)
    entries = {**noted, "asked": key, "lines": lines, "sha256": file_sha256(partial)}
    files.write_atomically(settings_path(path), json.dumps(entries, indent=2) + "\n")
    os.replace(partial, path)


def refuse_other(what: str, before: Key, now: Key) -> None:
    """Raises a ValueError that names each entry of two keys that differs.

    >>> refuse_other("a.jsonl was made", {"seed": 0}, {"seed": 1})
    Traceback (most recent call last):
        ...
    ValueError: a.jsonl was made with other settings: seed=0 (now seed=1). Ask for the \
same to keep it; delete it, or write to another place, for other settings.
    """
    other = differing(before, now)
    if other:
        raise ValueError(
            f"{what} with other settings: {other}. Ask for the same to keep it; delete "
            "it, or write to another place, for other settings."
        )


def differing(before: Key, now: Key) -> str:
    """The entries of two keys that differ, in words; nothing if none does.

    >>> differing({"seed": 0, "n": 2}, {"seed": 1, "n": 2})
    'seed=0 (now seed=1)'
    """
    now = json.loads(json.dumps(now))  # as it comes back from a file
    other = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
    if not other:
        return ""
    then = ", ".join(f"{k}={_cut(before.get(k))}" for k in other)
    return f"{then} (now {', '.join(f'{k}={_cut(now.get(k))}' for k in other)})"


def partial_path(path: Path) -> Path:
    """Where an output is written until it is whole."""
    return path.with_name(path.name + ".partial")


def open_partial(path: Path, flags: int = 0) -> BinaryIO:
    """Opens ``path.partial`` to be written; never through a link.

    Args:
      path: the output.
      flags: of `os.open`, beside ``O_WRONLY | O_CREAT``.

    Raises:
      ValueError: when it is a symbolic link, a pipe or something else than a file.
    """
    partial = partial_path(path)
    try:
        flags |= os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(partial, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        raise _no_file(partial) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _no_file(partial)
    return open(descriptor, "wb")


def _no_file(partial: Path) -> ValueError:
    kind = "a symbolic link" if partial.is_symlink() else "not a file"
    return ValueError(
        f"{partial} is {kind}, and what is unfinished would be written through it. "
        "Remove it, or write to another place."
    )


def _noted(path: Path) -> dict[str, Any]:
    """The settings beside an output that is there."""
    beside = settings_path(path)
    found = _read(beside)
    if found is None:
        raise _unknown(path, f"there is no {beside.name}")
    return found


def _unknown(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path} exists, and nothing says what it was made with ({why}). Move it "
        "away, or write to another place."
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("asked"), dict):
        raise ValueError(
            f"{path} is damaged: it does not say what was asked for. Remove it, and "
            "what it lies beside."
        )
    return found


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
