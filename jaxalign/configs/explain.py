"""Gin's errors with the place and the nearest valid names added."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Sequence
from typing import Any

import gin

from jaxalign.configs.names import did_you_mean, did_you_mean_or
from jaxalign.configs.scan import Macro, Scanned, short
from jaxalign.configs.strength import in_order

# What gin adds to every error that passes through a configured function.
_CALL = re.compile(r"\n  In call to configurable '[^']*' \(.*\)(?: in scope '[^']*')?$")
# An object as Python shows it, with its address in memory.
_METHOD = re.compile(r"<bound method ([\w.<>]+) of <.*?>>")
_OBJECT = re.compile(
    r"<(?:(?:function|class|module) )?(?:[\w.]+\.<locals>\.)?<?([\w.]+)>?[^<>]*"
    r" at 0x[0-9a-fA-F]+>"
)


def message(error: BaseException) -> str:
    """An error's message without what tells a user nothing.

    >>> message(ValueError("No.\\n  In call to configurable 'f' (<function f at 0x7>)"))
    'No.'
    >>> message(ValueError("<function judge at 0x7f3a> requires ['a']."))
    "judge requires ['a']."
    """
    text = str(error)
    while match := _CALL.search(text):
        text = text[: match.start()]
    return _OBJECT.sub(r"\1", _METHOD.sub(r"\1", text))


def explain(error: Exception, scanned: Sequence[Scanned], file: Scanned) -> str:
    """Adds the place and the nearest valid names to one of gin's errors."""
    text, _, location = str(error).partition("\n  In ")
    line = re.search(r"line (\d+)\n", location)
    is_flag = file not in scanned
    where = f"--gin.{file.text}: " if is_flag else f"{file.path}:"
    if not is_flag:
        where += f"{line[1]}: " if line else " "
    text = text.strip()
    selectors = {name for other in scanned for name in other.selectors}

    if match := re.search(r"'(.+)' doesn't have a parameter named '(.+)'", text):
        parameters = _parameters(match[1])
        return where + text + did_you_mean_or(match[2], parameters, "Its parameters")
    if match := re.search(
        r"(?:No configurable matching|Could not find)\D*?"
        r"(?:reference )?'?@?([\w./]+)",
        text,
    ):
        return f"{where}no parsed gin file mentions {match[1]}." + did_you_mean_or(
            match[1], selectors, "Mentioned"
        )
    if match := re.search(r"<module '([\w.]+)'.* has no attribute (\w+)", text):
        module = importlib.import_module(match[1])
        names = [name for name in dir(module) if not name.startswith("_")]
        hint = did_you_mean(match[2], names)
        return f"{where}{match[1]} has no {match[2]}.{hint}"
    if match := re.search(r"'(\w+)' was not provided by an import", text):
        names = {s.bound_name() for other in scanned for s in other.imports}
        names.discard("dynamic_registration")
        return f"{where}{text}" + did_you_mean(match[1], names)
    if match := re.search(r"No module named '([\w.]+)'", text):
        return f"{where}{text}." + did_you_mean(match[1], _siblings(match[1]))
    return where + text


def explain_missing(
    error: Exception, files: Sequence[Scanned], flags: Sequence[Scanned]
) -> str:
    """Lists the macros without a value; other errors of gin's checks as they are."""
    values: dict[str, Any] = {}
    readers: dict[str, Scanned] = {}
    for file in [*in_order(files), *flags]:
        values |= file.macros
        readers |= dict.fromkeys(file.reads, file)
    required = Macro("gin.REQUIRED")
    named = sorted({*values, *readers})
    missing = [name for name in named if values.get(name, required) == required]
    if not missing:
        return str(error)
    lines = [f"These macros have no value: {', '.join(missing)}."]
    for name in missing:
        reader = readers.get(name)
        source = f" ({short(reader.path)} reads it)" if reader else ""
        hint = "" if name in values else did_you_mean(name, values)
        lines.append(f"  {name}: set --gin.{name}=VALUE{source}.{hint}")
    return "\n".join(lines)


def _parameters(selector: str) -> list[str]:
    try:
        found = gin.get_configurable(selector)
    except ValueError:
        return []
    if inspect.isclass(found):  # gin's own wrapper of a class hides its signature
        return list(inspect.signature(found.__init__).parameters)[1:]
    return list(inspect.signature(found).parameters)


def _siblings(module: str) -> list[str]:
    """Modules that stand beside ``module``, by full name."""
    parent = module.rpartition(".")[0]
    if not parent:
        return []
    path = getattr(importlib.import_module(parent), "__path__", [])
    return [f"{parent}.{found.name}" for found in pkgutil.iter_modules(path)]
