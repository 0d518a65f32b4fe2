"""A function's flags, read from its source: its parameters and its docstring.

Nothing of the package is imported to read them: help, completion and a mistyped flag
cost no JAX.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign import user_code

PACKAGE = Path(__file__).parents[1]
REQUIRED = object()


class Parameter(NamedTuple):
    """One parameter as it is written."""

    name: str
    type: str  # its annotation's source, without ``| None``
    default: Any  # a literal, or `REQUIRED`
    text: str  # what the docstring says of it
    positional: bool = False  # a word of the command line rather than a flag

    @property
    def choices(self) -> tuple[str, ...]:
        found = re.fullmatch(r"Literal\[(.*)\]", self.type)
        return ast.literal_eval(f"({found[1]},)") if found else ()

    @property
    def many(self) -> bool:
        return self.type.startswith(("Sequence[", "list[", "tuple["))


class Signature(NamedTuple):
    """What a function takes."""

    summary: str  # the docstring's first sentence
    parameters: dict[str, Parameter]  # its own, by name
    # those of the classes that annotate its other parameters, by parameter
    groups: dict[str, dict[str, Parameter]]


@functools.cache
def read(function: str) -> Signature:
    """The signature of ``"inference/generation.py:generate"`` or a user's function.

    A parameter whose annotation is a class of the same file stands for the class's
    fields.

    >>> read("inference/generation.py:generate").parameters["top_k"].default
    0
    """
    source, _, name = function.rpartition(":")
    path = PACKAGE / source
    if not path.is_file():
        path = Path(user_code.load_module(source).__file__)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = ast.FunctionDef | ast.ClassDef
    defined = {node.name: node for node in tree.body if isinstance(node, kinds)}
    node = defined.get(name)
    if not isinstance(node, ast.FunctionDef):
        raise ValueError(
            f"{source} defines no function {name!r}.{user_code.hint(name, defined)}"
        )
    texts = _texts(node)
    own: dict[str, Parameter] = {}
    groups: dict[str, dict[str, Parameter]] = {}
    given = node.args
    words = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(words) - len(given.defaults)) + given.defaults
    pairs = zip(words + given.kwonlyargs, defaults + given.kw_defaults, strict=True)
    for argument, default in pairs:
        made = _parameter(argument.arg, argument.annotation, default, texts)
        if isinstance(group := defined.get(made.type), ast.ClassDef):
            of_class = _texts(group)
            groups[made.name] = {
                f.target.id: _parameter(f.target.id, f.annotation, f.value, of_class)
                for f in group.body
                if isinstance(f, ast.AnnAssign)
            }
        else:
            is_word = argument in words and made.default is REQUIRED
            own[made.name] = made._replace(positional=is_word)
    summary = (ast.get_docstring(node) or "").partition("\n\n")[0]
    return Signature(" ".join(summary.split()), own, groups)


def _parameter(
    name: str, annotation: Any, default: Any, texts: Mapping[str, str]
) -> Parameter:
    written = ast.unparse(annotation) if annotation else "str"
    parts = [part for part in written.split(" | ") if part != "None"]
    kind = "str" if "str" in parts else parts[0]
    value = REQUIRED
    if default is not None:
        try:
            value = ast.literal_eval(default)
        except ValueError:  # 1 << 20
            value = eval(ast.unparse(default), {"__builtins__": {}})
    return Parameter(name, kind, value, texts.get(name, ""))


def _texts(node: ast.FunctionDef | ast.ClassDef) -> dict[str, str]:
    """What the section ``Args:`` or ``Attributes:`` says of each name."""
    doc = inspect.cleandoc(ast.get_docstring(node) or "")
    found = re.search(r"^(?:Args|Attributes):\n((?:  .*\n?|\n)*)", doc, re.M)
    entries = re.findall(
        r"^  (\w+): (.*(?:\n    .*)*)", found[1] if found else "", re.M
    )
    return {name: " ".join(text.split()) for name, text in entries}
