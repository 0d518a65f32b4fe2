"""Vector bin packing with a bounded pool: the algorithm behind the packing plan.

An item asks for encoder tokens, for one *part* in each of ``K`` decoder rows (largest
first, zeros at the end) and for prompts; a bin offers a capacity of each. Bins are
filled one at a time from a pool of waiting items. While a bin is far from full it takes
the item that has waited longest, so that every bin gets its share of small and large
ones and none are left over; then the item that leaves the smallest weighted squared
residual (norm-based greedy of Panigrahy et al. 2011, "Heuristics for Vector Bin
Packing"). An item's largest part goes to the emptiest decoder row, which fits whenever
any one-part-a-row arrangement does and keeps the rows level.

Integer scores and a hashed order, so that every machine and every numpy finds the same
bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_POOL = 1024  # waiting items that a bin chooses from, over all decoder rows
_NEVER = 2**40  # the size of an empty slot of the pool
# Best fit begins when less than this many average items are left to fill. Measured on
# log-normal and uniform lengths: 0 leaves the small items to the end (93% full), 3
# fills 97 to 99%, and more gains only where a bin holds many items.
_BEST_FIT_BELOW = 3


class Packer:
    """Packs items into bins.

    Args:
      encoder: ``[N]`` encoder tokens of each item.
      parts: ``[N, K]`` decoder tokens by decoder row, descending.
      prompts: ``[N]`` prompts of each item.
      groups: ``[N]`` items of one group share their prompt.
      capacity: encoder tokens and tokens of each decoder row.
      max_prompts: prompts of a bin.

    Attributes:
      bins: items of each bin, in the order placed.
      decoder_row: ``[N, K]`` the decoder row of each part.
      alone: bins whose items are all of one group, when two groups were asked for.
    """

    def __init__(
        self,
        encoder: np.ndarray,
        parts: np.ndarray,
        prompts: np.ndarray,
        groups: np.ndarray,
        *,
        capacity: tuple[int, int],
        max_prompts: int,
    ):
        self._encoder, self._parts = encoder.astype(np.int64), parts.astype(np.int64)
        self._prompts, self._groups = prompts.astype(np.int64), groups
        self._capacity, self._max_prompts = capacity, max_prompts
        self.decoder_row = np.zeros(parts.shape, np.int32)
        self.bins: list[list[int]] = []
        self.alone: list[int] = []
        # What each bin still offers: encoder tokens, tokens by decoder row, prompts.
        self._room: list[list] = []

    def fill(self, two_groups: bool) -> None:
        """Packs every item; with ``two_groups`` no bin's second item repeats the first.

        Bins that found no second group are listed in ``alone``.
        """
        count, rows = self._parts.shape
        weights = self._weights()
        total = (int(self._encoder.sum()), int(self._parts.sum()) // rows)
        order = np.argsort(_mix(np.arange(count, dtype=np.uint64)), kind="stable")
        size = min(count, max(_POOL // rows, 64))
        pool, waiting = order[:size].copy(), np.arange(size)
        encoder, prompts = self._encoder[pool], self._prompts[pool]
        parts = np.ascontiguousarray(self._parts[pool].T)
        groups = self._groups[pool]
        upcoming = size
        placed = 0
        while placed < count:
            self._open()
            b, room = len(self.bins) - 1, self._room[-1]
            while True:
                level = sorted(room[1], reverse=True)
                fits = (encoder <= room[0]) & (prompts <= room[2])
                for k in range(rows):
                    fits &= parts[k] <= level[k]
                if two_groups and len(self.bins[b]) == 1:
                    fits &= groups != self._groups[self.bins[b][0]]
                slots = np.flatnonzero(fits)
                if not len(slots):
                    break
                items_left = min(
                    room[0] * count / total[0], level[-1] * count / max(total[1], 1)
                )
                if items_left > _BEST_FIT_BELOW:
                    slot = int(slots[np.argmin(waiting[slots])])
                else:
                    residual = room[0] - encoder[slots]
                    score = residual * residual * weights[0]
                    for k in range(rows):
                        residual = level[k] - parts[k][slots]
                        score += residual * residual * weights[1]
                    slot = int(slots[np.argmin(score)])
                self._place(b, int(pool[slot]))
                placed += 1
                if upcoming < count:
                    item = pool[slot] = order[upcoming]
                    waiting[slot] = upcoming
                    encoder[slot] = self._encoder[item]
                    prompts[slot] = self._prompts[item]
                    parts[:, slot] = self._parts[item]
                    groups[slot] = self._groups[item]
                    upcoming += 1
                else:
                    encoder[slot] = _NEVER
            if two_groups and len(self.bins[b]) == 1:
                self.alone.append(b)

    def match_lonely(self) -> None:
        """Finds company for the items of ``alone`` by moving as few as possible."""
        lonely = [self.bins[b][0] for b in self.alone]
        for b in self.alone:
            self.bins[b] = []
        lonely = [item for item in lonely if not self._join(item)]
        lonely = self._pair_up(lonely)
        lonely = self._take_from_others(lonely)
        lonely = self._split_others(lonely)
        for item in lonely:
            self._open()
            self._place(len(self.bins) - 1, item)
        kept = [b for b, items in enumerate(self.bins) if items]
        self.bins = [self.bins[b] for b in kept]
        self._room = [self._room[b] for b in kept]
        self.alone = list(range(len(self.bins) - len(lonely), len(self.bins)))

    def _weights(self) -> tuple[int, int]:
        """Scales squared residuals: by capacity, and more where demand is higher."""
        rows = self._parts.shape[1]
        demand = [
            self._encoder.sum() / self._capacity[0],
            self._parts.sum() / (self._capacity[1] * rows),
        ]
        shares = [d / max(demand) for d in demand]
        scales = [2**40 / self._capacity[0] ** 2, 2**40 / self._capacity[1] ** 2 / rows]
        pairs = zip(shares, scales, strict=True)
        first, second = (max(int(share * scale), 1) for share, scale in pairs)
        return first, second

    def _open(self) -> None:
        rows = self._parts.shape[1]
        self.bins.append([])
        self._room.append(
            [self._capacity[0], [self._capacity[1]] * rows, self._max_prompts]
        )

    def _place(self, b: int, item: int) -> None:
        room = self._room[b]
        emptiest = sorted(range(len(room[1])), key=lambda k: -room[1][k])
        self.decoder_row[item] = emptiest
        room[0] -= int(self._encoder[item])
        for k, part in zip(emptiest, self._parts[item].tolist(), strict=True):
            room[1][k] -= part
        room[2] -= int(self._prompts[item])
        self.bins[b].append(item)

    def _remove(self, b: int, item: int) -> None:
        room = self._room[b]
        room[0] += int(self._encoder[item])
        rows, parts = self.decoder_row[item].tolist(), self._parts[item].tolist()
        for k, part in zip(rows, parts, strict=True):
            room[1][k] += part
        room[2] += int(self._prompts[item])
        self.bins[b].remove(item)

    def _join(self, item: int) -> bool:
        """Puts an item into the fullest bin of two groups that has room."""
        need = int(self._encoder[item])
        room = [(r[0], b) for b, r in enumerate(self._room) if r[0] >= need]
        for _, b in sorted(room):
            if self.bins[b] and self._has_room(b, item):
                self._place(b, item)
                return True
        return False

    def _pair_up(self, items: Sequence[int]) -> list[int]:
        """Opens bins of two lonely items each; returns the items left."""
        waiting = np.array(items, np.int64)
        left = []
        while len(waiting):
            if (self._groups[waiting] == self._groups[waiting[0]]).all():
                return [*left, *waiting.tolist()]
            item, waiting = int(waiting[0]), waiting[1:]
            partners = np.flatnonzero(self._fits_beside(item, waiting))
            if not len(partners):
                left.append(item)
                continue
            self._open()
            self._place(len(self.bins) - 1, item)
            self._place(len(self.bins) - 1, int(waiting[partners[0]]))
            waiting = np.delete(waiting, partners[0])
        return left

    def _take_from_others(self, items: Sequence[int]) -> list[int]:
        """Opens bins of a lonely item and one that its bin can spare."""
        rich = [b for b, members in enumerate(self.bins) if len(members) > 2]
        bin_of = np.array([b for b in rich for _ in self.bins[b]], np.int64)
        others = np.array([i for b in rich for i in self.bins[b]], np.int64)
        left = []
        for item in items:
            for j in np.flatnonzero(self._fits_beside(item, others)).tolist():
                b, other = int(bin_of[j]), int(others[j])
                staying = {self._groups[i] for i in self.bins[b] if i != other}
                # It may have moved for an earlier item.
                if other in self.bins[b] and len(staying) > 1:
                    self._remove(b, other)
                    self._open()
                    self._place(len(self.bins) - 1, item)
                    self._place(len(self.bins) - 1, other)
                    break
            else:
                left.append(item)
        return left

    def _split_others(self, items: Sequence[int]) -> list[int]:
        """Gives two lonely items the halves of a bin; returns the items left.

        What is lonely now is of one group, the commonest, and every bin without that
        group can company two of it.
        """
        left = list(items)
        for b in range(len(self.bins)):
            if len(left) < 2:
                break
            first, second = left[-2:]
            others = {self._groups[first], self._groups[second]}
            staying = {self._groups[i] for i in self.bins[b]}
            if not staying or others & staying:
                continue
            moved = self.bins[b][-1]
            if not self._fits_beside(first, np.array([moved]))[0]:
                continue
            self._remove(b, moved)
            if not self._has_room(b, second):
                self._place(b, moved)
                continue
            self._place(b, second)
            self._open()
            self._place(len(self.bins) - 1, first)
            self._place(len(self.bins) - 1, moved)
            del left[-2:]
        return left

    def _has_room(self, b: int, item: int) -> bool:
        encoder, rows, prompts = self._room[b]
        level = sorted(rows, reverse=True)
        return (
            self._encoder[item] <= encoder
            and self._prompts[item] <= prompts
            and bool((self._parts[item] <= level).all())
        )

    def _fits_beside(self, item: int, others: np.ndarray) -> np.ndarray:
        """Which of ``others`` are of another group and fit into a bin with ``item``."""
        encoder, decoder = self._capacity
        # The largest part of one meets the smallest of the other.
        height = self._parts[others] + self._parts[item][::-1]
        return (
            (self._groups[others] != self._groups[item])
            & (self._encoder[others] + self._encoder[item] <= encoder)
            & (self._prompts[others] + self._prompts[item] <= self._max_prompts)
            & (height <= decoder).all(axis=1)
        )


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64: a hash that no numpy release changes, unlike its generators."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
