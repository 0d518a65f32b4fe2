"""Raw rows to checked records, and those to tokenised rows of the cache.

The records of one source row that share a prompt become one cache row: its prompt is
stored, and later encoded, once.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    """An :class:`Example` that is tokenised already.

    Attributes:
      rows: its rows of the cache.
      left_out: how many of its responses a transform left out on purpose.
    """

    rows: list[Row]
    left_out: int


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the raw rows of a source become rows of a cache; other processes take it.

    Attributes:
      schema: ``supervised``, ``trajectory``, ``preference`` or ``rationale``.
      vocabulary: turns text into ids.
      names: names of files that tell them apart, for the keys of rows; a file that is
        not among them is called by its path.
      field_map: see ``data.records.examples``, as are the next three.
      transform: a data set's own function from a raw row to records.
      require: what trajectories must have.
      desirable_above: rewards above it make a missing label desirable.
      seed: decides the order of answers in rationale prompts.
      columns: names of ``batch.COLUMNS`` that the rows hold.
    """

    schema: str
    vocabulary: Vocabulary
    names: frozenset[str] = frozenset()
    field_map: Mapping[str, str] | None = None
    transform: records_lib.Transform | None = None
    require: Sequence[str] = ()
    desirable_above: float | None = None
    seed: int = 0
    columns: Sequence[str] = ()

    def examples(
        self, rows: Iterable[tuple[str, int, Mapping[str, Any] | BadRow]]
    ) -> Iterator[Example | BadRow]:
        """Checks raw rows, ``(file, line, row or BadRow)``."""
        for item in records_lib.examples(
            rows,
            self.schema,
            field_map=self.field_map,
            transform=self.transform,
            require=self.require,
            desirable_above=self.desirable_above,
            columns=self.columns,
        ):
            try:
                for record in getattr(item, "records", ()):
                    check_metadata(record.get("metadata"))
            except FieldError as error:
                yield error.at(item.file, item.line)
            else:
                yield item

    def build(self, example: Example) -> list[Row]:
        """Tokenises an example."""
        name = pathlib.Path(example.file).name
        key = f"{name if name in self.names else example.file}:{example.line}"
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
                yield Encoded(self.build(item), item.left_out)


def check_metadata(metadata: Any) -> None:
    """Raises FieldError for metadata that a cache cannot hold."""
    if not metadata:
        return
    try:
        msgpack.packb([metadata])
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise FieldError(
            "metadata",
            "not storable",
            "JSON values: texts that UTF-8 can hold, integers of at most 64 bits, "
            "numbers, true, false, null, lists and objects",
            str(error),
        ) from None


def build_rows(
    records: Sequence[Record],
    schema: str,
    vocabulary: Vocabulary,
    *,
    key: str,
    seed: int = 0,
) -> list[Row]:
    """Tokenises the records of one source row.

    Args:
      records: checked records of ``schema``.
      schema: ``supervised``, ``trajectory``, ``preference`` or ``rationale``.
      vocabulary: turns text into ids; EOS is added here.
      key: identity of the source row.
      seed: decides, together with the key, which answer a rationale prompt shows
        first.

    Returns:
      One row for each distinct prompt. ``metadata["prompt"]`` holds the prompt's text
      where the ids do not give it back, or where the row's own metadata has a
      ``prompt``, which is then kept as ``metadata["metadata.prompt"]``.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["prompt"], []).append(record)
    rows = []
    for i, (prompt, group) in enumerate(groups.items()):
        name = key if i == 0 else f"{key}#{i}"
        rows.append(_build_row(prompt, group, schema, vocabulary, name, seed))
    return rows


def _build_row(
    prompt: str,
    group: list[Record],
    schema: str,
    vocabulary: Vocabulary,
    key: str,
    seed: int,
) -> Row:
    builder = _RowBuilder(prompt, vocabulary)
    for i, record in enumerate(group):
        builder.add_metadata(record.get("metadata", {}))
        builder.add_columns(record.get("columns", {}))
        if schema in ("supervised", "trajectory"):
            builder.add_response(
                record["completion"],
                reward=record.get("reward", math.nan),
                label=record.get("label", batch.NO_LABEL),
            )
            continue
        # A response in several pairs is stored and scored once.
        chosen = builder.shared_response(record["chosen"])
        rejected = builder.shared_response(record["rejected"])
        builder.pairs.append((chosen, rejected, record.get("margin", 0.0)))
        if schema == "rationale":
            swap = chosen_comes_second(key, i, seed)
            question = rationale_prompt(record, swap)
            builder.prompts.append(builder.encode(question))
            builder.add_response(
                rationale_text(record["rationale"], swap),
                prompt=len(builder.prompts) - 1,
                kind=batch.RATIONALE,
            )
    return builder.row(key)


class _RowBuilder:
    """Collects the prompts and responses of one row."""

    def __init__(self, prompt: str, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.prompt = prompt
        self.prompts = [self.encode(prompt)]
        self.responses: list[dict[str, Any]] = []
        self.pairs: list[tuple[int, int, float]] = []
        self.metadata: dict[str, Any] = {}
        self.columns: dict[str, list[Any]] = {}
        self._known: dict[str, int] = {}
        if vocabulary.decode(self.prompts[0]) != prompt:
            self.metadata["prompt"] = prompt

    def add_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Takes in a record's metadata; ``prompt`` goes on being the prompt."""
        metadata = dict(metadata)
        if "prompt" in metadata:
            self.metadata["metadata.prompt"] = metadata.pop("prompt")
            self.metadata["prompt"] = self.prompt
        self.metadata |= metadata

    def add_columns(self, columns: Mapping[str, Any]) -> None:
        """Takes in what a record says of its pair, its response or its prompt."""
        for name, value in columns.items():
            values = self.columns.setdefault(name, [])
            if batch.COLUMNS[name].owner != "P":
                values.append(value)
            elif not values:  # records with one prompt share it
                values.append(value)

    def encode(self, text: str) -> np.ndarray:
        return np.array(
            [*self.vocabulary.encode(text), self.vocabulary.eos_id], np.int32
        )

    def add_response(
        self,
        text: str,
        *,
        reward: float = math.nan,
        label: int = batch.NO_LABEL,
        prompt: int = 0,
        kind: int = batch.ANSWER,
    ) -> int:
        self.responses.append(
            {
                "tokens": self.encode(text),
                "prompt": prompt,
                "kind": kind,
                "reward": reward,
                "label": label,
            }
        )
        return len(self.responses) - 1

    def shared_response(self, text: str) -> int:
        if text not in self._known:
            self._known[text] = self.add_response(text)
        return self._known[text]

    def row(self, key: str) -> Row:
        responses = self.responses
        for name, values in self.columns.items():
            column = batch.COLUMNS[name]
            if column.owner == "P":  # a rationale's prompt has none
                values += [column.absent] * (len(self.prompts) - len(values))
        return Row(
            key=key,
            prompts=self.prompts,
            responses=[r["tokens"] for r in responses],
            response_prompt=[r["prompt"] for r in responses],
            response_kind=[r["kind"] for r in responses],
            response_reward=[r["reward"] for r in responses],
            response_label=[r["label"] for r in responses],
            pairs=self.pairs,
            metadata=self.metadata,
            columns=self.columns,
        )
