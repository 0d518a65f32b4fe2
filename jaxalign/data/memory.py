"""A tokenised cache in memory: lists of texts, or rows, where a feed wants a cache."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign import batch as batch_lib
from jaxalign.data.feed import Feed
from jaxalign.data.plan import pack
from jaxalign.data.rows import Row, build_index, check_row


class MemoryCache:
    """Rows that are held in memory, with what a `Feed` asks of a `TokenizedCache`.

    Args:
      rows: at least one.
      vocabulary: that made their ids.
      name: in messages, for a path.

    Attributes:
      path: that name.
      index: the `Index` of all rows.
      vocabulary: as given.
      fingerprint, content_fingerprint: SHA-256 over the rows.
      vocabulary_fingerprint: identity of the vocabulary.

    Raises:
      ValueError: naming a row that breaks the schema, or that there is none.
    """

    def __init__(self, rows: Iterable[Row], vocabulary: Any, name: str = "memory"):
        self.path, self.vocabulary = name, vocabulary
        self._rows = list(rows)
        if not self._rows:
            raise ValueError(f"No rows for {self!r}: expected at least one.")
        digest = hashlib.sha256()
        for row in self._rows:
            check_row(row, vocabulary.vocab_size)
            record = row.to_bytes()
            digest.update(len(record).to_bytes(8, "little") + record)
        self.index = build_index(self._rows)
        self.fingerprint = self.content_fingerprint = digest.hexdigest()
        self.vocabulary_fingerprint: str = vocabulary.fingerprint

    def __repr__(self) -> str:
        return f"MemoryCache({self.path!r}, {len(self)} rows)"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Row:
        return self._rows[i]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)


Text = str | Sequence[int]  # ids are taken as they are, EOS or none


def from_texts(
    vocabulary: Any, prompts: Sequence[Text], responses: Sequence[Text]
) -> MemoryCache:
    """A cache of responses to prompts, one a row, in their order."""
    return MemoryCache(
        (
            text_row(str(i), vocabulary, prompt, [response])
            for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        ),
        vocabulary,
        "texts",
    )


def text_row(
    key: str,
    vocabulary: Any,
    prompt: Text,
    responses: Sequence[Text],
    *,
    rewards: Sequence[float] | None = None,
    labels: Sequence[int] | None = None,
    pairs: Sequence[tuple[int, int, float]] = (),
) -> Row:
    """A row of one prompt and the responses to it."""

    def ids(text: Text) -> np.ndarray:
        if isinstance(text, str):
            text = [*vocabulary.encode(text), vocabulary.eos_id]
        return np.array(text, np.int32)

    count = len(responses)
    return Row(
        key=key,
        prompts=[ids(prompt)],
        responses=[ids(text) for text in responses],
        response_prompt=[0] * count,
        response_kind=[batch_lib.ANSWER] * count,
        response_reward=list(rewards or [float("nan")] * count),
        response_label=list(labels or [batch_lib.NO_LABEL] * count),
        pairs=list(pairs),
    )


def feed(
    cache: MemoryCache,
    *,
    lengths: Mapping[str, int] | None = None,
    batch_size: int = 16,
) -> Feed:
    """A feed over texts, whose shapes few different lists of texts set apart.

    Args:
      cache: the texts.
      lengths: ``{"inputs": n, "targets": m}``, what prompts and responses are cut to;
        None: nothing is cut.
      batch_size: encoder rows in a batch.
    """
    longest = {
        "inputs": power_of_two(int(cache.index.prompt_lengths.max()), 16),
        "targets": power_of_two(int(cache.index.response_lengths.max()), 16),
    }
    plan = pack(cache.index, **dict(lengths or longest), packing=1)
    shape = dataclasses.replace(
        plan.shape,
        prompts=power_of_two(plan.shape.prompts),
        responses=power_of_two(plan.shape.responses),
    )
    source = (cache, plan.with_shape(shape), 1.0)
    return Feed([source], batch_size=batch_size, shuffle=False)


def power_of_two(size: int, least: int = 1) -> int:
    """The next power of two, so that sizes that are alike share a compilation."""
    return max(least, 1 << (size - 1).bit_length())
