"""Which verbs there are, and the flags of each; read from source, never imported."""

from __future__ import annotations

import re
from typing import NamedTuple

from jaxalign.cli import signatures
from jaxalign.cli.signatures import PACKAGE, Parameter


class Verb(NamedTuple):
    """A function that the command line calls."""

    function: str  # ``"inference/generation.py:generate"``, or a user's
    macros: bool = False  # gin's macros give its defaults: ``--gin.TOP_K=4``
    job: bool = False  # several processes may run it together


_OWN = ("train", "data", "plan", "tasks", "report", "completion")
_INFERENCE = {
    "generate": Verb("inference/generation.py:generate", macros=True, job=True),
    "steer": Verb("inference/steering.py:steer", macros=True),
    "serve": Verb("serving/api.py:serve", macros=True),
    "score": Verb("inference/score.py:score", macros=True, job=True),
    "convert": Verb("inference/convert.py:convert"),
    "eval": Verb("inference/evaluation.py:evaluate", macros=True, job=True),
}
# Parameters that take gin's flags.
GIN = ("gin", "gin_files", "bindings", "search_paths")


def known_verbs() -> dict[str, Verb]:
    """Every verb by name; a file of ``pipelines/`` that defines ``run`` is one."""
    own = {name: Verb(f"cli/verbs.py:{name}") for name in _OWN}
    pipelines = {
        path.stem: Verb(f"pipelines/{path.name}:run")
        for path in sorted((PACKAGE / "pipelines").glob("*.py"))
        if re.search(r"^def run\(", path.read_text(encoding="utf-8"), re.M)
    }
    return {**own, **_INFERENCE, **pipelines}


def parameters(verb: Verb) -> dict[str, dict[str, Parameter]]:
    """A verb's flags by group: its function's own have the title ``""``."""
    found = signatures.read(verb.function)
    own = {n: p for n, p in found.parameters.items() if n not in GIN}
    groups = dict(found.groups)
    if verb.job:
        groups |= {"job": signatures.read("cli/verbs.py:train").groups["job"]}
    others = {
        title: {n: p for n, p in group.items() if n not in own}
        for title, group in groups.items()
    }
    return {"": own, **others}


def takes_gin(verb: Verb) -> bool:
    return verb.macros or any(
        n in signatures.read(verb.function).parameters for n in GIN
    )
