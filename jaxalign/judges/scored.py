"""Numbers of token lists by one forward pass in batches of one shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxalign import batch as batches
from jaxalign import data

_Ids = Sequence[int]


def score(
    forward: Callable[[Any, dict[str, np.ndarray]], Any],
    params: Any,
    pairs: Sequence[tuple[_Ids, _Ids]],
    batch_size: int,
) -> np.ndarray:
    """One number of each pair of prompt and response, ``[n]`` float32.

    Args:
      forward: ``(params, response batch) -> [B, R]``, jitted.
      params: of the network.
      pairs: token ids; nothing is truncated.
      batch_size: pairs at a time.
    """
    if not pairs:
        return np.zeros(0, np.float32)
    rows = [
        data.Row(
            key=str(i),
            prompts=[np.asarray(prompt, np.int32)],
            responses=[np.asarray(response, np.int32)],
            response_prompt=[0],
            response_kind=[batches.ANSWER],
            response_reward=[float("nan")],
            response_label=[batches.NO_LABEL],
        )
        for i, (prompt, response) in enumerate(pairs)
    ]
    index = data.build_index(rows)
    plan = data.pack(
        index,
        inputs=_rounded(int(index.prompt_lengths.max())),
        targets=_rounded(int(index.response_lengths.max())),
        packing=1,
    )
    found = np.zeros(len(rows), np.float32)
    starts = range(0, len(plan), batch_size)
    for start in tqdm(starts, "judge", disable=None, leave=False):
        some = [plan[i] for i in range(start, min(start + batch_size, len(plan)))]
        arrays = [
            data.to_arrays([rows[i] for i in p.row_ids], p, plan.shape) for p in some
        ]
        # Fill the last batch with copies of its first row: one compiled shape.
        arrays += [arrays[0]] * (batch_size - len(arrays))
        batch = {name: np.stack([a[name] for a in arrays]) for name in arrays[0]}
        scores = np.asarray(forward(params, batch))
        for placement, score in zip(some, scores, strict=False):
            found[placement.row_ids] = score[: len(placement.row_ids)]
    return found


def _rounded(length: int) -> int:
    """The next power of two, so that texts of similar lengths share a compilation."""
    return max(16, 1 << (length - 1).bit_length())
