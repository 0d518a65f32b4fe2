"""Data sets by name: a function from one raw row to records, and where rows lie.

A file in ``jaxalign.tasks`` (the repository's ``tasks/``) registers a data set with
one call of :func:`add_task`; nothing else needs to know of it. A record function is
plain Python over a dict, so the same one serves a TFDS builder, a file exported from
the data set's own home, and the seqio task of the same name.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import inspect
import pathlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxalign.data import records as records_lib
from jaxalign.data.bad_rows import nearest

_Source = str | Callable[[str], Iterable[Mapping[str, Any]]] | None
# What can stand in for a schema, best first.
_SERVED_BY = {
    "supervised": ("supervised", "preference", "rationale", "trajectory"),
    "trajectory": ("trajectory", "preference", "rationale"),
    "preference": ("preference", "rationale"),
    "rationale": ("rationale",),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A registered data set; see :func:`add_task`.

    Attributes:
      fingerprint: changes when the file that registers the task does.
    """

    name: str
    doc: str
    records: Mapping[str, Callable[..., list[records_lib.Record]]]
    source: _Source
    fingerprint: str

    def schemas(self) -> list[str]:
        """The schemas that the data set can serve."""
        return [s for s in _SERVED_BY if self._serving(s)]

    def options(self) -> dict[str, Any]:
        """Keyword options of the record functions with their defaults."""
        found = {}
        for function in self.records.values():
            for parameter in inspect.signature(function).parameters.values():
                if parameter.kind is parameter.KEYWORD_ONLY:
                    found[parameter.name] = parameter.default
        return found

    def transform(
        self, schema: str, options: Mapping[str, Any] | None = None
    ) -> records_lib.Transform:
        """The record function for a schema, options bound."""
        serving = self._serving(schema)
        if serving is None:
            raise ValueError(
                f"Task {self.name!r} has no {schema!r} records; it serves "
                f"{self.schemas()}."
            )
        known = self.options()
        for name in options or {}:
            if name not in known:
                raise ValueError(
                    f"Task {self.name!r} has no option {name!r}; its options and "
                    f"defaults: {known}{nearest(name, known)}."
                )
        function = self.records[serving]
        accepted = inspect.signature(function).parameters
        bound = {k: v for k, v in (options or {}).items() if k in accepted}
        return functools.partial(function, **bound)

    def _serving(self, schema: str) -> str | None:
        options = _SERVED_BY.get(schema, ())
        return next((s for s in options if s in self.records), None)


_TASKS: dict[str, Task] = {}


def add_task(
    name: str,
    *,
    doc: str,
    records: Mapping[str, Callable[..., list[records_lib.Record]]],
    source: _Source = None,
    made_by: Sequence[Callable[..., Any]] = (),
) -> Task:
    """Registers a data set.

    Args:
      doc: one line for ``jaxalign tasks``.
      records: for each schema, a function from a raw row (dict) to a list of records
        with the schema's fields; keyword-only arguments are options. An empty list
        leaves the row out and a None in it one response; the summary counts both.
        Raise ``FieldError`` or let a KeyError through for a malformed row.
      source: the name of a TFDS builder, such as ``gsm8k`` or ``huggingface:a__b``; or
        a function from a split's name to raw rows; or None for a data set that is only
        read from an exported file.
      made_by: further functions whose files the rows depend on: a cache made before
        such a file was edited is not served.

    Example::

        add_task(
            "tiny",
            doc="Sums.",
            records={"supervised": lambda raw: [
                {"prompt": raw["question"], "completion": raw["answer"]}]},
        )
    """
    unknown = sorted(set(records) - set(records_lib.SCHEMAS))
    if unknown or not records or not name.isidentifier():
        raise ValueError(
            f"Task {name!r} with records for {list(records)}: expected a name of "
            "letters, digits and underscores, and schemas among "
            f"{list(records_lib.SCHEMAS)}."
        )
    # A task is its code: an edited file must not be served from an old cache.
    code = hashlib.sha256()
    functions = [*records.values(), *made_by]
    if inspect.isfunction(source):
        functions.append(source)
    for file in sorted({inspect.getsourcefile(f) or "" for f in functions}):
        path = pathlib.Path(file)
        code.update(path.read_bytes() if path.is_file() else b"")
    task = Task(name, doc, dict(records), source, code.hexdigest())
    _TASKS[name] = task
    return task


def known_tasks() -> dict[str, Task]:
    """All registered tasks by name; each module of ``jaxalign.tasks`` registers its."""
    package = importlib.import_module("jaxalign.tasks")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"jaxalign.tasks.{module.name}")
    return dict(sorted(_TASKS.items()))


def get_task(name: str) -> Task:
    """The task of that name; a ValueError lists the known names, the nearest first."""
    tasks = known_tasks()
    if name not in tasks:
        hint = nearest(name, tasks) or f"; known: {', '.join(tasks)}"
        raise ValueError(f"Unknown task {name!r}{hint}.")
    return tasks[name]


def list_tasks() -> list[dict[str, Any]]:
    """Name, schemas, options, source and doc of every task."""
    found = []
    for task in known_tasks().values():
        source = "generated" if task.source else f"{task.name}:FILE.jsonl"
        if isinstance(task.source, str):
            source = f"tfds:{task.source}"
        found.append(
            {
                "name": task.name,
                "schemas": task.schemas(),
                "options": task.options(),
                "source": source,
                "doc": task.doc,
            }
        )
    return found


def as_rows(value: Any) -> list[Mapping[str, Any]]:
    """A list of objects, which TFDS hands over as an object of lists.

    >>> as_rows({"text": ["a", "b"], "score": [1, 2]})
    [{'text': 'a', 'score': 1}, {'text': 'b', 'score': 2}]
    """
    if not isinstance(value, Mapping):
        return list(value)
    columns = {
        k: as_rows(v) if isinstance(v, Mapping) else list(v) for k, v in value.items()
    }
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]
