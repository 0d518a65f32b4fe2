"""One bin as the arrays of :mod:`jaxalign.batch`: truncate, shift, pack, number.

Targets stand side by side in the decoder rows. Decoder inputs are the targets shifted
right *inside each segment*, starting with 0 (T5X), so that packing changes no number.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign import batch as batch_lib
from jaxalign.data.cuts import Sides, cut_prompt, cut_response, differing_pairs
from jaxalign.data.plan import Placement, RowShape
from jaxalign.data.rows import Row


def empty_batch(
    shape: RowShape, batch_size: int, columns: Mapping[str, int] | Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """A batch of empty rows: every mask 0, every token padding.

    Args:
      columns: what a batch holds only where it is asked for, with the sizes of their
        vectors (0: none), or names alone.
    """
    axes = shape.axes() | {"B": batch_size}
    sizes = dict(columns) if isinstance(columns, Mapping) else dict.fromkeys(columns, 0)
    found = {}
    for name, column in batch_lib.COLUMNS.items():
        if column.source == "batch" or name in sizes:
            size = [axes[letter] for letter in column.axes.removesuffix("M")]
            size += [sizes[name]] if column.vector else []
            found[name] = np.full(size, column.empty, column.dtype)
    return found


def vector_size(name: str, values: Sequence[Any]) -> int:
    """``M`` of a column with these values; 0 where they are no vectors."""
    if not batch_lib.COLUMNS[name].vector:
        return 0
    return np.shape(values if isinstance(values, np.ndarray) else values[0])[-1]


def to_arrays(
    rows: Sequence[Row],
    placement: Placement,
    shape: RowShape,
    columns: Mapping[str, Sequence[Any]] | None = None,
    *,
    reward_stats: tuple[float, float] | None = None,
    prompt_ids: Sequence[int] | None = None,
    out: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Lays one bin out as unbatched arrays.

    Args:
      rows: the rows of ``placement.row_ids``, in that order.
      placement: where their responses stand, the truncation lengths and sides. A cut
        prompt keeps its last token (EOS); a response whose end is cut off loses its
        EOS, as it does not end there.
      shape: of the arrays.
      columns: further columns by name: for each prompt, response or pair one value,
        for a column of tokens one list, in the rows' order.
      reward_stats: mean and standard deviation that standardise rewards.
      prompt_ids: identities for ``prompt_id``; None: ``placement.row_ids``.
      out: empty arrays to write into (one row of :func:`empty_batch`).

    Returns:
      The arrays of ``batch.COLUMNS`` without their leading axis.

    Raises:
      ValueError: when rows, placement and shape do not belong together.
    """
    if out is None:
        sizes = {name: vector_size(name, v) for name, v in (columns or {}).items()}
        out = {k: v[0] for k, v in empty_batch(shape, 1, sizes).items()}
    responses = sum(len(row.responses) for row in rows)
    prompts = sum(len(row.prompts) for row in rows)
    pairs = sum(len(row.pairs) for row in rows)
    if (len(rows), responses) != (len(placement.row_ids), len(placement.decoder_rows)):
        raise ValueError(
            f"The placement is of {len(placement.row_ids)} rows with "
            f"{len(placement.decoder_rows)} responses; got {len(rows)} rows with "
            f"{responses}: it was planned from another cache."
        )
    if prompts > shape.prompts or responses > shape.responses or pairs > shape.pairs:
        raise ValueError(
            f"A bin of {prompts} prompts, {responses} responses and {pairs} pairs does "
            f"not fit {shape}."
        )

    first_prompt = _prompts(rows, placement, out, prompt_ids)
    _tokens(rows, placement, out)

    # Numbers of responses, in the rows' order. Prompts and pairs that are equal once
    # they are cut are equal to the network.
    inputs, side = placement.inputs, placement.cut.inputs
    partner = mismatched(
        [cut_prompt(row.prompts[0], inputs, side).tobytes() for row in rows]
    )
    numbers: dict[str, Any] = {
        name: [value for row in rows for value in getattr(row, name)]
        for name in ("response_kind", "response_reward", "response_label")
    }
    rewards = np.array(numbers["response_reward"], np.float64)
    if reward_stats is not None:
        rewards = (rewards - reward_stats[0]) / reward_stats[1]
    numbers["response_reward"] = np.where(np.isnan(rewards), 0.0, rewards)
    numbers["response_prompt"] = [
        first_prompt[i] + p for i, row in enumerate(rows) for p in row.response_prompt
    ]
    numbers["response_kl_prompt"] = [
        first_prompt[i] + min(p, len(rows[i].prompts) - 1) if i >= 0 else -1
        for row, i in zip(rows, partner, strict=True)
        for p in row.response_prompt
    ]
    for name, values in numbers.items():
        out[name][:responses] = values
    out["response_mask"][:responses] = 1
    for name, values in (columns or {}).items():
        _scatter(name, values, out, placement.cut)
    number = first_response = 0
    for row in rows:
        differ = differing_pairs(row, placement.targets, placement.cut.targets)
        for (chosen, rejected, margin), mask in zip(row.pairs, differ, strict=True):
            out["pair_chosen"][number] = first_response + chosen
            out["pair_rejected"][number] = first_response + rejected
            out["pair_margin"][number] = margin
            out["pair_mask"][number] = mask
            number += 1
        first_response += len(row.responses)
    return dict(out)


def _scatter(
    name: str, values: Sequence[Any], out: Mapping[str, np.ndarray], cut: Sides
) -> None:
    """Writes one bin's values of a column where its axes say; tokens by segment."""
    owner = batch_lib.COLUMNS[name].owner
    if owner not in "ED":
        out[name][: len(values)] = values
        return
    side = "encoder" if owner == "E" else "decoder"
    segments = out[f"{side}_segment_ids"]
    for number, value in enumerate(values, 1):
        place = segments == number
        # As the tokens are cut.
        kept, value = int(place.sum()), np.asarray(value)
        if owner == "E":
            out[name][place] = cut_prompt(value, kept, cut.inputs)
        else:
            out[name][place] = cut_response(value, kept, cut.targets)


def _prompts(
    rows: Sequence[Row],
    placement: Placement,
    out: Mapping[str, np.ndarray],
    prompt_ids: Sequence[int] | None,
) -> list[int]:
    """Writes the encoder row; returns the first prompt's number of each row."""
    tokens, segments = out["encoder_input_tokens"], out["encoder_segment_ids"]
    ids = placement.row_ids if prompt_ids is None else prompt_ids
    first_prompt, number, start = [], 0, 0
    for row, row_id in zip(rows, ids, strict=True):
        first_prompt.append(number)
        for prompt in row.prompts:
            seen = cut_prompt(prompt, placement.inputs, placement.cut.inputs)
            end = start + len(seen)
            tokens[start:end] = seen
            out["prompt_id"][number] = row_id
            number += 1
            segments[start:end] = number
            start = end
    out["prompt_mask"][:number] = 1
    return first_prompt


def _tokens(
    rows: Sequence[Row], placement: Placement, out: Mapping[str, np.ndarray]
) -> None:
    """Writes the decoder rows."""
    inputs, targets = out["decoder_input_tokens"], out["decoder_target_tokens"]
    segments = out["decoder_segment_ids"]
    cursor = [0] * len(targets)
    responses = [response for row in rows for response in row.responses]
    where = placement.decoder_rows.tolist()
    for number, (k, response) in enumerate(zip(where, responses, strict=True), 1):
        seen = cut_response(response, placement.targets, placement.cut.targets)
        start = cursor[k]
        end = cursor[k] = start + len(seen)
        targets[k, start:end] = seen
        inputs[k, start + 1 : end] = seen[:-1]
        segments[k, start:end] = number
    out["decoder_loss_weights"][:] = segments > 0


def mismatched(prompts: Sequence[Hashable]) -> list[int]:
    """For each prompt of a bin the index of another, different one (KTO's ``y'|x``).

    Neighbours are exchanged and an odd last three rotate. Where that would match equal
    prompts, equal ones are put side by side and all rotate by the size of the largest
    group. Either way the map is a permutation, so the mismatched responses are the
    bin's own (huggingface/trl#1402), unless one prompt makes up more than half: then
    some are taken twice.

    Returns:
      Indices; -1 where every prompt is the same.

    >>> mismatched(["a", "b", "c", "d", "e"])
    [1, 0, 3, 4, 2]
    >>> mismatched(["a", "a", "b", "b"])
    [2, 3, 0, 1]
    """
    count = len(prompts)
    partner = [i ^ 1 for i in range(count)]
    if count % 2 and count > 1:
        partner[-3:] = [count - 2, count - 1, count - 3]
    if count > 1 and all(prompts[i] != prompts[j] for i, j in enumerate(partner)):
        return partner
    groups: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    if len(groups) < 2:
        return [-1] * count
    order = [i for group in groups.values() for i in group]
    turn = max(map(len, groups.values()))
    for position, i in enumerate(order):
        after = (3 * order)[position + turn : position + turn + count]
        partner[i] = next(j for j in after if prompts[j] != prompts[i])
    return partner
