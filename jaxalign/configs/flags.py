"""The command line's gin flags, in T5X's convention, and whether they do anything."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gin import config_parser

from jaxalign.configs.names import ConfigError, did_you_mean, did_you_mean_or
from jaxalign.configs.scan import Scanned, short, statements_of


class GinFlags(NamedTuple):
    """What `parse_flags` found."""

    gin_files: list[str]
    gin_bindings: list[str]  # "NAME = VALUE"
    rest: list[str]  # everything else, in order
    search_paths: list[str]


def parse_flags(argv: Sequence[str]) -> GinFlags:
    """Takes T5X's gin flags out of a command line.

    Args:
      argv: ``--gin_file=PATH`` (repeatable), ``--gin.NAME=VALUE``,
        ``--gin_bindings="NAME = VALUE"``, ``--gin_search_paths=A,B``; ``--flag VALUE``
        works for all but ``--gin.NAME``.

    >>> parse_flags(["--gin_file=runs/dpo.gin", "--gin.BETA=0.2", "--dry_run"])[:3]
    (['runs/dpo.gin'], ['BETA=0.2'], ['--dry_run'])
    """
    flags = GinFlags([], [], [], [])
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag.startswith("--gin."):
            name = flag.removeprefix("--gin.")
            if not equals or not value.strip():
                raise ConfigError(f"{flag} needs a value: {flag}=VALUE.")
            check_name(name, argument)
            flags.gin_bindings.append(f"{name}={value}")
        elif flag in ("--gin_file", "--gin_bindings", "--gin_search_paths"):
            if not equals:
                value = next(arguments, "")
            if not value:
                raise ConfigError(f"{flag} needs a value: {flag}=VALUE.")
            if flag == "--gin_file":
                flags.gin_files.append(value)
            elif flag == "--gin_bindings":
                check_name(value.partition("=")[0].strip(), f"{flag}={value}")
                flags.gin_bindings.append(value)
            else:
                flags.search_paths.extend(filter(None, value.split(",")))
        elif flag.startswith("--gin_"):
            raise ConfigError(
                f"Unknown flag {flag}; known: --gin_file, --gin.NAME, --gin_bindings, "
                "--gin_search_paths."
            )
        else:
            flags.rest.append(argument)
    return flags


def check_name(name: str, argument: str) -> None:
    """Refuses what cannot be the name of a macro or parameter."""
    if not re.fullmatch(r"([A-Za-z_]\w*/)*[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        raise ConfigError(
            f"{argument}: {name!r} is not a name: use --gin.MACRO=VALUE or "
            "--gin.module.Class.parameter=VALUE."
        )


def check_binding(binding: str, macros: Mapping[str, Any]) -> Scanned:
    """Parses one ``NAME=VALUE`` of the command line; ``macros`` are the files' values.

    A value that gin cannot parse is a string where the macro's value is one or None.
    """
    name, _, value = (part.strip() for part in binding.partition("="))
    check_name(name, f"--gin.{binding}")
    scanned = _parsed(name, binding)
    if scanned:
        return scanned
    message = f"--gin.{name}={value}: gin cannot parse the value {value}."
    literals = {"true": "True", "false": "False", "none": "None", "null": "None"}
    if value.lower() in literals:
        raise ConfigError(f"{message} Write --gin.{name}={literals[value.lower()]}.")
    if value[:1] in "[({" or value[:1] in "'\"":
        raise ConfigError(f"{message} Is every bracket and quote closed?")
    default = macros.get(name, False)
    # No string: 1.O, 1e-x. Of a default of None nobody knows what it may be instead.
    number = re.match(r"[-+.]?\d", value) and len(re.findall("[A-Za-z]", value)) < 3
    if isinstance(default, str) or default is None and not number:
        return _parsed(name, f"{name} = {value!r}")
    if isinstance(default, int | float) and default is not False:
        raise ConfigError(f"{message} Its default is {default!r}.")
    raise ConfigError(
        f"{message} Strings need quotes that the shell leaves in place: "
        f"--gin.{name}=\"'{value}'\"."
    )


def _parsed(name: str, binding: str) -> Scanned | None:
    scanned = Scanned(Path(f"--gin.{name}"), binding)
    try:
        (statement,) = statements_of(scanned, "")
    except ValueError:  # a `ConfigError`, or several statements
        return None
    is_binding = isinstance(statement, config_parser.BindingStatement)
    return scanned if is_binding else None


def check_flags(files: Sequence[Scanned], flags: Sequence[Scanned]) -> None:
    """Refuses flags that set what nothing reads."""
    scanned = [file for root in files for file in root.walk()]
    sources = ", ".join(short(file.path) for file in files) or "(no --gin_file)"
    macros = {name for file in scanned for name in (*file.macros, *file.reads)}
    # A flag may introduce a macro that another flag reads.
    readable = macros.union(*(flag.reads for flag in flags))
    mentioned = {name for file in scanned for name in file.selectors}
    for flag in flags:
        for name in flag.macros:
            if name not in readable:
                raise ConfigError(
                    f"--gin.{flag.text}: no parsed gin file sets or reads a macro "
                    f"named {name}, so it would have no effect."
                    f"{did_you_mean_or(name, macros, f'Macros of {sources}')}"
                )
        for name in flag.sets:
            # Of two dotted names one is the end of the other, as gin matches them.
            pairs = ((f".{name}", f".{known}") for known in mentioned)
            if not any(a.endswith(b) or b.endswith(a) for a, b in pairs):
                last = {known.rpartition(".")[2] for known in mentioned}
                raise ConfigError(
                    f"--gin.{flag.text}: no parsed gin file mentions {name}, so its "
                    "parameters would have no effect."
                    + (
                        did_you_mean(name, mentioned | last)
                        or did_you_mean_or(name, mentioned, f"Mentioned in {sources}")
                    )
                )
