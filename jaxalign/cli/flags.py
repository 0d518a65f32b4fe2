"""Command lines from signatures: parsing, messages and ``--help``."""

from __future__ import annotations

import ast
import contextlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign import configs
from jaxalign.cli.signatures import REQUIRED, Parameter

# Flags and macros that are not called as their parameter is.
_FLAGS = {"metric_fns": "metrics"}
_KINDS = {
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "bool": (bool, "True or False"),
}
_LITERAL = "a Python literal, quotes and brackets closed"
_MACROS = {"seed": "RANDOM_SEED", "metric_fns": "METRICS", "model": "MODEL_NAME"}


def flag(parameter: Parameter) -> str:
    return "--" + _FLAGS.get(parameter.name, parameter.name)


def macro(parameter: Parameter) -> str:
    return _MACROS.get(parameter.name, parameter.name.upper())


def parse(argv: Sequence[str], parameters: Mapping[str, Parameter]) -> dict[str, Any]:
    """The values that words after the verb, without gin's flags, give to parameters.

    ``--name=value`` and ``--name value`` are the same; a flag of a list may be
    repeated, and commas part one whose text says "comma-separated".
    """
    known = {flag(p): p for p in parameters.values() if not p.positional}
    words = [p for p in parameters.values() if p.positional]
    given: dict[str, Any] = {}
    rest = iter(argv)
    for argument in rest:
        name, equals, text = argument.partition("=")
        if not argument.startswith("--"):
            if not words:
                raise configs.ConfigError(f"{argument!r} has no flag before it.")
            parameter, text = words[0], argument
            if not parameter.many:
                words.pop(0)
        elif name not in known:
            near = configs.nearest(name, known)
            hint = f"Nearest: {', '.join(near)}" if near else "--help lists all"
            raise configs.ConfigError(f"Unknown flag {name}. {hint}.")
        else:
            parameter = known[name]
            if parameter.type == "bool" and not equals:
                text = "True"
            elif not equals:
                text = next(rest, "--")
                if text.startswith("--"):
                    raise configs.ConfigError(f"{name} needs a value: {name}=VALUE.")
        value = _value(parameter, text, argument)
        if parameter.many:
            value = (*given.get(parameter.name, ()), *value)
        given[parameter.name] = value
    asked = (p for p in parameters.values() if p.name not in given)
    missing = [_shown(p) for p in asked if p.default is REQUIRED]
    if missing:
        raise configs.ConfigError(f"Missing {', '.join(missing)}.")
    return given


def _value(parameter: Parameter, text: str, argument: str) -> Any:
    if parameter.choices and text not in parameter.choices:
        near = configs.nearest(text, parameter.choices, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        expected = " or ".join(parameter.choices)
        raise configs.ConfigError(f"{argument}: expected {expected}.{hint}")
    if parameter.many:
        parted = "comma-separated" in parameter.text
        return tuple(text.split(",")) if parted else (text,)
    if parameter.type == "str" or parameter.choices:
        return text
    kind, what = _KINDS.get(parameter.type, (object, _LITERAL))
    with contextlib.suppress(ValueError, SyntaxError):
        if kind is float:
            return float(text)
        value = ast.literal_eval(text.capitalize() if text.islower() else text)
        if kind in (type(value), object):
            return value
    raise configs.ConfigError(f"{argument}: expected {what}.")


def _shown(parameter: Parameter) -> str:
    if parameter.positional:
        return parameter.name.upper()
    return f"{flag(parameter)}=..."


def usage(
    verb: str,
    summary: str,
    groups: Mapping[str, Mapping[str, Parameter]],
    gin: bool,
) -> str:
    """What ``jaxalign VERB --help`` prints."""
    every = [p for group in groups.values() for p in group.values()]
    needed = [
        _shown(p) + "..." * (p.positional and p.many)
        for p in every
        if p.default is REQUIRED
    ]
    lines = [" ".join(["usage: jaxalign", verb, *needed, "[flags]"])]
    lines += ["", *textwrap.wrap(summary, 88)]
    for title, group in groups.items():
        lines += ["", f"{title}:"] if title else [""]
        for p in group.values():
            lines.append("  " + _shown(p).removesuffix("=..."))
            lines += (" " * 6 + line for line in textwrap.wrap(_text(p), 82))
    if gin:
        lines += ["", "Gin: --gin_file=FILE (repeatable), --gin.NAME=VALUE."]
    return "\n".join(lines)


def _text(parameter: Parameter) -> str:
    text = parameter.text.replace("``", "").replace("`", "").rstrip(".")
    text += "; repeatable" * (parameter.many and "repeatable" not in text)
    if parameter.choices:
        text += f" ({', '.join(parameter.choices)})"
    unsaid = parameter.default in (REQUIRED, None, False, "", ()) and not (
        parameter.default == 0 and parameter.type in ("int", "float")
    )
    if unsaid or "default:" in text:
        return text
    return f"{text} (default: {parameter.default})"
