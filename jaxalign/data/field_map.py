"""Where the fields of a schema lie in a file's own rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.data.bad_rows import FieldError, missing, nearest, show

# Every field that a schema may ask for; ``metadata`` travels with a row untouched, and
# ``data.conversations`` makes the others of ``messages`` and ``tools``.
FIELDS = (
    "prompt",
    "completion",
    "reward",
    "label",
    "chosen",
    "rejected",
    "margin",
    "rationale",
    "metadata",
    "messages",
    "tools",
)
Record = dict[str, Any]


class FieldMap:
    """Where each of our fields lies in a file's rows.

    Args:
      paths: our field name to a path in the row: a name, ``a.b`` for nested objects,
        ``a[0]`` for one item of a list, ``a[].b`` for all of them. Fields with ``[]``
        are zipped into several records and the others repeated.
      columns: names of ``batch.COLUMNS`` that are fields, too.

    Raises:
      ValueError: for a field that does not exist or a path that cannot be read.

    >>> fields = FieldMap({"prompt": "q", "completion": "answers[].text"})
    >>> records, missing = fields.extract({"q": "2+2", "answers": [{"text": "4"}]})
    >>> records
    [{'prompt': '2+2', 'completion': '4'}]
    """

    def __init__(
        self, paths: Mapping[str, str] | None = None, columns: Sequence[str] = ()
    ):
        known = (*FIELDS, *columns)
        self.paths = {f: f for f in known} | dict(paths or {})
        self.mapped = frozenset(paths or {})
        for field, path in (paths or {}).items():
            if field not in known:
                raise ValueError(
                    f"FIELD_MAP names the unknown field {field!r}; it maps our fields "
                    f"{list(known)} to the file's{nearest(field, known)}."
                )
            if not isinstance(path, str) or path.count("[]") > 1 or not _steps(path):
                raise ValueError(
                    f"FIELD_MAP[{field!r}] must be a path such as 'text', 'a.text', "
                    f"'a[0].text' or 'a[].text', got {path!r}."
                )

    def extract(
        self, raw: Mapping[str, Any]
    ) -> tuple[list[Record], dict[str, FieldError]]:
        """The records of a raw row, unchecked, and what is wrong with absent fields."""
        values: Record = {}
        absent: dict[str, FieldError] = {}
        for field, path in self.paths.items():
            try:
                if path in raw:  # also names with dots in them
                    values[field] = raw[path]
                elif field in self.mapped:
                    values[field] = _walk(raw, _steps(path), path, field)
                else:
                    raise missing(field, field, field, raw)
            except FieldError as error:
                absent[field] = error
        sizes = {f: len(v) for f, v in values.items() if isinstance(v, _Several)}
        if not sizes:
            return [values], absent
        if len(set(sizes.values())) > 1:
            field = min(sizes, key=sizes.__getitem__)
            raise FieldError(field, "length", "lists of one length", f"lengths {sizes}")
        records = [
            {f: v[i] if f in sizes else v for f, v in values.items()}
            for i in range(min(sizes.values()))
        ]
        return records, absent


class _Several(list):
    """The values of a path with ``[]``, told apart from a list that is one value."""


def _steps(path: str) -> list[str | int | None]:
    """``a[].b[0]`` as ``["a", None, "b", 0]``; empty when malformed."""
    if not re.fullmatch(r"[^.\[\]]+(\[\d*\])*(\.[^.\[\]]+(\[\d*\])*)*", path):
        return []
    found = re.findall(r"([^.\[\]]+)|\[(\d*)\]", path)
    return [name or (int(i) if i else None) for name, i in found]


def _walk(value: Any, steps: list[str | int | None], path: str, field: str) -> Any:
    for i, step in enumerate(steps):
        if isinstance(step, str):
            if not isinstance(value, Mapping):
                raise FieldError(field, "type", f"an object on {path!r}", show(value))
            if step not in value:
                raise missing(field, step, path, value)
            value = value[step]
            continue
        if not isinstance(value, list):
            raise FieldError(field, "type", f"a list on {path!r}", show(value))
        if step is None:
            rest = steps[i + 1 :]
            return _Several(_walk(item, rest, path, field) for item in value)
        if step >= len(value):
            expected, got = f"item {step} on {path!r}", f"{len(value)} items"
            raise FieldError(field, "length", expected, got)
        value = value[step]
    return value
