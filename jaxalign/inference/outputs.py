"""An output is used again only under the key of everything it depends on.

Beside a finished ``OUTPUT`` lies ``OUTPUT.settings.json``: what was asked for, and the
SHA-256 of what was written, so that settings that lie beside another file than theirs
speak for nothing. What is made in several stages: `jaxalign.pipelines.study`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from jaxalign import files, remote
from jaxalign.cluster import exclusive
from jaxalign.data import jsonl
from jaxalign.data.bad_rows import quoted
from jaxalign.files import file_sha256
from jaxalign.training import checkpoints

_log = logging.getLogger(__name__)

Key = Mapping[str, Any]


def _settings_path(path: Path) -> Path:
    return path.with_name(path.name + ".settings.json")


def kept(output: str | Path | None, asked: Key, **policies: str | None) -> int:
    """Looks, before anything is loaded, whether an output is there already.

    Of several processes the first looks, and all are told. None, or an address in a
    bucket, is made always.

    Returns:
      The lines of the output if it is finished under this key: what was asked for, and
      the policies of the checkpoints given by name; -1 if there is none.

    Raises:
      ValueError: when there is one that was made under another key, or by another hand.
    """
    if output is None or remote.is_remote(output):
        return -1
    path = Path(output)

    def look() -> int:
        if not path.exists():
            return -1
        beside = _settings_path(path)
        why = f"there is no {beside.name}"
        if beside.exists():
            noted = jsonl.read_json(beside)
            if not isinstance(noted, dict) or not isinstance(noted.get("asked"), dict):
                raise ValueError(
                    f"{beside} is damaged: it does not say what was asked for. Remove "
                    "it, and what it lies beside."
                )
            if noted.get("sha256") == file_sha256(path):
                key = {n: where and policy_key(where) for n, where in policies.items()}
                refuse_other(f"{path} was made", noted["asked"], {**asked, **key})
                return noted["lines"]
            why = "it was changed since"
        raise ValueError(
            f"{path} exists, and nothing says what it was made with ({why}). Move it "
            "away, or write to another place."
        )

    lines = exclusive.in_main(look)
    if lines >= 0:
        _log.info("%s was finished with these settings: nothing to do.", output)
    return lines


def input_key(path: str | Path) -> str:
    """The SHA-256 of an input of JSON Lines, here or in a bucket."""
    jsonl.check_format(path)
    return file_sha256(remote.copy(path))


def policy_key(checkpoint: str) -> str:
    """The fingerprint of the policy that a checkpoint or a run directory stands for."""
    return checkpoints.fingerprint(checkpoint)


def finish(path: Path, key: Key) -> None:
    """Writes down what ``path.partial`` was made with, before it takes its name."""
    partial = partial_path(path)
    with open(partial, "rb") as file:
        lines = sum(1 for _ in file)
    entries = {"asked": key, "lines": lines, "sha256": file_sha256(partial)}
    files.write_atomically(_settings_path(path), json.dumps(entries, indent=2) + "\n")
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
    """The entries of two keys that differ, in words; nothing if none does."""
    now = json.loads(json.dumps(now))  # as it comes back from a file
    other = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
    if not other:
        return ""
    then, since = (
        ", ".join(f"{k}={quoted(repr(key.get(k)), 80)}" for k in other)
        for key in (before, now)
    )
    return f"{then} (now {since})"


def partial_path(path: Path) -> Path:
    """Where an output is written until it is whole."""
    return path.with_name(path.name + ".partial")


def open_partial(path: Path, flags: int = 0) -> BinaryIO:
    """Opens ``path.partial`` to be written: a file, never through a link or a pipe."""
    partial = partial_path(path)
    try:
        flags |= os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        file = open(os.open(partial, flags, 0o666), "wb")
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
    kind = "a symbolic link" if partial.is_symlink() else "not a file"
    raise ValueError(
        f"{partial} is {kind}, and what is unfinished would be written through it. "
        "Remove it, or write to another place."
    )
