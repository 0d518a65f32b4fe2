"""Which responses of a pool make a pair, and which pairs are worth learning from.

The rules of West-of-N (Pace et al. 2024, arXiv 2401.12086), each a function of texts
and numbers. What has no number is refused, never taken for 0.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

Asked = list[tuple[int, int, int]]  # pool, one response, another
Row = TypeVar("Row", bound=Mapping[str, Any])


def same_text(text: str) -> str:
    """What two texts share that a reader would call the same: spaces do not count.

    >>> same_text("Yes,\\n it is. ")
    'Yes, it is.'
    """
    return " ".join(text.split())


def distinct(responses: Iterable[str | None]) -> list[str]:
    """The first of each text, in order; empty ones are left out.

    An empty response is none to learn to prefer, nor may a data file hold one; a null
    one was never made.

    >>> distinct(["b", "a", "", "b ", None])
    ['b', 'a']
    """
    found: dict[str, str] = {}
    for text in responses:
        if text is not None and (key := same_text(text)):
            found.setdefault(key, text)
    return list(found.values())


def unseen(prompts: Iterable[str], held_out: Iterable[str]) -> list[str]:
    """Distinct prompts, in order, without those that are held out.

    Case and spaces do not make another prompt.

    >>> unseen(["One?", "one? ", "Two?", "Three?"], held_out=["two?"])
    ['One?', 'Three?']
    """
    taken = {same_text(prompt).casefold() for prompt in held_out}
    found = []
    for prompt in prompts:
        key = same_text(prompt).casefold()
        if key and key not in taken:
            taken.add(key)
            found.append(prompt)
    return found


def extremes(scores: Sequence[float]) -> tuple[int, int] | None:
    """Where the highest and the lowest score are; the first of equal ones.

    None where there is nothing to tell apart: fewer than two, or all equal.

    Raises:
      ValueError: for a score that is not finite.

    >>> extremes([0.2, 0.9, -1.0, 0.9])
    (1, 2)
    >>> extremes([0.5, 0.5]) is None
    True
    """
    found = np.asarray(scores, np.float64)
    if not np.isfinite(found).all():
        at = int(np.flatnonzero(~np.isfinite(found))[0])
        raise ValueError(f"The score of response {at} is {found[at]}; expected finite.")
    if found.size < 2 or found.max() == found.min():
        return None
    return int(found.argmax()), int(found.argmin())


def tournament(
    sizes: Sequence[int], prefer: Callable[[Asked], np.ndarray]
) -> list[tuple[int, int] | None]:
    """The best and the worst of each pool, by comparisons alone.

    Of N responses N/2 first matches part those that may be best from those that may be
    worst; a knock-out in either half ends it: about 3N/2 comparisons, and log2 N calls,
    each about all pools. Ties go to the lower index, in either half. With preferences
    that are consistent, these are the extremes; others may hide a better one, and may
    go round in a circle.

    Args:
      sizes: responses of each pool.
      prefer: given ``(pool, i, j)`` each, the probability that ``i`` is preferred.

    Returns:
      For each pool ``(best, worst)``; None with fewer than two responses, or when one
      came out as both.

    Raises:
      ValueError: for a preference that is not a number in [0, 1].

    >>> worth = [3, 1, 2, 0]
    >>> ahead = lambda asked: np.array([worth[i] > worth[j] for _, i, j in asked])
    >>> tournament([4], ahead)
    [(0, 3)]
    """
    if not len(sizes):
        return []
    first = [[(i, i + 1) for i in range(0, n - 1, 2)] for n in sizes]
    high: list[list[int]] = [[] for _ in sizes]
    low: list[list[int]] = [[] for _ in sizes]
    for g, (pairs, won) in enumerate(zip(first, _matches(first, prefer), strict=True)):
        for (i, j), ahead in zip(pairs, won, strict=True):
            high[g].append(i if ahead >= 0.5 else j)
            low[g].append(j if ahead >= 0.5 else i)
        if sizes[g] % 2:  # who met nobody may be either
            high[g].append(sizes[g] - 1)
            low[g].append(sizes[g] - 1)
    while any(len(pool) > 1 for pool in (*high, *low)):
        rounds = [
            [
                (a, b)
                for pool in half
                for a, b in zip(pool[::2], pool[1::2], strict=False)
            ]
            for half in zip(high, low, strict=True)
        ]
        for g, won in enumerate(_matches(rounds, prefer)):
            split = len(high[g]) // 2
            high[g] = _winners(high[g], won[:split])
            low[g] = _winners(low[g], 1.0 - won[split:])
    return [
        (best[0], worst[0]) if best and worst and best != worst else None
        for best, worst in zip(high, low, strict=True)
    ]


def _matches(
    rounds: Sequence[Sequence[tuple[int, int]]], prefer: Callable[[Asked], np.ndarray]
) -> list[np.ndarray]:
    asked = [(g, i, j) for g, pairs in enumerate(rounds) for i, j in pairs]
    found = np.asarray(prefer(asked) if asked else [], np.float64)
    if found.shape != (len(asked),):
        raise ValueError(f"Asked for {len(asked)} preferences, got {found.shape}.")
    bad = np.flatnonzero(~((found >= 0.0) & (found <= 1.0)))
    for at in bad[:1]:
        g, i, j = asked[at]
        raise ValueError(
            f"Responses {i} and {j} of pool {g}: the preference is {found[at]}; "
            "expected a number in [0, 1]."
        )
    return np.split(found, np.cumsum([len(pairs) for pairs in rounds])[:-1])


def _winners(pool: list[int], ahead: np.ndarray) -> list[int]:
    pairs = zip(pool[::2], pool[1::2], strict=False)
    won = [
        min(a, b) if value == 0.5 else a if value > 0.5 else b
        for (a, b), value in zip(pairs, ahead, strict=True)
    ]
    return won + pool[len(pool) - len(pool) % 2 :]


def confidence(best: float, worst: float) -> float:
    """The model's probability that the better one is preferred: Bradley-Terry.

    >>> round(confidence(1.0, 0.0), 6)
    0.731059
    """
    return float(1.0 / (1.0 + np.exp(np.float64(worst) - np.float64(best))))


def at_least(values: Sequence[float], quantile: float) -> np.ndarray:
    """Which values reach a quantile of them all; 0 keeps all, equal ones stay together.

    Raises:
      ValueError: for a quantile outside of [0, 1), or values that are no numbers.

    >>> at_least([0.9, 0.6, 0.7, 0.8], 0.5).tolist()
    [True, False, False, True]
    """
    if not 0.0 <= quantile < 1.0:
        raise ValueError(f"A quantile must lie in [0, 1), got {quantile}.")
    found = np.asarray(values, np.float64)
    if np.isnan(found).any():
        raise ValueError(f"Value {int(np.flatnonzero(np.isnan(found))[0])} is NaN.")
    if not found.size:
        return np.zeros(0, bool)
    return found >= np.quantile(found, quantile)


def rebalanced(before: Sequence[str], kept: Sequence[str]) -> list[int]:
    """Places in `kept` that have the shares of the sources that there were before.

    Filters drop more of one source than of another. Of each source the first ones are
    kept, as many as the source that lost most allows; one that lost all is left out.

    Args:
      before: the source of each pair before the filters.
      kept: of each that passed them, those to keep first at the front.

    >>> rebalanced(["a", "a", "b", "b"], ["a", "a", "b"])
    [0, 2]
    """
    names = sorted(set(kept))
    if not names:
        return []
    share = min(kept.count(name) / before.count(name) for name in names)
    room = {name: round(share * before.count(name)) for name in names}
    found = []
    for place, name in enumerate(kept):
        if room[name] > 0:
            room[name] -= 1
            found.append(place)
    return found


def mixture(human: Sequence[Row], synthetic: Sequence[Row], seed: int) -> list[Row]:
    """Both in equal numbers, shuffled: the shorter list is repeated.

    Whole repetitions, and the rest drawn without replacement, so that no row is left
    out and none counts more than once more than another of its kind.

    Raises:
      ValueError: when either is empty.

    >>> sorted(mixture("a", "xy", seed=0))
    ['a', 'a', 'x', 'y']
    """
    if not human or not synthetic:
        raise ValueError(
            f"A mixture needs rows of both kinds, got {len(human)} human and "
            f"{len(synthetic)} synthetic ones."
        )
    size, draw = max(len(human), len(synthetic)), random.Random(seed)
    found = []
    for rows in (human, synthetic):
        times, rest = divmod(size, len(rows))
        found += [*rows] * times + draw.sample([*rows], rest)
    draw.shuffle(found)
    return found
