"""Errors for clients, and the reading of bodies that these may be about."""

from __future__ import annotations

import collections
import json
import re
import reprlib
from typing import Any


class Refusal(Exception):
    """An error for the client: HTTP status, field at fault, a word for programs."""

    def __init__(self, message, *, param=None, code=None, status=400):
        # What came may hold half a character, which no answer can.
        super().__init__(_sayable(message))
        self.status, self.code = status, code
        self.param = None if param is None else _sayable(param)

    def body(self) -> dict[str, Any]:
        """The error in the API's format."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind}
        return {"error": {**error, "param": self.param, "code": self.code}}


def wrong(param: str, what: str) -> Refusal:
    """The refusal of a field: its name, then what is wrong with it."""
    return Refusal(f"{param} {what}", param=param)


def from_json(body: bytes) -> Any:
    """Reads a body; what JSON leaves open is refused, not guessed.

    Such as a field that is given twice, and half a character (a lone surrogate).
    """
    try:
        body = json.loads(body, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"The body is no JSON: {error}.") from None
    left = [("", body)]
    while left:
        where, value = left.pop()
        if isinstance(value, dict):
            left += [(f"the name of a field {where}".rstrip(), name) for name in value]
            left += [
                (f"{where}.{name}" if where else name, v) for name, v in value.items()
            ]
        elif isinstance(value, list):
            left += [(f"{where}[{i}]", v) for i, v in enumerate(value)]
        elif isinstance(value, str) and (found := _SURROGATE.search(value)):
            where = _sayable(where[:100]) or "The body"
            raise Refusal(
                f"{where} holds half a character, {found[0]!r} at character "
                f"{found.start()}; expected whole ones.",
                param=where,
            )
    return body


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = collections.Counter(name for name, _ in pairs)
        name = names.most_common(1)[0][0]
        raise Refusal(f"{shown(name)} is given twice.", param=name[:100])
    return found


_SURROGATE = re.compile("[\ud800-\udfff]")


def _sayable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def shown(value: Any) -> str:
    """A value of a request as a message may hold it: quoted, short."""
    if isinstance(value, str):
        return f"{value[:80]!r}{'...' if len(value) > 80 else ''}"
    return reprlib.repr(value) if isinstance(value, int | float) else name_of(value)


def name_of(value: Any) -> str:
    """The name of a JSON value's type."""
    return "null" if value is None else type(value).__name__
