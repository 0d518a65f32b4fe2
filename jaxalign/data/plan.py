"""The packing plan: which examples share an encoder row, from lengths alone.

A *bin* is one row of a batch: prompts side by side in the encoder row and their
responses in ``K`` decoder rows. Bins are computed once and stay the same over epochs
(epochs only shuffle their order), so what shares a row, and hence the mismatched prompt
that KTO uses, is a function of the cache and the lengths and of nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from jaxalign.data.bin_packing import Packer, assign_rows
from jaxalign.data.cuts import AT_THE_END, Seen, Sides
from jaxalign.data.rows import Index


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The axis sizes of one batch row (:mod:`jaxalign.batch`)."""

    encoder_length: int  # Le, tokens
    decoder_rows: int  # K
    decoder_length: int  # Ld, tokens of each decoder row
    prompts: int  # P
    responses: int  # R
    pairs: int  # Q, at least 1 so that no array is empty

    def axes(self) -> dict[str, int]:
        """Sizes by the letters of ``batch.COLUMNS``, without the batch's own ``B``."""
        return dict(zip("EKDPRQ", dataclasses.astuple(self), strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """One bin: rows of the cache in order, and where their responses stand.

    A prompt is cut to ``inputs`` tokens and keeps its last (EOS); a response is cut to
    ``targets`` tokens, and with its end loses it. ``cut`` says on which side.
    """

    row_ids: np.ndarray  # [n] rows of the cache
    decoder_rows: np.ndarray  # [r] decoder row of each response, in the rows' order
    inputs: int
    targets: int
    cut: Sides = AT_THE_END


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """All bins of a cache, a sequence of :class:`Placement`.

    Attributes:
      left_out: ``{"rows": n, "responses": m}`` that are in no bin, as too long.
      equal: ``{"prompts": n, "pairs": m}`` that only truncation makes equal; such a
        pair is masked, such a prompt is no other one for a mismatched response.
    """

    row_ids: np.ndarray  # [N] rows of the cache (those left out apart), bin after bin
    bin_offsets: np.ndarray  # [bins + 1] into row_ids
    decoder_rows: np.ndarray  # [T] of each response, in the order of row_ids
    response_offsets: np.ndarray  # [bins + 1] into decoder_rows
    shape: RowShape  # holds every bin
    inputs: int
    targets: int
    truncated: dict[str, int]  # {"prompts": n, "responses": m} cut to those lengths
    tokens: dict[str, int]  # {"encoder": n, "decoder": m} used over all bins
    equal: dict[str, int] = dataclasses.field(default_factory=dict)
    cut: Sides = AT_THE_END
    left_out: dict[str, int] = dataclasses.field(
        default_factory=lambda: {"rows": 0, "responses": 0}
    )

    def __len__(self) -> int:
        return len(self.bin_offsets) - 1

    def __getitem__(self, i: int) -> Placement:
        if not 0 <= i < len(self):
            raise IndexError(f"Bin {i} of a plan of {len(self)} bins.")
        rows = slice(self.bin_offsets[i], self.bin_offsets[i + 1])
        responses = slice(self.response_offsets[i], self.response_offsets[i + 1])
        return Placement(
            self.row_ids[rows],
            self.decoder_rows[responses],
            self.inputs,
            self.targets,
            self.cut,
        )

    @property
    def bins(self) -> list[np.ndarray]:
        """The rows of the cache in each bin."""
        return np.split(self.row_ids, self.bin_offsets[1:-1])

    def occupancy(self) -> dict[str, float]:
        """The share of encoder and decoder positions that hold tokens."""
        s, bins = self.shape, len(self)
        return {
            "encoder": self.tokens["encoder"] / (bins * s.encoder_length),
            "decoder": self.tokens["decoder"]
            / (bins * s.decoder_rows * s.decoder_length),
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over composition, shape, truncation lengths and what these do."""
        digest = hashlib.sha256()
        numbers = (*dataclasses.astuple(self.shape), self.inputs, self.targets)
        digest.update(repr(numbers).encode())
        for name in ("row_ids", "bin_offsets", "decoder_rows", "response_offsets"):
            digest.update(getattr(self, name).astype("<i8").tobytes())
        if any(self.equal.values()):
            digest.update(repr(sorted(self.equal.items())).encode())
        if self.cut != AT_THE_END:
            digest.update(repr(dataclasses.astuple(self.cut)).encode())
        return digest.hexdigest()

    def with_shape(self, shape: RowShape) -> Plan:
        """The same bins in larger arrays, e.g. :func:`common_shape` of a mixture."""
        for field in dataclasses.fields(RowShape):
            own, new = getattr(self.shape, field.name), getattr(shape, field.name)
            if new < own:
                raise ValueError(
                    f"The plan needs {field.name}={own}, the new shape has {new}: "
                    "take common_shape() of all plans."
                )
        return dataclasses.replace(self, shape=shape)


def common_shape(plans: Sequence[Plan]) -> RowShape:
    """The smallest shape that holds every bin of every plan."""
    sizes = [dataclasses.astuple(plan.shape) for plan in plans]
    return RowShape(*(max(column) for column in zip(*sizes, strict=True)))


def pack(
    index: Index,
    *,
    inputs: int,
    targets: int,
    packing: int | None,
    decoder_rows: int | None = None,
    min_prompts: int = 1,
    seen: Seen | None = None,
    cut: Sides = AT_THE_END,
    keep: np.ndarray | None = None,
) -> Plan:
    """Decides which rows of a cache share a bin; each row stands in exactly one.

    Args:
      inputs: tokens of one prompt (``TASK_FEATURE_LENGTHS['inputs']``).
      targets: tokens of one response (``TASK_FEATURE_LENGTHS['targets']``).
      packing: a bin's encoder row holds ``packing * inputs`` tokens and each of its
        decoder rows ``packing * targets``. None or 0: one row of the cache a bin, in
        the cache's order.
      decoder_rows: ``K``; None: the largest number of responses of a row.
      min_prompts: 2 asks for two different prompts in every bin, as KTO needs; where
        their number is odd one bin may remain with one.
      seen: which prompts and pairs are equal once they are cut (`cuts.seen`); None: as
        they are in the cache.
      cut: on which side what is too long is cut off.
      keep: ``[N]``, which rows get a bin (`too_long.keep`); None: all. Nothing of them
        is cut, and ``seen`` is not looked at.

    Raises:
      ValueError: naming numbers and settings, when a row cannot fit or too many rows
        find no different prompt to share a bin with.
    """
    if keep is not None:
        rows = np.flatnonzero(keep)
        kept = index.take(rows)
        plan = pack(
            kept,
            inputs=inputs,
            targets=targets,
            packing=packing,
            decoder_rows=decoder_rows,
            min_prompts=min_prompts,
            cut=cut,
        )
        left_out = {
            "rows": index.num_rows - kept.num_rows,
            "responses": index.num_responses - kept.num_responses,
        }
        row_ids = rows[plan.row_ids]
        equal = {"prompts": 0, "pairs": 0}
        return dataclasses.replace(
            plan, row_ids=row_ids, left_out=left_out, equal=equal
        )
    for name, value in (("inputs", inputs), ("targets", targets)):
        if value < 1:
            raise ValueError(f"TASK_FEATURE_LENGTHS[{name!r}] is {value}, must be > 0.")
    if min_prompts not in (1, 2):
        raise ValueError(f"min_prompts must be 1 or 2, got {min_prompts}.")
    if index.num_rows == 0:
        raise ValueError("The cache has no rows: nothing to pack.")
    if decoder_rows is None:
        decoder_rows = max(1, int(np.diff(index.response_offsets).max()))
    prompts = np.diff(index.prompt_offsets)
    widest = int(prompts.max())
    encoder = np.add.reduceat(
        np.minimum(index.prompt_lengths, inputs), index.prompt_offsets[:-1]
    )
    lengths, slots = _by_length(index, targets)
    capacity = (
        packing * inputs if packing else widest * inputs,
        packing * targets if packing else targets,
    )
    empty = np.full(decoder_rows, capacity[1], np.int64)
    decoder_row, fits = assign_rows(lengths, empty, level=not packing)
    _check_fit(
        encoder,
        encoder <= capacity[0],
        "encoder tokens for its prompts, an encoder row holds "
        f"{capacity[0]} (packing={packing})",
        "Raise packing, or lower TASK_FEATURE_LENGTHS['inputs']",
    )
    _check_fit(
        lengths.sum(1),
        fits,
        "decoder tokens for its responses, its decoder rows hold "
        f"{decoder_rows} x {capacity[1]} (packing={packing})",
        "Raise packing or decoder_rows, or lower TASK_FEATURE_LENGTHS['targets']",
    )

    groups = index.prompt_hash if seen is None else seen.prompt_hash
    different = len(np.unique(groups))
    if packing and different >= min_prompts:
        bins_at_least = max(
            1, encoder.sum() / capacity[0], lengths.sum() / capacity[1] / decoder_rows
        )
        # P and R are set by the fullest bin: four times what an average one holds.
        most = max(8, widest, int(4 * prompts.sum() / bins_at_least))
        packer = Packer(encoder, lengths, prompts, groups, capacity, decoder_rows, most)
        packer.fill(two_groups=min_prompts == 2)
        if packer.alone:
            packer.match_lonely()
        bins, alone, decoder_row = packer.bins, len(packer.alone), packer.decoder_row
    else:
        bins, alone = [[i] for i in range(index.num_rows)], index.num_rows
    if min_prompts == 2 and (alone > 1 or alone == len(bins)):
        raise ValueError(
            f"min_prompts=2 (KTO compares each response with another prompt of its "
            f"row), but {alone} of {index.num_rows} examples found no different prompt "
            f"to share a row with: packing={packing} with inputs={inputs} and "
            f"targets={targets}, and {different} different prompts in the cache once "
            f"they are cut to {inputs} tokens. Expected packing >= 2 and at least two "
            "different prompts; raise packing, or TASK_FEATURE_LENGTHS['inputs'] where "
            "prompts differ only in what is cut off."
        )

    row_ids = np.array([i for items in bins for i in items], np.int64)
    bin_offsets = np.cumsum([0] + [len(items) for items in bins])
    responses = np.diff(index.response_offsets)
    of_row = np.repeat(np.arange(index.num_rows), responses)
    order = _ranges(index.response_offsets[row_ids], responses[row_ids])
    response_offsets = np.concatenate([[0], np.cumsum(responses[row_ids])])[bin_offsets]

    def fullest(counts: np.ndarray) -> int:
        return int(np.add.reduceat(counts[row_ids], bin_offsets[:-1]).max())

    return Plan(
        row_ids=row_ids,
        bin_offsets=bin_offsets,
        decoder_rows=decoder_row[of_row, slots][order],
        response_offsets=response_offsets,
        shape=RowShape(
            encoder_length=capacity[0],
            decoder_rows=decoder_rows,
            decoder_length=capacity[1],
            prompts=fullest(prompts),
            responses=max(1, fullest(responses)),
            pairs=max(1, fullest(index.num_pairs)),
        ),
        inputs=inputs,
        targets=targets,
        truncated={
            "prompts": int((index.prompt_lengths > inputs).sum()),
            "responses": int((index.response_lengths > targets).sum()),
        },
        tokens={"encoder": int(encoder.sum()), "decoder": int(lengths.sum())},
        equal=dict(seen.equal) if seen else {},
        cut=cut,
    )


def _by_length(index: Index, targets: int) -> tuple[np.ndarray, np.ndarray]:
    """``[N, R]`` response lengths of each row, longest first, and zeros at the end.

    Beside them ``[T]`` where each response stands there.
    """
    lengths = np.minimum(index.response_lengths, targets).astype(np.int64)
    counts = np.diff(index.response_offsets)
    of_row = np.repeat(np.arange(index.num_rows), counts)
    order = np.lexsort((-lengths, of_row))
    rank = _ranges(np.zeros_like(counts), counts)
    slots = np.empty_like(rank)
    slots[order] = rank
    sorted_lengths = np.zeros((index.num_rows, max(1, int(counts.max()))), np.int64)
    sorted_lengths[of_row, slots] = lengths
    return sorted_lengths, slots


def _check_fit(needs: np.ndarray, fits: np.ndarray, what: str, change: str) -> None:
    over = np.flatnonzero(~fits)
    if len(over):
        row = int(over[np.argmax(needs[over])])
        raise ValueError(
            f"{len(over)} of {len(needs)} rows do not fit: row {row} of the cache "
            f"needs {needs[row]} {what}. {change}."
        )


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``concatenate([arange(s, s + n) for s, n in zip(starts, counts)])``."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())
