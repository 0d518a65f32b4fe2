"""Answers kept in a file: a teacher that was paid once, or texts from elsewhere."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from jaxalign.files import file_sha256, json_sha256

_log = logging.getLogger(__name__)
_LONGEST_LINE = 1 << 24  # bytes


def padded(texts: Sequence[str], n: int) -> list[str | None]:
    """``n`` texts, None for those that are not there."""
    return [*texts, *[None] * (n - len(texts))]


class Recording:
    """A JSON Lines file of answers by request, which only grows; it need not exist.

    A line is ``{"key", "prompt", "settings", "response"}``. The key is a digest of
    prompt and settings; several lines of one key are several samples, in order.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self._lock = threading.Lock()
        self._known: dict[str, list[str]] = {}
        if self.path.exists():
            for line in self.path.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n"):  # a kill may have torn the last one
                    row = json.loads(line)
                    self._known.setdefault(row["key"], []).append(row["response"])

    def get(self, prompt: str, settings: Mapping[str, Any]) -> list[str]:
        """The answers there are to a request."""
        return list(self._known.get(_key(prompt, settings), []))

    def add(
        self, prompt: str, settings: Mapping[str, Any], responses: Sequence[str]
    ) -> None:
        """Keeps answers, on disk when this returns."""
        key = _key(prompt, settings)
        row = {"key": key, "prompt": prompt, "settings": dict(settings)}
        lines = "".join(json.dumps({**row, "response": r}) + "\n" for r in responses)
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
                _cut_torn_line(file)
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
            self._known.setdefault(key, []).extend(responses)


def _key(prompt: str, settings: Mapping[str, Any]) -> str:
    return json_sha256([prompt, dict(settings)])[:32]


def _cut_torn_line(file: BinaryIO) -> None:
    """Removes what a kill left of a last line, which would spoil the next one."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - _LONGEST_LINE))
    tail = file.read()
    file.truncate(end - len(tail) + tail.rfind(b"\n") + 1)


class RecordedTeacher:
    """Answers from a JSON Lines file with ``prompt`` and ``response`` in each row.

    The settings of a request do not matter: a prompt's n-th text is its n-th row. The
    file may be one of ``jaxalign generate`` or a `Recording`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise FileNotFoundError(f"No recorded answers at {self.path}.")
        self.fingerprint = f"recorded:{file_sha256(self.path)}"
        self._texts: dict[str, list[str]] = {}
        with open(self.path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                    prompt, response = row["prompt"], row["response"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{self.path}:{number}: expected a JSON object with 'prompt' "
                        f"and 'response' ({error})."
                    ) from error
                self._texts.setdefault(prompt, []).append(response)

    def generate(
        self, prompts: Sequence[str], *, n: int = 1, **settings: Any
    ) -> list[list[str | None]]:
        """The first ``n`` recorded texts of each prompt; None where there are fewer."""
        del settings
        found = [padded(self._texts.get(prompt, [])[:n], n) for prompt in prompts]
        missing = sum(texts.count(None) for texts in found)
        if missing:
            _log.warning(
                "%s lacks %d of %d texts.", self.path, missing, n * len(prompts)
            )
        return found
