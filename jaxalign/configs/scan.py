"""Finds gin files and reads what they say without importing what they import."""

from __future__ import annotations

import importlib.resources
import io
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gin import config_parser

from jaxalign.configs.names import ConfigError, did_you_mean


def available() -> list[str]:
    """Names of the packaged gin files, such as ``runs/dpo.gin``."""
    root = package()
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*.gin"))


def package() -> Path:
    return Path(str(importlib.resources.files("jaxalign.gin_configs")))


def find(
    name: str,
    search_paths: Sequence[Path],
    beside: Path | None = None,
    where: str = "",
) -> Path:
    folders = [Path(), *search_paths, *([beside] if beside else []), package()]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    local = {
        path.relative_to(folder).as_posix()
        for folder in folders[:-1]
        for path in folder.glob("*.gin")
    }
    looked_in = ", ".join(["the working folder", *map(str, folders[1:-1])])
    hint = did_you_mean(name, local.union(available()))
    raise ConfigError(
        f"{where}gin file {name!r} not found in {looked_in} or among the packaged "
        f"files.{hint or ' `jaxalign tasks` lists them all.'}"
    )


def short(path: Path) -> str:
    """A packaged file by its packaged name, others as they are."""
    root = package()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


class Macro(NamedTuple):
    """Stands for ``%name`` in a scanned value."""

    name: str


class _Recorder(config_parser.ParserDelegate):
    """Notes the names that values refer to instead of looking them up."""

    def __init__(self) -> None:
        self.macros: set[str] = set()
        self.selectors: set[str] = set()

    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> str:
        self.selectors.add(scoped_selector.rsplit("/", 1)[-1])
        return scoped_selector

    def macro(self, name: str) -> Macro:
        if "." not in name:  # a name with a dot is one of gin's constants
            self.macros.add(name)
        return Macro(name)


@dataclass
class Scanned:
    """What one gin file, or one ``--gin`` flag, says."""

    path: Path
    text: str
    macros: dict[str, Any] = field(default_factory=dict)  # set here
    reads: set[str] = field(default_factory=set)  # macros read here
    sets: set[str] = field(default_factory=set)  # whose parameters are set
    selectors: set[str] = field(default_factory=set)  # sets and references
    imports: list[config_parser.ImportStatement] = field(default_factory=list)
    includes: list[tuple[int, Scanned]] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)  # includes' lines
    is_default: bool = False  # weaker than what a user writes; see `strength`

    def walk(self) -> Iterator[Scanned]:
        """Itself, then what it includes."""
        yield self
        for _, included in self.includes:
            yield from included.walk()


class NamedText(io.StringIO):
    """Text that gin's error messages call by a file's name."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name


def scan(path: Path, search_paths: Sequence[Path], above: tuple = ()) -> Scanned:
    if path in above:
        chain = " -> ".join(str(p) for p in (*above, path))
        raise ConfigError(f"Gin files include each other in a circle: {chain}.")
    file = Scanned(path, path.read_text(encoding="utf-8"))
    for statement in statements_of(file, str(path)):
        if isinstance(statement, config_parser.IncludeStatement):
            line = statement.location.line_num
            where = f"{path}:{line}: "
            found = find(statement.filename, search_paths, path.parent, where)
            file.includes.append((line, scan(found, search_paths, (*above, path))))
    return file


def statements_of(file: Scanned, name: str) -> list[Any]:
    """Parses ``file.text``, fills in what it sets and reads, returns statements."""
    recorder = _Recorder()
    text = NamedText(file.text, name)
    try:
        statements = list(config_parser.ConfigParser(text, recorder))
    except tokenize.TokenError as error:
        line = error.args[1][0]
        raise ConfigError(f"{name}:{line}: a bracket or quote is not closed.") from None
    except SyntaxError as error:
        reason = str(error.msg).splitlines()[-1]
        text = (error.text or "").strip()
        raise ConfigError(f"{name}:{error.lineno}: {reason} In: {text}") from None
    for statement in statements:
        if isinstance(statement, config_parser.ImportStatement):
            file.imports.append(statement)
        elif not isinstance(statement, config_parser.IncludeStatement):
            if getattr(statement, "arg_name", True):  # a block's head has none
                file.sets.add(statement.selector)
            else:
                scope = f"{statement.scope}/" if statement.scope else ""
                file.macros[scope + statement.selector] = statement.value
    file.reads = recorder.macros
    file.selectors = file.sets | recorder.selectors
    return statements
