"""The floors of docs/architecture.md: which room may import which.

A room is a folder or a module at the top of ``jaxalign/``. It imports only rooms of
floors below its own, or of its own floor where that closes no circle. Imports inside
functions count as much as those at the top of a file.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "jaxalign"

# From the ground up.
FLOORS = (
    "batch configs evaluation files locks losses models remote user_code vocabularies "
    "world",
    "decoding interop",
    "data objectives",
    "cluster prepare training",
    "judges teachers",
    "inference planning report serving",
    "pipelines",
    "cli",
)


class Import(NamedTuple):
    """One module imports another, on a line of its file."""

    module: str
    line: int
    imported: str

    def __str__(self) -> str:
        return f"{self.module} (line {self.line}) imports {self.imported}"


def sources() -> dict[str, str]:
    """The text of every module of the package by its installed name."""
    found = {}
    for prefix, folder in ((PACKAGE, ROOT / PACKAGE), (f"{PACKAGE}.tasks", "tasks")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((prefix, *parts))] = path.read_text()
    return found


def room(module: str) -> str:
    """The room of a module; the data sets in ``tasks/`` belong to ``prepare/``."""
    name = module.split(".")[1] if "." in module else ""
    return "prepare" if name == "tasks" else name


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """What a file imports, anywhere in it, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            for argument in node.args:
                if isinstance(argument, ast.Constant):
                    yield node.lineno, str(argument.value)


def imports(modules: Mapping[str, str]) -> list[Import]:
    """All imports of one module by another."""
    found = []
    for module, text in modules.items():
        for line, name in imported_names(ast.parse(text)):
            while name and name not in modules:  # a function's name, or another package
                name = name.rpartition(".")[0]
            if name and name not in (module, PACKAGE):
                found.append(Import(module, line, name))
    return found


def circles(steps: Iterable[tuple[str, str, Import]]) -> list[str]:
    """Circles among ``(from, to, import)``, each once, each with its imports."""
    graph: dict[str, dict[str, Import]] = {}
    for start, end, found in steps:
        graph.setdefault(start, {}).setdefault(end, found)
    described: dict[frozenset[str], str] = {}

    def walk(path: list[str]) -> None:
        for following in graph.get(path[-1], ()):
            if following in path:
                circle = [*path[path.index(following) :], following]
                chain = "; ".join(
                    str(graph[a][b]) for a, b in zip(circle, circle[1:], strict=False)
                )
                text = f"{' -> '.join(circle)}: {chain}"
                described.setdefault(frozenset(circle), text)
            elif following not in finished:
                walk([*path, following])
        finished.add(path[-1])

    finished: set[str] = set()
    for start in graph:
        walk([start])
    return list(described.values())


def violations(
    modules: Mapping[str, str], floors: Iterable[str] = FLOORS
) -> Iterator[str]:
    """Every break of the rule, each with the chain of imports that breaks it."""
    floor = {name: n for n, names in enumerate(floors, 1) for name in names.split()}
    for name in sorted({room(module) for module in modules} - {"", *floor}):
        yield f"{PACKAGE}/{name} has no floor; expected its name in FLOORS"
    between, inside = [], []
    for found in imports(modules):
        own, other = room(found.module), room(found.imported)
        if own == other:
            inside.append((found.module, found.imported, found))
        elif own in floor and other in floor:
            if floor[other] > floor[own]:
                yield f"{found}: from floor {floor[own]} up to floor {floor[other]}"
            elif floor[other] == floor[own]:
                between.append((own, other, found))
    yield from (f"circle of rooms {circle}" for circle in circles(between))
    yield from (f"circle in a room {circle}" for circle in circles(inside))


def test_rooms_import_only_from_floors_below():
    found = list(violations(sources()))
    assert not found, "\n" + "\n".join(found)


def test_the_page_draws_these_floors():
    text = (ROOT / "docs/architecture.md").read_text()
    (picture,) = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    drawn: dict[int, set[str]] = {}
    floor = 0
    for line in picture.splitlines():
        floor = int(line[0]) if line[0].isdigit() else floor
        names = re.findall(r"(\w+)(/(?=\s)|\.py)", line)
        drawn.setdefault(floor, set()).update(
            name + end.replace("/", "")
            for name, end in names
            if end == "/" or (ROOT / PACKAGE / f"{name}.py").exists()
        )
    found = [{n.removesuffix(".py") for n in drawn[i + 1]} for i in range(len(FLOORS))]
    assert found == [set(names.split()) for names in FLOORS]


LOW, LOWER = f"{PACKAGE}.low", f"{PACKAGE}.lower"
HIGH = f"{PACKAGE}.high"


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ({LOW: "", HIGH: f"import {LOW}\nfrom {PACKAGE} import low"}, []),
        ({LOW: f"import {LOWER}", LOWER: "", HIGH: ""}, []),
        (
            {LOW: f"def f():\n    from {HIGH} import g", HIGH: "g = 1"},
            [f"{LOW} (line 2) imports {HIGH}: from floor 1 up to floor 2"],
        ),
        (
            {LOW: f"import importlib\nimportlib.import_module('{HIGH}')", HIGH: ""},
            [f"{LOW} (line 2) imports {HIGH}: from floor 1 up to floor 2"],
        ),
        (
            {f"{LOW}.a": f"import {LOWER}", LOWER: f"from {LOW} import a"},
            [
                f"circle of rooms low -> lower -> low: {LOW}.a (line 1) imports "
                f"{LOWER}; {LOWER} (line 1) imports {LOW}.a"
            ],
        ),
        (
            {
                f"{HIGH}.a": f"from {HIGH} import b",
                f"{HIGH}.b": f"import {HIGH}.c",
                f"{HIGH}.c": f"def f():\n    import {HIGH}.b",
            },
            [
                f"circle in a room {HIGH}.b -> {HIGH}.c -> {HIGH}.b: {HIGH}.b (line 1) "
                f"imports {HIGH}.c; {HIGH}.c (line 2) imports {HIGH}.b"
            ],
        ),
        (
            {f"{PACKAGE}.attic.a": ""},
            [f"{PACKAGE}/attic has no floor; expected its name in FLOORS"],
        ),
    ],
)
def test_the_rule_sees(modules, expected):
    assert list(violations(modules, ("low lower", "high"))) == expected
