"""Rows that are derived anew each time they are fed: masks, shuffled examples.

``augment(row, rng) -> row`` keeps all lengths, on which the packing plan rests; what
changes them belongs into the preparation of the data. Its randomness comes from the
seed, the epoch and the row: a run that goes on, on any number of processes, gets the
same rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxalign import user_code
from jaxalign.data.rows import Row, check_row

Augment = Callable[[Row, np.random.Generator], Row]


def augmented(
    augment: Augment, row: Row, *, seed: int, epoch: int, row_id: int, vocab_size: int
) -> Row:
    """What the network is fed for a row in an epoch; all lengths as they were."""
    rng = np.random.default_rng([seed % 2**63, epoch, row_id])
    made = augment(row, rng)
    name = getattr(augment, "__name__", repr(augment))
    if not isinstance(made, Row):
        raise ValueError(
            f"{name} made a {type(made).__name__} of row {row.key!r}: expected a Row."
        )
    check_row(made, vocab_size)
    for what in ("prompts", "responses"):
        before, after = ([len(ids) for ids in getattr(r, what)] for r in (row, made))
        if before != after:
            raise ValueError(
                f"{name} changed the lengths of row {row.key!r}: {what} had {before} "
                f"tokens, now {after}. The packing is planned by lengths: what changes "
                "them belongs into the preparation of the data."
            )
    if len(row.pairs) != len(made.pairs):
        raise ValueError(
            f"{name} changed the number of pairs of row {row.key!r} from "
            f"{len(row.pairs)} to {len(made.pairs)}: the batch has a place for "
            "each, and the plan counts them."
        )
    return made


def identity(augment: Augment) -> str:
    """The function's name, what it was given, and the SHA-256 of its module.

    >>> import functools
    >>> identity(functools.partial(max, key=len)).startswith("max(key=")
    True
    """
    function = getattr(augment, "func", augment)
    given = [*map(repr, getattr(augment, "args", ()))]
    given += [f"{k}={v!r}" for k, v in getattr(augment, "keywords", {}).items()]
    name = getattr(function, "__qualname__", type(function).__qualname__)
    if dataclasses.is_dataclass(function):
        given += [f"{k}={v!r}" for k, v in vars(function).items()]
    return f"{name}({', '.join(given)}) of {user_code.source_digest(function)[:16]}"
