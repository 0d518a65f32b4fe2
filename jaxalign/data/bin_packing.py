"""Vector bin packing with a bounded pool: the algorithm behind the packing plan.

An item asks for encoder tokens, for a place in a decoder row for each of its responses
(longest first, zeros at the end) and for prompts; a bin offers a capacity of each, of
decoder rows ``K``. Bins are filled one at a time from a pool of waiting items. While a
bin is far from full it takes the item that has waited longest, so that every bin gets
its share of small and large ones and none are left over; then the item that leaves the
smallest weighted squared residual (norm-based greedy of Panigrahy et al. 2011,
"Heuristics for Vector Bin Packing"). Each response of an item goes to the fullest
decoder row that still holds it (best fit decreasing), which keeps room for long ones.

Integer scores and a hashed order, so that every machine and every numpy finds the same
bins.
"""

from __future__ import annotations

import dataclasses

import numpy as np

_POOL = 1024  # responses of the waiting items that a bin chooses from
_FEW = 8  # items tried before all others at once
_NEVER = 2**40  # the size of an empty slot of the pool
# A bin is far from full while this many average items would fill it. Measured on
# log-normal and uniform lengths: 0 leaves the small items to the end (93% full), 3
# fills 97 to 99%, and more gains only where a bin holds many items.
_FAR = 3


@dataclasses.dataclass
class Packer:
    """Packs items into bins.

    Attributes:
      bins: items of each bin, in the order placed.
      decoder_row: ``[N, R]`` the decoder row of each response.
      alone: bins whose items are all of one group, when two groups were asked for.
    """

    encoder: np.ndarray  # [N] encoder tokens of each item
    responses: np.ndarray  # [N, R] decoder tokens of its responses, descending
    prompts: np.ndarray  # [N] prompts of each item
    groups: np.ndarray  # [N]; items of one group share their prompt
    capacity: tuple[int, int]  # encoder tokens, and tokens of each decoder row
    decoder_rows: int  # K of a bin
    max_prompts: int  # of a bin

    def __post_init__(self) -> None:
        for name in ("encoder", "responses", "prompts"):
            setattr(self, name, getattr(self, name).astype(np.int64))
        self.decoder = self.responses.sum(1)
        self.decoder_row = np.zeros(self.responses.shape, np.int32)
        self.bins: list[list[int]] = []
        self.alone: list[int] = []
        # What each bin still offers: encoder tokens, tokens by decoder row, prompts.
        self._room: list[list] = []

    def fill(self, two_groups: bool) -> None:
        """Packs every item; with ``two_groups`` no bin's second item repeats the first.

        Bins that found no second group are listed in ``alone``.
        """
        count = len(self.encoder)
        weights = self._weights()
        total = (int(self.encoder.sum()), max(int(self.decoder.sum()), 1))
        order = np.argsort(_mix(np.arange(count, dtype=np.uint64)), kind="stable")
        size = min(count, max(_POOL // self.responses.shape[1], 256))
        of_items = (
            self.encoder,
            self.prompts,
            self.decoder,
            self.responses[:, 0],
            self.groups,
        )
        pool, waiting = order[:size].copy(), np.arange(size)
        of_pool = [values[pool] for values in of_items]
        encoder, prompts, decoder, first, groups = of_pool
        upcoming = size
        placed = 0
        while placed < count:
            self._open()
            members, room = self.bins[-1], self._room[-1]
            while True:
                left, longest = int(room[1].sum()), int(room[1].max())
                fits = (encoder <= room[0]) & (prompts <= room[2])
                fits &= (decoder <= left) & (first <= longest)
                if two_groups and len(members) == 1:
                    fits &= groups != self.groups[members[0]]
                slots = fits.nonzero()[0]
                if min(room[0] * count / total[0], left * count / total[1]) > _FAR:
                    score = waiting[slots]
                else:
                    score = (room[0] - encoder[slots]) ** 2 * weights[0]
                    score += (left - decoder[slots]) ** 2 * weights[1]
                best = self._best(pool[slots], score, room[1])
                if best is None:
                    break
                slot = int(slots[best[0]])
                self._place(-1, int(pool[slot]), best[1])
                placed += 1
                if upcoming < count:
                    pool[slot], waiting[slot] = order[upcoming], upcoming
                    for mine, values in zip(of_pool, of_items, strict=True):
                        mine[slot] = values[pool[slot]]
                    upcoming += 1
                else:
                    encoder[slot] = _NEVER
            if two_groups and len(members) == 1:
                self.alone.append(len(self.bins) - 1)

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
            self._open(item)
        kept = [b for b, items in enumerate(self.bins) if items]
        self.bins = [self.bins[b] for b in kept]
        self._room = [self._room[b] for b in kept]
        self.alone = list(range(len(self.bins) - len(lonely), len(self.bins)))

    def _weights(self) -> tuple[int, int]:
        """Scales squared residuals: by capacity, and more where demand is higher."""
        capacity = self.capacity[0], self.capacity[1] * self.decoder_rows
        demand = self.encoder.sum() / capacity[0], self.decoder.sum() / capacity[1]
        return tuple(
            max(int(d / max(demand) * 2**40 / c**2), 1)
            for d, c in zip(demand, capacity, strict=True)
        )

    def _open(self, *items: int) -> None:
        self.bins.append([])
        rows = np.full(self.decoder_rows, self.capacity[1], np.int64)
        self._room.append([self.capacity[0], rows, self.max_prompts])
        for item in items:
            self._place(-1, item)

    def _best(
        self, items: np.ndarray, score: np.ndarray, room: np.ndarray
    ) -> tuple[int, np.ndarray] | None:
        """The item of the lowest score whose responses fit into a bin, and where."""
        order = score.argsort(kind="stable")
        # One of the first few nearly always fits.
        for some in (order[:_FEW], order[_FEW:]):
            rows, fits = assign_rows(self.responses[items[some]], room)
            fitting = fits.nonzero()[0]
            if len(fitting):
                return int(some[fitting[0]]), rows[fitting[0]]
        return None

    def _place(self, b: int, item: int, rows: np.ndarray | None = None) -> None:
        room = self._room[b]
        if rows is None:
            rows = assign_rows(self.responses[[item]], room[1])[0][0]
        self.decoder_row[item] = rows
        np.subtract.at(room[1], rows, self.responses[item])
        room[0] -= int(self.encoder[item])
        room[2] -= int(self.prompts[item])
        self.bins[b].append(item)

    def _remove(self, b: int, item: int) -> None:
        room = self._room[b]
        np.add.at(room[1], self.decoder_row[item], self.responses[item])
        room[0] += int(self.encoder[item])
        room[2] += int(self.prompts[item])
        self.bins[b].remove(item)

    def _join(self, item: int) -> bool:
        """Puts an item into the fullest bin of two groups that has room."""
        need = int(self.encoder[item])
        room = [(r[0], b) for b, r in enumerate(self._room) if r[0] >= need]
        for _, b in sorted(room):
            if self.bins[b] and self._has_room(b, item):
                self._place(b, item)
                return True
        return False

    def _pair_up(self, items: list[int]) -> list[int]:
        """Opens bins of two lonely items each; returns the items left."""
        waiting = np.array(items, np.int64)
        left = []
        while len(waiting):
            if (self.groups[waiting] == self.groups[waiting[0]]).all():
                return [*left, *waiting.tolist()]
            item, waiting = int(waiting[0]), waiting[1:]
            partners = np.flatnonzero(self._fits_beside(item, waiting))
            if not len(partners):
                left.append(item)
                continue
            self._open(item, int(waiting[partners[0]]))
            waiting = np.delete(waiting, partners[0])
        return left

    def _take_from_others(self, items: list[int]) -> list[int]:
        """Opens bins of a lonely item and one that its bin can spare."""
        rich = [b for b, members in enumerate(self.bins) if len(members) > 2]
        bin_of = np.array([b for b in rich for _ in self.bins[b]], np.int64)
        others = np.array([i for b in rich for i in self.bins[b]], np.int64)
        left = []
        for item in items:
            for j in np.flatnonzero(self._fits_beside(item, others)).tolist():
                b, other = int(bin_of[j]), int(others[j])
                staying = {self.groups[i] for i in self.bins[b] if i != other}
                # It may have moved for an earlier item.
                if other in self.bins[b] and len(staying) > 1:
                    self._remove(b, other)
                    self._open(item, other)
                    break
            else:
                left.append(item)
        return left

    def _split_others(self, left: list[int]) -> list[int]:
        """Gives two lonely items the halves of a bin; returns the items left.

        What is lonely now is of one group, the commonest, and every bin without that
        group can company two of it.
        """
        for b in range(len(self.bins)):
            if len(left) < 2:
                break
            first, second = left[-2:]
            staying = {self.groups[i] for i in self.bins[b]}
            if not staying or {self.groups[first], self.groups[second]} & staying:
                continue
            moved = self.bins[b][-1]
            if not self._fits_beside(first, np.array([moved]))[0]:
                continue
            self._remove(b, moved)
            if not self._has_room(b, second):
                self._place(b, moved)
                continue
            self._place(b, second)
            self._open(first, moved)
            del left[-2:]
        return left

    def _has_room(self, b: int, item: int) -> bool:
        encoder, rows, prompts = self._room[b]
        return bool(
            self.encoder[item] <= encoder
            and self.prompts[item] <= prompts
            and assign_rows(self.responses[[item]], rows)[1][0]
        )

    def _fits_beside(self, item: int, others: np.ndarray) -> np.ndarray:
        """Which of ``others`` are of another group and fit into a bin with ``item``."""
        encoder, decoder = self.capacity
        room = np.full(self.decoder_rows, decoder, np.int64)
        rows, _ = assign_rows(self.responses[[item]], room)
        np.subtract.at(room, rows[0], self.responses[item])
        return (
            (self.groups[others] != self.groups[item])
            & (self.encoder[others] + self.encoder[item] <= encoder)
            & (self.prompts[others] + self.prompts[item] <= self.max_prompts)
            & assign_rows(self.responses[others], room)[1]
        )


def assign_rows(
    lengths: np.ndarray, room: np.ndarray, *, level: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Puts each item's responses into decoder rows, each as if it were alone.

    Args:
      lengths: ``[n, R]``, placed in the order given.
      room: ``[K]`` tokens that the rows have left.
      level: into the emptiest row; otherwise into the fullest that holds the response.

    Returns:
      ``[n, R]`` rows, and ``[n]`` whether everything of the item fits.
    """
    items = np.arange(len(lengths))
    left = room[None].repeat(len(lengths), axis=0)
    rows = np.zeros(lengths.shape, np.int32)
    for j, length in enumerate(lengths.T):
        after = left - length[:, None]
        if level:
            row = after.argmax(1)
        else:
            after[after < 0] += _NEVER
            row = after.argmin(1)
        left[items, row] -= length
        rows[:, j] = row
    return rows, left.min(1, initial=0) >= 0


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64: a hash that no numpy release changes, unlike its generators."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
