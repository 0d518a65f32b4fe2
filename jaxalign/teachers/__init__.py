"""Teachers: prompts in, texts out, in batches, with None where a text could not be had.

One string names a teacher on the command line and in gin:

* ``runs/sft``: a checkpoint of this library;
* ``http://127.0.0.1:8000/v1#model``: any OpenAI-compatible server;
* ``recorded:answers.jsonl``: answers that are there already.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from jaxalign import remote
from jaxalign.teachers.checkpoint import CheckpointTeacher
from jaxalign.teachers.http import HTTPTeacher
from jaxalign.teachers.recorded import RecordedTeacher

__all__ = ["CheckpointTeacher", "HTTPTeacher", "RecordedTeacher", "Teacher", "resolve"]


class Teacher(Protocol):
    """Anything that continues prompts.

    Attributes:
      fingerprint: says what its texts depend on; part of a study's keys.
    """

    fingerprint: str

    def generate(
        self,
        prompts: Sequence[str],
        *,
        n: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 128,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[list[str | None]]:
        """``n`` texts for each prompt; None for one that could not be had."""


def resolve(text: str) -> Teacher:
    """The teacher that a string names; see the module's documentation.

    Raises:
      ValueError: for an address without a model.
      FileNotFoundError: for a checkpoint or recording that is not there.

    >>> resolve("http://127.0.0.1:8000/v1#flan").model
    'flan'
    """
    if text.startswith("recorded:"):
        return RecordedTeacher(text.removeprefix("recorded:"))
    if text.startswith(("http://", "https://")):
        url, _, model = text.partition("#")
        if not model:
            raise ValueError(
                f"The teacher {text!r} names no model: expected ADDRESS#MODEL, such as "
                "http://127.0.0.1:8000/v1#flan-t5-xl."
            )
        return HTTPTeacher(url, model)
    if not remote.is_remote(text) and not Path(text).expanduser().is_dir():
        raise FileNotFoundError(
            f"No teacher {text!r}: expected a run directory, http://ADDRESS#MODEL or "
            "recorded:FILE.jsonl."
        )
    return CheckpointTeacher(text)
