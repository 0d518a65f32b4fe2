"""Gin glue: finds gin files, parses them and refuses what would have no effect.

The command line follows T5X: ``--gin_file=runs/dpo.gin`` (repeatable) and
``--gin.NAME=VALUE``. The packaged files are defaults: a user's own files override them
in any order, later ones earlier ones, and ``--gin.NAME=VALUE`` overrides them all
(`jaxalign.configs.strength`). Three things differ from calling gin directly:

* a gin file, also one that is included, is looked up in the working folder, the
  search paths, beside the including file, then among the packaged configs;
* a macro set on the command line that no file reads or sets is an error (gin accepts
  it silently, and the run goes on with the default);
* errors name file, line and the nearest valid names.

Gin files are read twice. The first pass records what they set, read and include,
without importing anything: most mistakes end there, in milliseconds. The second pass
is gin's own, which imports what the files import.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import gin

from jaxalign import user_code
from jaxalign.configs import strength
from jaxalign.configs.explain import explain, explain_missing, message
from jaxalign.configs.flags import GinFlags, check_binding, check_flags, parse_flags
from jaxalign.configs.names import ConfigError, nearest
from jaxalign.configs.scan import (
    NamedText,
    Scanned,
    available,
    find,
    scan,
    short,
    statements_of,
)

__all__ = [
    "ConfigError",
    "GinFlags",
    "available",
    "bound",
    "check",
    "config_str",
    "configured",
    "is_network_named",
    "macros",
    "message",
    "nearest",
    "network",
    "parse",
    "parse_flags",
    "set_network",
]


# What `network` tells of the last `parse`; gin's configuration is global too.
_network: strength.Network | str | None = None
_DEFAULTS = Path("(defaults)")
# What gin raises for a mistake in a file, but for one of syntax.
_GIN_ERRORS = (ValueError, LookupError, ImportError, NameError, AttributeError)


def parse(
    gin_files: Iterable[str | Path] = (),
    bindings: Iterable[str] = (),
    search_paths: Iterable[str | Path] = (),
    defaults: str = "",
) -> list[Path]:
    """Replaces gin's configuration by these files and bindings, and locks it.

    Args:
      gin_files: names as in ``--gin_file``.
      bindings: ``"NAME = VALUE"`` strings; they override the files.
      search_paths: folders to look in after the working folder.
      defaults: gin text that everything else overrides.

    Returns:
      Every file read, includes too, in the order of reading.

    Raises:
      ConfigError: for a file that is not found, a syntax error, an unknown macro,
        configurable or parameter, a macro left without a value, two networks or two
        objectives.
    """
    global _network
    files, flags, _network = _settle(gin_files, bindings, search_paths, defaults)

    user_code.look_in_working_folder()  # gin files import a user's own modules
    gin.clear_config()
    scanned = [file for root in files for file in root.walk()]
    for defaults in (True, False):
        for file in files:
            _apply(file, scanned, defaults)
    for binding in flags:
        _apply_binding(binding, scanned)
    try:
        gin.config.finalize()
    except ValueError as error:
        raise ConfigError(explain_missing(error, files, flags)) from error
    return [file.path for file in scanned if file.path.name != _DEFAULTS.name]


def check(
    gin_files: Iterable[str | Path] = (),
    bindings: Iterable[str] = (),
    search_paths: Iterable[str | Path] = (),
    defaults: str = "",
) -> dict[str, Any]:
    """Raises what `parse` would for files, networks and flags; imports nothing.

    Returns:
      The macros' values, references in them unresolved.
    """
    files, flags, _ = _settle(gin_files, bindings, search_paths, defaults)
    every = [*strength.in_order(files), *flags]
    return {name: value for file in every for name, value in file.macros.items()}


def _scanned(
    gin_files: Iterable[str | Path], search_paths: Iterable[str | Path]
) -> list[Scanned]:
    paths = tuple(Path(path) for path in search_paths)
    return [scan(find(str(name), paths), paths) for name in gin_files]


def _settle(
    gin_files: Iterable[str | Path],
    bindings: Iterable[str],
    search_paths: Iterable[str | Path],
    defaults: str,
) -> tuple[list[Scanned], list[Scanned], strength.Network | None]:
    """The files, what the flags say, and the network's file."""
    files = _scanned(gin_files, search_paths)
    found = strength.settle(files)
    if defaults:
        weakest = Scanned(_DEFAULTS, defaults, is_default=True)
        statements_of(weakest, "")
        files.insert(0, weakest)
    values = {n: v for file in strength.in_order(files) for n, v in file.macros.items()}
    flags = [check_binding(binding, values) for binding in bindings]
    check_flags(files, flags)
    return files, flags, found


def macros(
    gin_files: Iterable[str | Path], search_paths: Iterable[str | Path] = ()
) -> set[str]:
    """The macros that gin files set or read, without parsing them.

    >>> "DATA" in macros(["runs/dpo.gin"])
    True
    """
    roots = _scanned(gin_files, search_paths)
    files = [file for root in roots for file in root.walk()]
    return {name for file in files for name in (*file.macros, *file.reads)}


def network() -> str:
    """Which gin file the parsed configuration has its network from, for people.

    >>> _ = parse(["runs/dpo.gin"], ["DATA = 'x'"])
    >>> network()
    'models/t5_1_1_tiny.gin (the default, as no --gin_file names another)'
    """
    if not isinstance(_network, strength.Network):
        return _network or "no gin file"
    name = short(_network.file.path)
    default = " (the default, as no --gin_file names another)"
    return name + default * _network.is_default


def is_network_named() -> bool:
    """Whether somebody asked for the network, rather than the packaged defaults."""
    return not (isinstance(_network, strength.Network) and _network.is_default)


def set_network(text: str, source: str) -> None:
    """Puts a network in the place of the default one.

    Args:
      text: gin statements, which override what was parsed and go into `config_str`.
      source: what `network` says of it.
    """
    global _network
    with gin.unlock_config():
        gin.parse_config(text)
    _network = source


def configured(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` (or class) with the parsed files' bindings; itself if none."""
    try:
        return gin.get_configurable(function)
    except ValueError:
        return function


def bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the values that gin files give it in sight; itself if none.

    Gin hands them over in the call, where nothing that asks what a function depends on
    would see them.

    >>> bound(len)
    <built-in function len>
    """
    try:
        values = gin.get_bindings(function)
    except ValueError:  # no gin file names it
        return function
    return functools.partial(function, **values) if values else function


def config_str() -> str:
    """Everything that was set, as one gin file that needs no other gin file.

    Written to ``RUN_DIR/config.gin`` and parsed again it reproduces the run.
    """
    return gin.config_str()


def _apply(file: Scanned, scanned: Sequence[Scanned], defaults: bool) -> None:
    """Hands a file to gin in pieces, with the included files between them.

    Included files are found by this module rather than by gin, whose search paths are
    global and whose reader for Python packages imports what is named like a folder.
    Only what is a default, or only what is none.
    """
    lines = file.text.splitlines(keepends=True)
    import_lines = {statement.location.line_num for statement in file.imports}
    own = file.is_default == defaults
    start = 0
    for line, included in [*file.includes, (len(lines) + 1, None)]:
        # Other lines become blank, which keeps the line numbers of gin's messages;
        # import lines stay, because names imported above are used below.
        piece = "".join(
            text
            if number not in file.left_out
            and (start < number < line or number in import_lines and number < line)
            else "\n"
            for number, text in enumerate(lines, start=1)
        )
        try:
            if own:
                gin.parse_config(NamedText(piece, str(file.path)))
        except _GIN_ERRORS as e:
            raise ConfigError(explain(e, scanned, file)) from e
        except SyntaxError as e:
            raise ConfigError(f"{file.path}:{e.lineno}: {e.msg}") from e
        if included is not None:
            _apply(included, scanned, defaults)
        start = line


def _apply_binding(flag: Scanned, scanned: Sequence[Scanned]) -> None:
    try:
        try:
            gin.parse_config(flag.text)
        except ValueError as error:
            if "matching reference" not in str(error):
                raise
            # A value such as @optax.sgd that no file mentions: look it up among what
            # the files import.
            dynamic = {"from __gin__ import dynamic_registration": None}
            lines = {s.format(): None for file in scanned for s in file.imports}
            gin.parse_config("\n".join([*(dynamic | lines), flag.text]))
    except _GIN_ERRORS as error:
        raise ConfigError(explain(error, scanned, flag)) from error
