"""What the values of a column belong to, and where it stands in a feed's batches.

The prefix of a column's name says what one value belongs to, as in `jaxalign.batch`: a
prompt, a response, a pair, or (``encoder_``, ``decoder_``) a token. Such items are
numbered over all sources of a feed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign import batch as batch_lib
from jaxalign.data.feed import Feed

_WORDS = {
    "P": "prompt",
    "R": "response",
    "Q": "pair",
    "E": "prompt token",
    "D": "response token",
}


def item_name(column: str) -> str:
    """What one value of a column belongs to, in words.

    >>> item_name("decoder_old_logps")
    'response token'
    """
    return _WORDS[batch_lib.axes_of(column)[-1]]


class Items:
    """The items of a feed that a column has a value for.

    Prompts, responses and pairs are numbered in the order of the rows; tokens in the
    order of these, those that are cut off left out.

    Args:
      feed: the feed.
      column: its name.

    Attributes:
      count: the number of items.
      shape: of the axes of a batch that hold them, without ``B``.

    Raises:
      ValueError: when the name's prefix is of no axis.
    """

    def __init__(self, feed: Feed, column: str):
        _, *letters = batch_lib.axes_of(column)
        self._feed, self._owner, self.count = feed, letters[-1], 0
        axes = feed.shape.axes()
        self.shape = tuple(axes[letter] for letter in letters)
        self._first_bins = np.cumsum([0, *map(len, feed.plans)])
        self._first_items: list[np.ndarray] = []  # of each row
        self._first_tokens: list[np.ndarray] = []  # of each prompt or response
        for cache, plan in zip(feed.caches, feed.plans, strict=True):
            index = cache.index
            offsets = index.offsets(self._owner)
            if self._owner in "PRQ":
                self._first_items.append(self.count + offsets)
                self.count = int(self._first_items[-1][-1])
                continue
            lengths = {
                "E": np.minimum(index.prompt_lengths, plan.inputs),
                "D": np.minimum(index.response_lengths, plan.targets),
            }[self._owner]
            self._first_items.append(offsets)
            ends = np.cumsum(lengths, dtype=np.int64)
            self._first_tokens.append(self.count + np.concatenate([[0], ends]))
            self.count = int(self._first_tokens[-1][-1])

    def split(self, values: np.ndarray) -> list[Any]:
        """A column's values by source, as `Feed` takes them.

        Args:
          values: ``[count, ...]``.

        Returns:
          An array for each source; of tokens, a list with one for each text.
        """
        if len(values) != self.count:
            raise ValueError(f"A column of {self.count} values, got {len(values)}.")
        if self._first_tokens:
            return [
                [values[a:b] for a, b in itertools.pairwise(first)]
                for first in self._first_tokens
            ]
        return [values[first[0] : first[-1]] for first in self._first_items]

    def of(self, bins: Sequence[int]) -> np.ndarray:
        """``[B, *shape]`` int64, the items in a batch of these bins; -1: none."""
        ids = np.full((self._feed.batch_size, *self.shape), -1, np.int64)
        for row, number in zip(ids, bins, strict=False):
            source = int(np.searchsorted(self._first_bins, number, side="right")) - 1
            placement = self._feed.plans[source][number - self._first_bins[source]]
            first = self._first_items[source]
            items = [
                i for r in placement.row_ids for i in range(first[r], first[r + 1])
            ]
            if not self._first_tokens:
                row[: len(items)] = items
                continue
            # As `convert` lays them down: side by side, each in its decoder row.
            rows = row.reshape(-1, row.shape[-1])
            where = placement.decoder_rows.tolist()
            if self._owner == "E":
                where = [0] * len(items)
            cursor = [0] * len(rows)
            for k, i in zip(where, items, strict=True):
                begin, end = self._first_tokens[source][i : i + 2].tolist()
                rows[k, cursor[k] : cursor[k] + end - begin] = range(begin, end)
                cursor[k] += end - begin
        return ids
