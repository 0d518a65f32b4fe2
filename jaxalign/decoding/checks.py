"""Arguments of decoding that are refused before anything is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.decoding.rules import EOS_ID, PAD_ID, Constraint

Prefixes = Sequence[Sequence[Sequence[int]]]  # by prompt and sample, token ids


def check_sizes(**sizes: int) -> None:
    """Refuses sizes below 1, by name."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}.")


def check_within(name: str, value: int, low: int, high: int) -> None:
    """Refuses numbers that do not lie between two, by name."""
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value}.")


def check_uint32(name: str, value: int) -> None:
    """Refuses what is no unsigned number of 32 bits, as ids and seeds are."""
    if not 0 <= value < 2**32:
        raise ValueError(f"{name} must lie in [0, 2**32), got {value}.")


def check_constraint(
    constraint: Constraint | None, max_new_tokens: int, prefixes: Prefixes = ()
) -> None:
    """Refuses a constraint that no response can meet, or a prefix that breaks it."""
    if constraint is None:
        return

    def allowed(state: Any, position: int) -> np.ndarray:
        remaining = np.int32(max_new_tokens - position)
        return np.asarray(constraint.allowed(state, remaining))

    if not allowed(constraint.start(), 0).any():
        needed = getattr(constraint, "fewest_tokens", "one more")
        raise ValueError(
            f"No response of max_new_tokens={max_new_tokens} tokens, EOS included, "
            f"meets the constraint, which needs at least {needed}: allow more tokens, "
            "or a shorter text."
        )
    for b, rows in enumerate(prefixes):
        for n, row in enumerate(rows):
            state = constraint.start()
            for position, token in enumerate(row):
                if not allowed(state, position)[token]:
                    raise ValueError(
                        f"prefixes[{b}][{n}] breaks the constraint at its token "
                        f"{position} (id {token}): behind it no response of "
                        f"{max_new_tokens} tokens meets it. Change either."
                    )
                state = constraint.advance(state, np.int32(token))
            if len(row) == max_new_tokens or not allowed(state, len(row)).any():
                raise ValueError(
                    f"prefixes[{b}][{n}] leaves no token for what the constraint still "
                    f"needs; max_new_tokens is {max_new_tokens}, prefix included."
                )


def pad_prefixes(
    prefixes: Prefixes, num_samples: int, length: int, eos_id: int = EOS_ID
) -> tuple[np.ndarray, np.ndarray]:
    """Arrays ``[B, N, T]`` and lengths ``[B, N]`` of forced prefixes."""
    padded = np.full((len(prefixes), num_samples, length), PAD_ID, np.int32)
    lengths = np.zeros((len(prefixes), num_samples), np.int32)
    for b, rows in enumerate(prefixes):
        if len(rows) > num_samples:
            raise ValueError(
                f"prefixes[{b}] has {len(rows)} rows for {num_samples} samples."
            )
        for n, row in enumerate(rows):
            if len(row) > length:
                raise ValueError(
                    f"prefixes[{b}][{n}] has {len(row)} tokens; max_new_tokens is "
                    f"{length}, prefix included."
                )
            if eos_id in list(row):
                raise ValueError(
                    f"prefixes[{b}][{n}] holds EOS ({eos_id}), after which nothing can "
                    "be sampled; leave it out."
                )
            padded[b, n, : len(row)] = row
            lengths[b, n] = len(row)
    return padded, lengths
