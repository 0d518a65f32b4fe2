"""A user's own Python, named on the command line or in gin: a module or a file.

``package.module`` is looked up on the Python path, then in the working folder, where a
console script would not look. ``path/to/file.py`` is run as a module of its own.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import pathlib
import pkgutil
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from jaxalign.files import file_sha256


class NoFunctionError(TypeError, ValueError):
    """What a user named is there, and cannot be called."""


def resolve_callable(spec: str) -> Callable[..., Any]:
    """The callable that a gin file or the command line names.

    It is named as ``"package.module:function"`` (``module:Class.method`` too) or as
    ``"path/to/file.py:function"``.

    Raises:
      ValueError: saying which part was not found, and the nearest names there are.
      NoFunctionError: when the name is not callable.

    >>> resolve_callable("math:sqrt")(9.0)
    3.0
    """
    module_name, separator, qualified_name = spec.rpartition(":")
    if not separator or not module_name or not qualified_name:
        raise ValueError(
            f"Expected 'package.module:function' or 'file.py:function', got {spec!r}."
        )
    found: Any = load_module(module_name, asked_as=spec)
    is_file = module_name.endswith(".py")
    where = pathlib.Path(module_name).stem if is_file else module_name
    for name in qualified_name.split("."):
        if not hasattr(found, name):
            public = [n for n in dir(found) if not n.startswith("__")]
            raise ValueError(
                f"Cannot resolve {spec!r}: {where!r} has no {name!r}."
                f"{hint(name, public)}"
            )
        found = getattr(found, name)
        where = getattr(found, "__name__", name)
    if not callable(found):
        raise NoFunctionError(
            f"{spec!r} is a {type(found).__name__}, not a function or other callable."
        )
    return found


def function_key(spec: str, function: Callable[..., Any] | None = None) -> str:
    """A function's name and the SHA-256 of the module it is written in.

    >>> function_key("math:sqrt")
    'math:sqrt'
    """
    digest = source_digest(function or resolve_callable(spec))
    if digest == _NO_SOURCE:
        return spec
    return f"{spec.rpartition(':')[2]} of {digest[:16]}"


def source_digest(function: Callable[..., Any]) -> str:
    """SHA-256 of the module a function is written in; of nothing if it is built in."""
    try:
        source = inspect.getsource(inspect.getmodule(function) or function)
    except (OSError, TypeError):  # built in, or made at run time
        return _NO_SOURCE
    return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()


_NO_SOURCE = hashlib.sha256().hexdigest()


def load_module(name: str, *, asked_as: str | None = None) -> ModuleType:
    """The module ``package.module`` or ``path/to/file.py`` that a user named.

    A file is run once as long as its content stays the same.

    Args:
      asked_as: what the user wrote, for messages; `name` if None.

    Raises:
      ValueError: when there is no such module or file, with the nearest names. What
        the module itself raises comes through.

    >>> load_module("math").sqrt(9.0)
    3.0
    """
    asked_as = asked_as or name
    look_in_working_folder()  # for what a file imports, too
    if name.endswith(".py"):
        return _run_file(asked_as, pathlib.Path(name).expanduser())
    return _import(asked_as, name)


def look_in_working_folder() -> None:
    """Has modules looked up in the working folder, too, after the Python path."""
    working = os.getcwd()
    if working not in sys.path and "" not in sys.path:
        # Last: nothing there stands in for an installed package.
        sys.path.append(working)
        importlib.invalidate_caches()


def fingerprint(module: ModuleType) -> str:
    """SHA-256 of a module's own file: it changes when its code does."""
    file = getattr(module, "__file__", None)
    return file_sha256(file) if file else _NO_SOURCE


def hint(name: str, names: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the nearest names, or nothing."""
    near = difflib.get_close_matches(name, list(names), n=3)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def _import(asked_as: str, module: str) -> ModuleType:
    """Imports a dotted module, and says which of its parts is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not f"{module}.".startswith(f"{missing}."):
            raise  # the module is there; something that it imports is not
        parent, _, name = missing.rpartition(".")
        path = None  # the top level
        if parent:
            path = getattr(importlib.import_module(parent), "__path__", None)
            if path is None:
                raise ValueError(
                    f"Cannot resolve {asked_as!r}: {parent!r} is a module, not a "
                    f"package; use '{parent}:function'."
                ) from error
        names = [found.name for found in pkgutil.iter_modules(path)]
        names += [] if parent else sys.stdlib_module_names
        raise ValueError(
            f"Cannot resolve {asked_as!r}: no module named {missing!r}."
            f"{hint(name, names)} Modules are looked up on the Python path and in the "
            "working folder; a file is named with its '.py': 'path/to/file.py'."
        ) from error


def _run_file(asked_as: str, path: pathlib.Path) -> ModuleType:
    if not path.is_file():
        folder = path.parent
        files = [p.name for p in folder.glob("*.py")] if folder.is_dir() else []
        raise ValueError(
            f"Cannot resolve {asked_as!r}: no file {path}.{hint(path.name, files)}"
        )
    path = path.resolve()
    content = path.read_bytes()
    digest = hashlib.sha256(bytes(path) + b"\0" + content).hexdigest()
    # A name of its own: a file called json.py stands in for nothing. It is among the
    # modules while it runs, as dataclasses look their annotations up there.
    name = f"{path.stem}_{digest[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        # Not `exec_module`: kept bytecode outlives an edit in the same second.
        exec(spec.loader.source_to_code(content, str(path)), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module
