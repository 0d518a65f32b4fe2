"""The feed: the global batch at step ``s`` as a pure function of (cache, seed, s).

Every process computes its own rows of the same batch, resuming at any step costs
nothing, and another number of processes changes nothing. Grain supplies the index
arithmetic (shuffle, repeat, mix) and the prefetching threads.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

from jaxalign import batch as batch_lib
from jaxalign.data import augment as augment_lib
from jaxalign.data import convert
from jaxalign.data.augment import Augment
from jaxalign.data.cache import TokenizedCache
from jaxalign.data.plan import Plan, common_shape
from jaxalign.data.rows import Row

_EMPTY_SLOT = (-1, -1, 0)
_LAST_STEP = 2**31 - 1


class Feed:
    """Batches from one or several caches.

    Args:
      sources: ``(cache, plan, rate)``. Rates are the shares of *rows of the cache*
        (examples, as in seqio's mixtures), in any unit; a source whose bins hold
        fewer examples gives more bins. Plans are widened to their common shape.
      batch_size: ``B``, bins in a global batch.
      seed: of the shuffling.
      shuffle: a new order each epoch; False: the plan's order, again and again.
      reward_stats: mean and deviation that standardise ``response_reward``; then every
        answer must have a reward.
      columns: arrays by name (of ``batch.COLUMNS``), one for each source: a value for
        each prompt, response or pair of the cache, in the order of its index; of a
        column of tokens, a list of arrays.
      row_columns: names of columns that the rows themselves hold.
      augment: makes of a row what is fed in an epoch (:mod:`jaxalign.data.augment`);
        in :meth:`evaluation_batches` as in the first.

    Attributes:
      shape: the :class:`RowShape` of a batch row.
      batch_size, seed, augment: as given.
      fingerprint: SHA-256 over all that determines the batches but ``columns``.

    Raises:
      ValueError: when sources do not belong together, a column is missing or does not
        cover its cache, or rewards are asked for and absent.

    Example::

        cache = TokenizedCache(path)
        plan = pack(cache.index, inputs=256, targets=512, packing=2)
        feed = Feed([(cache, plan, 1.0)], batch_size=8, seed=0)
        for batch in feed.iterate(start_step=100): ...
    """

    def __init__(
        self,
        sources: Sequence[tuple[TokenizedCache, Plan, float]],
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        reward_stats: tuple[float, float] | None = None,
        columns: Mapping[str, Sequence[np.ndarray]] | None = None,
        row_columns: Sequence[str] = (),
        augment: Augment | None = None,
    ):
        if not sources:
            raise ValueError("A feed needs at least one (cache, plan, rate).")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.caches = [cache for cache, _, _ in sources]
        self.shape = common_shape([plan for _, plan, _ in sources])
        self.plans = [plan.with_shape(self.shape) for _, plan, _ in sources]
        self.batch_size, self.seed, self.augment = batch_size, seed, augment
        self._reward_stats = reward_stats
        rates = [float(rate) for _, _, rate in sources]
        _check_sources(self.caches, self.plans, rates, reward_stats)
        self._row_columns = tuple(row_columns)
        self._set_columns(columns or {})
        rows = [cache.index.num_rows for cache in self.caches]
        self._row_starts = np.cumsum([0, *rows])
        sizes = [len(plan.row_ids) for plan in self.plans]

        streams = []
        for i, plan in enumerate(self.plans):
            bins = grain.MapDataset.range(len(plan))
            if shuffle:
                # Grain adds the epoch to the seed: hashing keeps the epochs of one
                # seed apart from those of the next.
                digest = hashlib.sha256(f"{seed}/{i}".encode()).digest()
                bins = bins.shuffle(seed=int.from_bytes(digest[:4], "little"))
            streams.append(bins.repeat().map_with_index(_slot(i, len(plan))))
        bin_rates = [
            rate * len(plan) / size
            for rate, plan, size in zip(rates, self.plans, sizes, strict=True)
        ]
        self._stream = (
            grain.MapDataset.mix(streams, weights=bin_rates)
            if len(streams) > 1
            else streams[0]
        )
        identity = {
            "caches": [[c.fingerprint, c.content_fingerprint] for c in self.caches],
            "plans": [plan.fingerprint for plan in self.plans],
            "rates": rates,
            "batch_size": batch_size,
            "seed": seed,
            "shuffle": shuffle,
            "reward_stats": reward_stats,
        }
        if augment is not None:
            identity["augment"] = augment_lib.identity(augment)
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    @property
    def steps_per_epoch(self) -> int:
        """Steps that hold as many bins as there are, rounded up."""
        return -(-self.num_bins // self.batch_size)

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every array of a global batch."""
        row = convert.empty_batch(self.shape, 1, self._extra)
        return {
            name: jax.ShapeDtypeStruct((self.batch_size, *a.shape[1:]), a.dtype)
            for name, a in row.items()
        }

    def _set_columns(self, columns: Mapping[str, Sequence[np.ndarray]]) -> None:
        self._columns = _check_columns(columns, self.caches)
        # Columns beside those of every batch, with the sizes of their vectors.
        self._extra = {n: batch_lib.COLUMNS[n].size for n in self._row_columns} | {
            name: convert.vector_size(name, array)
            for name, (array, *_) in self._columns.items()
        }

    def batch(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """The global batch at a step, or some of its rows.

        Args:
          step: from 0.
          rows: of the global batch, e.g. one process's; None: all.

        Returns:
          The arrays of ``batch.COLUMNS`` as numpy.
        """
        return self._convert(self._slots(step, rows))

    def iterate(
        self,
        start_step: int = 0,
        rows: slice | None = None,
        *,
        state: Callable[[], Any] | None = None,
        threads: int = 2,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches from a step on, without end, prepared ahead by threads.

        Args:
          start_step: the first batch's step.
          rows: as in :meth:`batch`.
          state: the state of the training as it is when a batch is asked for, for a
            source that samples from it; what is on disk does not look at it.
          threads: preparing batches; 0 prepares each when it is asked for.
        """
        del state
        steps = grain.MapDataset.range(start_step, _LAST_STEP)
        return _ahead(steps.map(lambda step: self.batch(int(step), rows)), threads)

    def with_columns(self, columns: Mapping[str, Sequence[np.ndarray]]) -> Feed:
        """The same feed with other ``columns``; batches and fingerprint stay."""
        feed = copy.copy(self)
        feed._set_columns(columns)
        return feed

    @property
    def num_bins(self) -> int:
        """Bins of all sources."""
        return sum(map(len, self.plans))

    def evaluation_batches(
        self, rows: slice | None = None, bins: Sequence[int] | None = None
    ) -> EvaluationBatches:
        """Every bin once, in the plans' order; empty rows fill the last batch.

        Args:
          rows: as in :meth:`batch`.
          bins: only these, of ``range(num_bins)``, in this order.
        """
        return EvaluationBatches(self, rows, bins)

    def _slots(self, step: int, rows: slice | None) -> list[tuple[int, int, int]]:
        """(source, bin, epoch) of each asked row of a step's batch."""
        if step < 0:
            raise ValueError(f"Steps count from 0, got {step}.")
        wanted = range(self.batch_size)[rows or slice(None)]
        return [self._stream[step * self.batch_size + i] for i in wanted]

    def _convert(self, slots: Sequence[tuple[int, int, int]]) -> dict[str, np.ndarray]:
        batch = convert.empty_batch(self.shape, len(slots), self._extra)
        for i, (source, bin_id, epoch) in enumerate(slots):
            if bin_id < 0:
                continue
            cache, placement = self.caches[source], self.plans[source][bin_id]
            rows = [self._row(source, r, epoch) for r in placement.row_ids.tolist()]
            columns = {n: _of_rows(n, rows) for n in self._row_columns}
            for name, column in self._columns.items():
                ids = _flat(cache, placement.row_ids, batch_lib.COLUMNS[name].owner)
                values = column[source]
                columns[name] = (
                    values[ids]
                    if isinstance(values, np.ndarray)
                    else [values[i] for i in ids.tolist()]
                )
            convert.to_arrays(
                rows,
                placement,
                self.shape,
                columns,
                reward_stats=self._reward_stats,
                prompt_ids=placement.row_ids + self._row_starts[source],
                out={name: array[i] for name, array in batch.items()},
            )
        return batch

    def _row(self, source: int, number: int, epoch: int) -> Row:
        cache = self.caches[source]
        row = cache[number]
        if self.augment is None:
            return row
        return augment_lib.augmented(
            self.augment,
            row,
            seed=self.seed,
            epoch=epoch,
            row_id=int(self._row_starts[source]) + number,
            vocab_size=cache.vocabulary.vocab_size,
        )


class EvaluationBatches(Sequence):
    """Every bin of a feed once (or some of them), in batches of the training shape.

    A finite sequence of batches; :class:`jaxalign.data.items.Items` says what stands
    where in them.
    """

    def __init__(
        self,
        feed: Feed,
        rows: slice | None = None,
        bins: Sequence[int] | None = None,
    ):
        self._feed, self._rows = feed, rows
        self._all = [
            (source, bin_id, 0)
            for source, plan in enumerate(feed.plans)
            for bin_id in range(len(plan))
        ]
        if bins is not None:
            self._all = [self._all[i] for i in bins]

    def __len__(self) -> int:
        return -(-len(self._all) // self._feed.batch_size)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return self._feed._convert(self._slots(i))

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        steps = grain.MapDataset.range(len(self))
        return _ahead(steps.map(lambda i: self[int(i)]), 2)

    def _slots(self, i: int) -> list[tuple[int, int, int]]:
        if not 0 <= i < len(self):
            raise IndexError(f"Batch {i} of {len(self)}.")
        size = self._feed.batch_size
        slots = self._all[i * size : (i + 1) * size]
        slots = slots + [_EMPTY_SLOT] * (size - len(slots))
        return slots[self._rows or slice(None)]


def _slot(source: int, size: int) -> Callable[[int, Any], tuple[int, int, int]]:
    return lambda n, bin_id: (source, int(bin_id), n // size)


def _ahead(dataset: grain.MapDataset, threads: int) -> Iterator[Any]:
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(dataset.to_iter_dataset(options))


def _of_rows(name: str, rows: Sequence[Row]) -> list[Any]:
    """The values of a column that the rows of a bin hold."""
    column = batch_lib.COLUMNS[name]
    values: list[Any] = []
    for row in rows:
        if name not in row.columns and not column.optional:
            raise ValueError(
                f"Row {row.key!r} has no column {name!r}: prepare the data again with "
                "an objective that asks for it."
            )
        if name in row.columns:
            values += row.columns[name]
            continue
        values += [
            np.full(len(place), column.empty) if column.owner in "ED" else column.absent
            for place in row.places(name)
        ]
    return values


def _flat(cache: TokenizedCache, row_ids: np.ndarray, owner: str) -> np.ndarray:
    """Flat ids of rows' prompts, responses or pairs, in their order."""
    offsets = cache.index.offsets(owner)
    return np.concatenate(
        [np.arange(offsets[i], offsets[i + 1]) for i in row_ids.tolist()]
    )


def _check_sources(
    caches: Sequence[TokenizedCache],
    plans: Sequence[Plan],
    rates: Sequence[float],
    reward_stats: tuple[float, float] | None,
) -> None:
    for cache, plan, rate in zip(caches, plans, rates, strict=True):
        index = cache.index
        left_out = plan.left_out
        if (
            len(plan.row_ids) + left_out["rows"],
            len(plan.decoder_rows) + left_out["responses"],
        ) != (index.num_rows, index.num_responses):
            raise ValueError(
                f"The plan covers {len(plan.row_ids)} rows with "
                f"{len(plan.decoder_rows)} responses, {cache!r} has {index.num_rows} "
                f"with {index.num_responses}: plan this cache."
            )
        if not 0 < rate < float("inf"):
            raise ValueError(f"The rate of {cache!r} must be positive, got {rate}.")
        if cache.vocabulary_fingerprint != caches[0].vocabulary_fingerprint:
            raise ValueError(
                f"{cache!r} and {caches[0]!r} were made with different vocabularies: "
                "prepare them with the same one."
            )
        answers = index.response_kind == batch_lib.ANSWER
        bare = int((answers & np.isnan(index.response_reward)).sum())
        if reward_stats is not None and bare:
            raise ValueError(
                f"{bare} of {int(answers.sum())} answers in {cache!r} have no reward: "
                "expected the 'trajectory' schema with a 'reward' field in every row."
            )
    if reward_stats is not None and not reward_stats[1] > 0:
        raise ValueError(
            f"reward_stats has deviation {reward_stats[1]}, must be positive."
        )


def _check_columns(
    columns: Mapping[str, Sequence[np.ndarray]], caches: Sequence[TokenizedCache]
) -> dict[str, list[Any]]:
    checked = {}
    for name, arrays in columns.items():
        batch_lib.extra([name], "")  # there is such a column
        column = batch_lib.COLUMNS[name]
        if column.source == "batch":
            raise ValueError(f"{name!r} is in every batch and no column to join.")
        if isinstance(arrays, np.ndarray) and arrays.ndim == 1 + column.vector:
            arrays = [arrays]
        if len(arrays) != len(caches):
            raise ValueError(
                f"Column {name!r} has {len(arrays)} arrays for {len(caches)} sources: "
                "give one for each."
            )
        for array, cache in zip(arrays, caches, strict=True):
            size = int(cache.index.offsets(column.owner)[-1])
            found = None if array is None else (len(array),)
            flat = column.owner not in "ED"
            if found and flat and np.ndim(array) != 1 + column.vector:
                found = np.shape(array)
            if found != (size,):
                raise ValueError(
                    f"Column {name!r} is missing for {cache!r}: expected {size} "
                    f"values, got {found}. Run the pass that makes it over this cache."
                )
            unknown = sum(int(np.isnan(v).sum()) for v in ([array] if flat else array))
            if unknown:
                raise ValueError(
                    f"Column {name!r} lacks {unknown} of {size} values of {cache!r} "
                    "(nan): the reference pass did not finish."
                )
        checked[name] = [
            np.asarray(array, column.dtype) if column.owner not in "ED" else list(array)
            for array in arrays
        ]
    return checked
