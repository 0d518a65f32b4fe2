"""Data made on the fly: ``DATA='synthetic:reverse'``, rows without end or repetition.

The global batch of a step is a pure function of (task, seed, step), as any feed's, and
each process makes its own rows of it. A task is a function ``(rng, **options) ->
{"prompt", "completion", "rejected"}``: `TASKS` has small ones, on which a training run
shows in a minute whether it learns, and ``synthetic:my_tasks.py:function`` names yours.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign import batch as batch_lib
from jaxalign import user_code
from jaxalign.data import convert, memory
from jaxalign.data.feed import Feed
from jaxalign.data.plan import Placement, Plan
from jaxalign.data.rows import Row

Task = Callable[..., Mapping[str, str]]

PREFIX = "synthetic:"
SCHEMAS = ("supervised", "trajectory", "preference")
_EVALUATION_ROWS = 256


def of_letters(
    change: Callable[[str], str],
    rng: np.random.Generator,
    *,
    length: int = 5,
    alphabet: str = "abcdefghij",
) -> dict[str, str]:
    """A word of up to `length` letters, what is made of it, and a wrong answer."""
    letters = rng.choice(list(alphabet), rng.integers(1, length + 1))
    answer = change("".join(letters))
    wrong = list(answer)
    where = int(rng.integers(len(wrong)))
    wrong[where] = str(rng.choice([c for c in alphabet if c != wrong[where]]))
    return {
        "prompt": "".join(letters),
        "completion": answer,
        "rejected": "".join(wrong),
    }


def addition(rng: np.random.Generator, *, digits: int = 2) -> dict[str, str]:
    """A sum of two numbers of up to so many digits; the wrong answer is near."""
    a, b = (int(n) for n in rng.integers(0, 10**digits, 2))
    wrong = a + b + int(rng.choice([-10, -1, 1, 10]))
    return {
        "prompt": f"{a}+{b}",
        "completion": str(a + b),
        "rejected": str(abs(wrong)),
    }


TASKS: dict[str, Task] = {
    "copy": functools.partial(of_letters, str),
    "reverse": functools.partial(of_letters, lambda word: word[::-1]),
    "sort": functools.partial(of_letters, lambda word: "".join(sorted(word))),
    "sum": addition,
}


def task(data: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task that ``DATA`` names, with its options.

    Raises:
      ValueError: when there is no such task, with the nearest there is.

    >>> task("synthetic:sum", {"digits": 1})(np.random.default_rng(0))["prompt"]
    '8+6'
    """
    name = data.removeprefix(PREFIX)
    module, _, function = name.rpartition(":")
    if module:
        found = getattr(user_code.load_module(module), function, None)
    else:
        found = TASKS.get(name)
    if not callable(found):
        raise ValueError(
            f"No synthetic task {name!r}.{user_code.hint(name, TASKS)} There are "
            f"{sorted(TASKS)}, and functions: 'synthetic:my_tasks.py:function'."
        )
    return functools.partial(found, **dict(options or {}))


class SyntheticCache(memory.MemoryCache):
    """The first rows of a task, which say what the data is, and how to make more.

    Args:
      task: makes an example.
      schema: of `SCHEMAS`.
      vocabulary: makes ids of its texts.
      seed: of the rows.
      held_out: rows that no training sees with this seed, but by chance.
      count: of the rows held in memory.
    """

    def __init__(
        self,
        task: Task,
        schema: str,
        vocabulary: Any,
        *,
        seed: int = 0,
        held_out: bool = False,
        count: int = 64,
    ):
        if schema not in SCHEMAS:
            raise ValueError(
                f"Synthetic data serves the schemas {SCHEMAS}, not {schema!r}: take "
                "another objective, or data from a file."
            )
        self._task, self.schema = task, schema
        self._seed = (seed % 2**63, int(held_out))
        self.vocabulary = vocabulary
        rows = (self.make(number) for number in range(count))
        super().__init__(rows, vocabulary, "synthetic data")

    def make(self, number: int) -> Row:
        """Any row, from (seed, number) alone."""
        rng = np.random.default_rng([*self._seed, number])
        made = self._task(rng)
        texts, known = [made["completion"]], {}
        if self.schema == "preference":
            texts.append(made["rejected"])
            known["pairs"] = [(0, 1, 0.0)]
        elif self.schema == "trajectory":
            right = bool(rng.integers(2))
            texts = [made["completion" if right else "rejected"]]
            known["rewards"] = [float(right)]
            known["labels"] = [batch_lib.DESIRABLE if right else batch_lib.UNDESIRABLE]
        return memory.text_row(
            str(number), self.vocabulary, made["prompt"], texts, **known
        )


def caches(
    data: str,
    schema: str,
    vocabulary: Any,
    *,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    split_seed: int = 0,
) -> dict[str, list[SyntheticCache]]:
    """The caches that ``DATA='synthetic:...'`` stands for, by split."""
    made = functools.partial(SyntheticCache, task(data, options), schema, vocabulary)
    held_out = made(seed=split_seed, held_out=True, count=_EVALUATION_ROWS)
    return {"train": [made(seed=seed)], "validation": [held_out]}


class SyntheticFeed(Feed):
    """A feed whose rows are made when they are asked for.

    Args:
      sources: one `SyntheticCache`, the plan of its rows and any rate. An encoder row
        gets as many examples as surely fit.
      **settings: of `Feed`.
    """

    endless = True

    def __init__(
        self, sources: Sequence[tuple[SyntheticCache, Plan, float]], **settings: Any
    ):
        ((cache, plan, rate),) = sources
        self._count = max(1, plan.shape.encoder_length // plan.inputs)
        self._responses = len(cache[0].responses)
        least = {
            "prompts": self._count,
            "responses": self._count * self._responses,
            "pairs": self._count * len(cache[0].pairs),
        }
        sizes = {n: max(size, getattr(plan.shape, n)) for n, size in least.items()}
        plan = plan.with_shape(dataclasses.replace(plan.shape, **sizes))
        super().__init__([(cache, plan, rate)], **settings)

    def batch(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """The global batch at a step, or some of its rows; see `Feed.batch`."""
        cache, plan, count = self.caches[0], self.plans[0], self._count
        numbers = range(self.batch_size)[rows or slice(None)]
        batch = convert.empty_batch(self.shape, len(numbers))
        decoder_rows = np.tile(np.arange(self._responses), count)
        for i, number in enumerate(numbers):
            first = (step * self.batch_size + number) * count
            ids = np.arange(first, first + count)
            convert.to_arrays(
                [cache.make(k) for k in ids.tolist()],
                Placement(ids, decoder_rows, plan.inputs, plan.targets, plan.cut),
                self.shape,
                reward_stats=self._reward_stats,
                prompt_ids=ids % 2**31,
                out={name: array[i] for name, array in batch.items()},
            )
        return batch
