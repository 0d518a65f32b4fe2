"""What an object is made of, as plain values by name: for telling two of them apart.

An optimizer is a pair of closures. What it does is decided by the numbers that they
hold, so those are looked up: a closure's variables, a partial's arguments, a dataclass'
fields, and of functions that are no library's also their constants, their code and the
data they read. What a gin file binds to a function is part of it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import functools
import hashlib
import re
import sys
import types
from collections.abc import Mapping
from typing import Any

import gin
import jax
import numpy as np

Plain = None | bool | int | float | str

# Their functions are known by name: what changes with their version is no setting.
_LIBRARIES = {"chex", "flax", "jax", "jaxlib", "jaxalign", "numpy", "optax", "scipy"}
# Byte code is comparable under the same Python only.
_PYTHON = f"[python {sys.version_info[0]}.{sys.version_info[1]}]"


def describe(value: Any) -> dict[str, Plain]:
    """What a value is made of: numbers and texts by dotted path, ``""`` for itself.

    A ``description`` that it carries (a mapping) stands for it. Arrays are told by
    shape, dtype and SHA-256.

    >>> describe({"name": "sgd", "rates": (0.1, 0.2)})
    {'name': 'sgd', 'rates[0]': 0.1, 'rates[1]': 0.2}
    >>> def decay(rate):
    ...     return lambda step: rate / step
    >>> describe(decay(0.1))["rate"]
    0.1
    """
    found: dict[str, Plain] = {}
    _walk(value, "", found, ())
    return found


def same(saved: Any, now: Any) -> bool:
    """Whether two plain values are equal; NaN equals itself."""
    return saved == now or (saved != saved and now != now)


def _walk(value: Any, path: str, found: dict[str, Plain], above: tuple[int, ...]):
    """Adds what `value` is made of to `found`; `above`: what contains it, by id."""
    if isinstance(value, enum.Enum):
        value = str(value)
    if value is None or isinstance(value, bool | int | float | str):
        found[path] = value
        return
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        found[path] = _array(value)
        return
    if isinstance(value, types.ModuleType | types.BuiltinFunctionType | type):
        found[path] = _name(value)
        return
    if id(value) in above:
        found[path] = "itself"
        return
    for name, part in _parts(value, path, found):
        _walk(part, _join(path, name), found, (*above, id(value)))


def _parts(value: Any, path: str, found: dict[str, Plain]) -> list[tuple[str, Any]]:
    """The parts of a value by name; what it is itself goes to `found`."""
    told = getattr(value, "description", None)
    if isinstance(told, Mapping):
        return list(told.items())
    if isinstance(value, Mapping):
        return sorted((str(k), v) for k, v in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, tuple | list | collections.deque):
        return [(f"[{i}]", part) for i, part in enumerate(value)]
    if isinstance(value, set | frozenset):
        found[path] = str(sorted(map(str, value)))
        return []
    if isinstance(value, functools.partial):
        bound = [(f"[{i}]", part) for i, part in enumerate(value.args)]
        return [("function", value.func), *bound, *sorted(value.keywords.items())]
    if isinstance(value, types.MethodType):
        return [("function", value.__func__), ("of", value.__self__)]
    if dataclasses.is_dataclass(value):
        found[path] = _name(type(value))
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    if callable(getattr(value, "__wrapped__", None)):
        bindings = {}  # what gin hands to it when it is called
        with contextlib.suppress(ValueError):
            bindings = gin.get_bindings(value)
        return [*sorted(bindings.items()), ("function", value.__wrapped__)]
    if isinstance(value, types.FunctionType):
        return _function(value, path, found)
    found[path] = _name(type(value))
    if _is_library(value) and callable(value):
        found[path] = _name(value)
        return []
    if hasattr(value, "__dict__"):
        return sorted(vars(value).items())
    text = repr(value)
    if not re.search(r"0x[0-9a-fA-F]{4}", text):  # an address says nothing
        found[path] = text
    return []


def _function(
    function: types.FunctionType, path: str, found: dict[str, Plain]
) -> list[tuple[str, Any]]:
    found[path] = _name(function)
    code = function.__code__
    parts = []
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not set yet
            parts.append((name, cell.cell_contents))
    if _is_library(function):
        return parts
    positional = code.co_varnames[: code.co_argcount]
    defaults = function.__defaults__ or ()
    parts += zip(positional[len(positional) - len(defaults) :], defaults, strict=True)
    parts += sorted((function.__kwdefaults__ or {}).items())
    constants, names, digest = [], set(), hashlib.sha256()
    for part in _codes(code):
        own = part.co_consts
        constants += [c for c in own if isinstance(c, bool | int | float | str)]
        names |= set(part.co_names)
        digest.update(part.co_code + repr(part.co_names).encode())
    found[_join(path, f"constants {_PYTHON}")] = repr(constants)
    found[_join(path, f"code {_PYTHON}")] = digest.hexdigest()[:16]
    for name in sorted(names & set(function.__globals__)):
        used = function.__globals__[name]
        if not isinstance(used, types.ModuleType | type) and not _is_library(used):
            parts.append((name, used))
    return parts


def _codes(code: types.CodeType) -> list[types.CodeType]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return [code, *(part for c in inner for part in _codes(c))]


def _array(value: Any) -> Plain:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return f"{value.dtype}{list(value.shape)}"
    array = np.asarray(value)
    if array.ndim == 0 and array.dtype.kind in "biuf":
        return array.item()
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return f"{array.dtype}{list(array.shape)} {digest[:16]}"


def _is_library(value: Any) -> bool:
    module = getattr(value, "__module__", None) or type(value).__module__ or ""
    return module.split(".")[0] in _LIBRARIES


def _name(value: Any) -> str:
    own = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    module = getattr(value, "__module__", None)
    text = own or type(value).__qualname__
    return f"{module}.{text}" if module not in (None, "builtins") else text


def _join(path: str, name: str) -> str:
    return f"{path}{'.' if path and not name.startswith('[') else ''}{name}"
