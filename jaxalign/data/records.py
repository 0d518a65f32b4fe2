"""Rows of text as users write them: schemas, field maps, validation, JSON Lines.

Four schemas say what a row must hold:

============  ==================================================================
schema        fields
============  ==================================================================
supervised    ``prompt``, ``completion``
trajectory    ``prompt``, ``completion``, and ``reward`` (a number) or ``label``
              (true: desirable) or both
preference    ``prompt``, ``chosen``, ``rejected``, optionally ``margin``
rationale     the same with ``rationale``, a text that explains the preference
============  ==================================================================

A fifth, ``prompts``, asks for ``prompt`` alone. Chat messages in the place of texts are
made into texts first (``data.conversations``). A richer row serves a poorer schema
where that is natural: ``chosen`` is a completion to imitate; ``chosen`` and
``rejected`` are a desirable and an undesirable trajectory. Any row may carry
``metadata``, an object that travels with it untouched.

Every row is checked. A bad one becomes a :class:`BadRow` that names file, line, field,
what was expected and what came; none is dropped without a trace.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxalign import batch
from jaxalign.data import packed
from jaxalign.data.bad_rows import (
    BadRow,
    BadRows,
    DataError,
    FieldError,
    OptionError,
    missing,
    nearest,
    quoted,
    show,
)
from jaxalign.data.chat_template import resolve
from jaxalign.data.conversations import Conversations
from jaxalign.data.field_map import FieldMap, Record
from jaxalign.data.jsonl import json_line, read_jsonl
from jaxalign.data.tables import DELIMITERS, Cell, read_table

_log = logging.getLogger(__name__)

SCHEMAS = ("supervised", "trajectory", "preference", "rationale", "prompts")

# A raw row to its records; None stands for a response left out on purpose.
Transform = Callable[[Mapping[str, Any]], Sequence[Record | None]]


@dataclasses.dataclass(frozen=True)
class Example:
    """One valid source row: its records of the schema asked for.

    There are several records when the row holds a list of responses.
    """

    file: str
    line: int
    raw: Mapping[str, Any]
    records: list[Record]
    left_out: int = 0  # responses that a transform left out on purpose
    how: frozenset[str] = frozenset()  # it was read, see ``data.conversations``


def convert(
    record: Mapping[str, Any],
    schema: str,
    *,
    absent: Mapping[str, FieldError] | None = None,
    require: Sequence[str] = (),
    desirable_above: float | None = None,
    pair_serves: bool = True,
    columns: Sequence[str] = (),
) -> list[Record]:
    """Checks one record and gives it the shape of a schema.

    Args:
      record: our field names to values as they came.
      absent: what to say of a field that is not there.
      require: of ``reward`` and ``label``, what a trajectory must have. A missing
        reward is 1 or 0 by the label.
      desirable_above: rewards above it make a missing label desirable, others
        undesirable.
      pair_serves: whether ``chosen`` may stand in for a missing ``completion``.
      columns: names of ``batch.COLUMNS`` that the record has a number or a vector for.

    Returns:
      One record, or two for a pair that serves as trajectories.

    Raises:
      FieldError: naming the field at fault.
    """
    if schema not in SCHEMAS:
        raise ValueError(
            f"Unknown schema {schema!r}; known: {list(SCHEMAS)}"
            f"{nearest(schema, SCHEMAS)}."
        )
    check = _Checker(record, absent or {})
    base: Record = {"prompt": check.text("prompt")}
    if (metadata := record.get("metadata")) is not None:
        if not isinstance(metadata, Mapping):
            raise FieldError("metadata", "type", "an object", show(metadata))
        base["metadata"] = dict(metadata)
    if schema == "prompts":
        return [base]
    if columns:
        base["columns"] = check.columns(columns)
    has_pair = pair_serves and "chosen" in record and "completion" not in record
    if schema == "supervised":
        field = "chosen" if has_pair else "completion"
        return [base | {"completion": check.text(field)}]
    if schema == "trajectory" and not has_pair:
        completion = {"completion": check.text("completion")}
        return [base | completion | check.feedback(require, desirable_above)]
    pair = {"chosen": check.text("chosen"), "rejected": check.text("rejected")}
    if pair["chosen"] == pair["rejected"]:
        expected, got = "another text than chosen", "the same text"
        raise FieldError("rejected", "identical", expected, got)
    if schema == "trajectory":
        return [
            base | {"completion": pair[name], "label": label, "reward": float(label)}
            for name, label in (("chosen", 1), ("rejected", 0))
        ]
    pair["margin"] = check.number("margin") if record.get("margin") is not None else 0.0
    if schema == "rationale":
        pair["rationale"] = check.text("rationale")
    return [base | pair]


class _Checker:
    """Typed access to the fields of one record."""

    def __init__(self, record: Mapping[str, Any], absent: Mapping[str, FieldError]):
        self.record, self.absent = record, absent

    def value(self, field: str) -> Any:
        if field in self.record:
            return self.record[field]
        raise self.absent.get(field) or missing(field, field, field, self.record)

    def text(self, field: str) -> str:
        value = self.value(field)
        if not isinstance(value, str):
            raise FieldError(field, "type", "a text", show(value))
        value = str(value)  # also of a table's cell
        if not value.strip():
            got = "only white space" if value else "an empty text"
            raise FieldError(field, "empty", "a text that is not empty", got)
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            expected = "text that UTF-8 can hold"
            got = f"a lone surrogate at character {error.start + 1}"
            raise FieldError(field, "invalid UTF-8", expected, got) from None
        return value

    def number(self, field: str) -> float:
        value = _spelt(self.value(field))
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FieldError(field, "type", "a finite number", show(value))
        # Rewards live in float32; nan and infinities fail this, too.
        if not abs(value) <= 3.4e38:
            got = str(value) if isinstance(value, float) else "a number too large"
            raise FieldError(field, "not finite", "a finite number", got)
        return float(value)

    def label(self, field: str) -> int:
        value = _spelt(self.value(field))
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            expected = "true or 1 (desirable), false or 0 (undesirable)"
            raise FieldError(field, "type", expected, show(value))
        return int(value)

    def columns(self, names: Sequence[str]) -> Record:
        """A value for each of those columns; a null is as if it were not there."""
        found: Record = {}
        for name in names:
            column = batch.COLUMNS[name]
            if self.record.get(name) is None and column.optional:
                found[name] = column.absent
                continue
            if not column.vector:
                found[name] = self.number(name)
                continue
            values = self.value(name)
            values = values.json() if isinstance(values, Cell) else values
            if not isinstance(values, list) or len(values) != column.size:
                expected = f"a list of {column.size} numbers"
                raise FieldError(name, "type", expected, show(values))
            found[name] = [_Checker({name: v}, {}).number(name) for v in values]
        return found

    def feedback(self, require: Sequence[str], desirable_above: float | None) -> Record:
        """``reward`` and ``label``, one derived from the other where asked."""
        # A null stands for "not given", as Parquet and many exporters write it.
        has_reward = self.record.get("reward") is not None
        has_label = self.record.get("label") is not None
        found: Record = {}
        if has_reward:
            found["reward"] = self.number("reward")
        if has_label:
            found["label"] = self.label("label")
        if not found:
            field, other = "reward", "label"
            if "label" in require:
                field, other = other, field
            told = self.absent.get(field) or missing(field, field, field, self.record)
            got = "null" if field in self.record else told.got
            raise FieldError(field, "missing", f"{field!r} or {other!r}", got)
        if not has_label and desirable_above is not None:
            found["label"] = int(found["reward"] > desirable_above)
        if not has_reward and "reward" in require:
            found["reward"] = float(found["label"])
        if "label" in require and "label" not in found:
            expected = "true or false, or DESIRABLE_ABOVE to derive it from the reward"
            raise FieldError("label", "missing", expected, "a reward alone")
        return found


def _spelt(value: Any) -> Any:
    """What a table's cell spells where a number or a truth value is asked for."""
    return value.number() if isinstance(value, Cell) else value


def examples(
    rows: Iterable[tuple[str, int, Mapping[str, Any] | BadRow]],
    schema: str,
    *,
    field_map: Mapping[str, str] | None = None,
    transform: Transform | None = None,
    require: Sequence[str] = (),
    desirable_above: float | None = None,
    columns: Sequence[str] = (),
    chat_template: str | None = None,
) -> Iterator[Example | BadRow]:
    """Turns raw rows of any source into checked examples.

    Args:
      rows: ``(file, line, row or BadRow)``.
      transform: a data set's own function from a raw row to records.
      chat_template: makes texts of messages; the text of a template
        (``chat_template.resolve``), or None for the default one.

    Yields:
      An :class:`Example` or a :class:`BadRow` for every row. An example without
      records is a row that the transform leaves out on purpose.
    """
    fields = FieldMap(field_map, columns)
    options = {
        "require": require,
        "desirable_above": desirable_above,
        "columns": columns,
        # Who says where completions are does not want another field's.
        "pair_serves": "completion" not in fields.mapped,
    }
    # Nor, who says where the prompt is, a part of the answers for it.
    implicit = transform is None and "prompt" not in fields.mapped
    chats = Conversations(schema, chat_template, implicit=implicit)
    for file, line, raw in rows:
        if isinstance(raw, BadRow):
            yield raw
            continue
        try:
            if transform is None:
                found, absent = fields.extract(raw)
            else:
                found, absent = _transformed(transform, raw), {}
            records, left_out = [], sum(record is None for record in found)
            how: frozenset[str] = frozenset()
            for i, record in enumerate(found):
                if record is None:
                    continue
                try:
                    plain, read = chats.read(record)
                    how |= read
                    for one in plain:
                        records += convert(one, schema, absent=absent, **options)
                except FieldError as error:
                    if len(found) > 1:
                        error.got += f" (item {i} of the row)"
                    raise
        except FieldError as error:
            yield error.at(file, line)
            continue
        yield Example(file, line, raw, records, left_out, how)


def _transformed(
    transform: Transform, raw: Mapping[str, Any]
) -> Sequence[Record | None]:
    """A data set's records, its exceptions told as what is wrong with the row."""
    try:
        return transform(raw)
    except (FieldError, OptionError):
        raise
    except KeyError as error:
        name = str(error.args[0]) if error.args else "a field"
        raise missing(name, name, name, raw) from None
    except (
        TypeError,
        ValueError,
        AttributeError,
        LookupError,
        OverflowError,
        RecursionError,
    ) as error:
        expected = "a row of the data set's public format"
        got = f"{type(error).__name__}: {error}"
        raise FieldError("row", "shape", expected, got) from None


def load(
    path: str | pathlib.Path,
    schema: str,
    *,
    field_map: Mapping[str, str] | None = None,
    on_bad_row: str = "error",
    listing: pathlib.Path | None = None,
    chat_template: str | None = None,
) -> tuple[list[Example], BadRows]:
    """Reads a whole file: prompts to generate from, rows to score.

    Args:
      path: JSON Lines, CSV or TSV.
      listing: a JSON Lines file for all bad rows, if there are any.
      chat_template: what CHAT_TEMPLATE says (``chat_template.resolve``).

    Returns:
      The examples, each of which can be written as JSON again, and the bad rows that
      were skipped.

    Raises:
      DataError: listing the bad rows, unless they are skipped.
    """
    check_on_bad_row(on_bad_row)
    good, bad = [], BadRows(listing)
    file = str(path)
    table = packed.kind(path).lower() in DELIMITERS
    read = read_table(path) if table else read_jsonl(path)
    rows = ((file, n, _writable(row, file, n)) for n, row in read)
    template = resolve(chat_template)
    for item in examples(rows, schema, field_map=field_map, chat_template=template):
        if isinstance(item, BadRow):
            bad.add(item)
        else:
            good.append(item)
    bad.kept = len(good)
    if bad.total and on_bad_row == "error":
        raise DataError(bad)
    bad.close()
    if listing is not None and not bad.total:
        listing.unlink(missing_ok=True)  # of what stood there before
    if bad.total:
        _log.warning("%s: %d bad rows are left out:\n%s", quoted(file), bad.total, bad)
    return good, bad


def _writable(row: Any, file: str, line: int) -> Any:
    """A row, or what is wrong with one that could not be written next to its result."""
    try:
        if not isinstance(row, BadRow):
            json_line([[[[row]]]])  # whoever writes it is a few calls deeper
    except RecursionError:
        expected, got = "objects nested less deeply", "too many levels"
        return BadRow(file, line, "row", "too deep", expected, got)
    return row


def check_on_bad_row(value: str) -> None:
    """Raises ValueError unless ``value`` is ``error`` or ``skip``."""
    if value not in ("error", "skip"):
        raise ValueError(f"ON_BAD_ROW must be 'error' or 'skip', got {value!r}.")
