"""Raw rows to checked records, and those to tokenised rows of the cache.

The records of one source row that share a prompt become one cache row: its prompt is
stored, and later encoded, once.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np

from jaxalign import batch
from jaxalign.data import records as records_lib
from jaxalign.data.bad_rows import BadRow, FieldError
from jaxalign.data.records import Example, Record
from jaxalign.data.rows import Row
from jaxalign.prepare.rationales import (
    chosen_comes_second,
    rationale_prompt,
    rationale_text,
)
from jaxalign.vocabularies import Vocabulary


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An :class:`Example` that is tokenised already."""

    rows: list[Row]
    left_out: int  # how many of its responses a transform left out on purpose
    how: frozenset[str] = frozenset()  # it was read, as of an `Example`


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the raw rows of a source become rows of a cache; other processes take it.

    Attributes:
      options: arguments of ``data.records.examples``.
      names: names of files that tell them apart, for the keys of rows; a file that is
        not among them is called by its path.
      seed: decides the order of answers in rationale prompts.
    """

    schema: str
    vocabulary: Vocabulary
    options: Mapping[str, Any]
    names: frozenset[str]
    seed: int

    def examples(
        self, rows: Iterable[tuple[str, int, Mapping[str, Any] | BadRow]]
    ) -> Iterator[Example | BadRow]:
        """Checks raw rows, ``(file, line, row or BadRow)``."""
        for item in records_lib.examples(rows, self.schema, **self.options):
            try:
                for record in getattr(item, "records", ()):
                    msgpack.packb([record.get("metadata")])
            except (TypeError, ValueError, OverflowError, RecursionError) as error:
                expected = (
                    "JSON values: texts that UTF-8 can hold, integers of at most 64 "
                    "bits, numbers, true, false, null, lists and objects"
                )
                what = FieldError("metadata", "not storable", expected, str(error))
                yield what.at(item.file, item.line)
            else:
                yield item

    def build(self, example: Example) -> list[Row]:
        """Tokenises an example."""
        key = row_key(example.file, example.line, self.names)
        return build_rows(
            example.records, self.schema, self.vocabulary, key=key, seed=self.seed
        )

    def encode(
        self, rows: Iterable[tuple[str, int, Mapping[str, Any] | BadRow]]
    ) -> Iterator[Encoded | BadRow]:
        """Checks raw rows and tokenises them."""
        for item in self.examples(rows):
            if isinstance(item, BadRow):
                yield item
            else:
                yield Encoded(self.build(item), item.left_out, item.how)


def row_key(file: str, line: int, names: Collection[str]) -> str:
    """What a source row is called: a file that lies elsewhere has the same rows.

    >>> row_key("/data/pairs.jsonl", 3, {"pairs.jsonl"})
    'pairs.jsonl:3'
    """
    name = pathlib.Path(file).name
    return f"{name if name in names else file}:{line}"


def by_prompt(
    records: Sequence[Record], key: str
) -> dict[str, tuple[str, list[Record]]]:
    """The records of one source row by prompt, each group with its row's key."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["prompt"], []).append(record)
    return {
        prompt: (f"{key}#{i}" if i else key, group)
        for i, (prompt, group) in enumerate(groups.items())
    }


def build_rows(
    records: Sequence[Record],
    schema: str,
    vocabulary: Vocabulary,
    *,
    key: str,
    seed: int = 0,
) -> list[Row]:
    """Tokenises the checked records of one source row.

    Args:
      key: identity of the source row.
      seed: decides, together with the key, which answer a rationale prompt shows
        first.

    Returns:
      One row for each distinct prompt. ``metadata["prompt"]`` holds the prompt's text
      where the ids do not give it back, or where the row's own metadata has a
      ``prompt``, which is then kept as ``metadata["metadata.prompt"]``.
    """
    return [
        _build_row(prompt, group, schema, vocabulary, own, seed)
        for prompt, (own, group) in by_prompt(records, key).items()
    ]


def _build_row(
    prompt: str,
    group: list[Record],
    schema: str,
    vocabulary: Vocabulary,
    key: str,
    seed: int,
) -> Row:
    row = Row(key, [], [], [], [], [], [])
    known: dict[str, int] = {}

    def encode(text: str) -> np.ndarray:
        return np.array([*vocabulary.encode(text), vocabulary.eos_id], np.int32)

    def respond(
        text: str,
        reward: float = math.nan,
        label: int = batch.NO_LABEL,
        kind: int = batch.ANSWER,
    ) -> int:
        row.responses.append(encode(text))
        # A rationale answers the prompt that was made for it.
        row.response_prompt.append(
            len(row.prompts) - 1 if kind == batch.RATIONALE else 0
        )
        row.response_kind.append(kind)
        row.response_reward.append(reward)
        row.response_label.append(label)
        return len(row.responses) - 1

    def shared(text: str) -> int:  # in several pairs, stored and scored once
        if text not in known:
            known[text] = respond(text)
        return known[text]

    row.prompts.append(encode(prompt))
    if vocabulary.decode(row.prompts[0]) != prompt:
        row.metadata["prompt"] = prompt
    for i, record in enumerate(group):
        metadata = dict(record.get("metadata", {}))
        if "prompt" in metadata:  # goes on being the prompt
            row.metadata["metadata.prompt"] = metadata.pop("prompt")
            row.metadata["prompt"] = prompt
        row.metadata.update(metadata)
        for name, value in record.get("columns", {}).items():
            values = row.columns.setdefault(name, [])
            if batch.COLUMNS[name].owner != "P" or not values:  # records share it
                values.append(value)
        if schema in ("supervised", "trajectory"):
            respond(
                record["completion"],
                record.get("reward", math.nan),
                record.get("label", batch.NO_LABEL),
            )
            continue
        chosen, rejected = shared(record["chosen"]), shared(record["rejected"])
        row.pairs.append((chosen, rejected, record.get("margin", 0.0)))
        if schema == "rationale":
            swap = chosen_comes_second(key, i, seed)
            row.prompts.append(encode(rationale_prompt(record, swap)))
            respond(rationale_text(record["rationale"], swap), kind=batch.RATIONALE)
    for name, values in row.columns.items():
        if batch.COLUMNS[name].owner == "P":  # a rationale's prompt has none
            absent = [batch.COLUMNS[name].absent]
            values += absent * (len(row.prompts) - len(values))
    return row
