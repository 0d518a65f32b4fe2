"""What truncation makes equal: decided on what the network sees.

A cache holds whole texts, and a run cuts them. Two prompts that share a long
instruction, or two answers that differ in their last words, may then be the same: no
pair to learn a preference from, no other prompt for a mismatched response.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxalign.data.cache import TokenizedCache
from jaxalign.data.rows import Row, prompt_hash


@dataclasses.dataclass(frozen=True)
class Sides:
    """Which side of a prompt and of a response is cut off where it is too long."""

    inputs: str = "end"
    targets: str = "end"


# What T5X and seqio do.
AT_THE_END = Sides()


def cut_prompt(prompt: np.ndarray, inputs: int, side: str = "end") -> np.ndarray:
    """What the network sees of a prompt, or of values of its tokens; EOS is kept.

    >>> cut_prompt(np.array([5, 6, 7, 1]), 3).tolist()
    [5, 6, 1]
    >>> cut_prompt(np.array([5, 6, 7, 1]), 3, "start").tolist()
    [6, 7, 1]
    """
    if len(prompt) <= inputs:
        return prompt
    if side == "start":
        return prompt[len(prompt) - inputs :]
    return np.append(prompt[: inputs - 1], prompt[-1:], axis=0)


def cut_response(response: np.ndarray, targets: int, side: str = "end") -> np.ndarray:
    """What the network sees of a response: no EOS where it does not end there.

    >>> cut_response(np.array([5, 6, 7, 1]), 3).tolist()
    [5, 6, 7]
    """
    if side == "start":
        return response[max(0, len(response) - targets) :]
    return response[:targets]


def differing_pairs(row: Row, targets: int, side: str = "end") -> list[bool]:
    """Which pairs of a row differ in what the network sees of their responses."""
    cut = [cut_response(r, targets, side) for r in row.responses]
    seen = [np.asarray(r, "<i4").tobytes() for r in cut]
    return [seen[chosen] != seen[rejected] for chosen, rejected, _ in row.pairs]


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """A cache as the network sees it.

    Attributes:
      equal: ``{"prompts": n, "pairs": m}``: rows whose prompt is another one's, and
        pairs whose responses are each other's, once they are cut.
    """

    prompt_hash: np.ndarray  # [N] of each row's cut prompt
    equal: dict[str, int]


def seen(
    cache: TokenizedCache,
    *,
    inputs: int,
    targets: int,
    prompts: bool = True,
    cut: Sides = AT_THE_END,
) -> Seen:
    """Looks at the rows that may hold something equal, and reads no other.

    Args:
      cut: on which side what is too long is cut off.
      prompts: whether anyone asks for equal prompts; False leaves them unread.
    """
    index = cache.index
    hashes = index.prompt_hash.copy()
    longer = np.zeros(index.num_rows, bool)
    if prompts:
        longer = index.prompt_lengths[index.prompt_offsets[:-1]] > inputs
        for i in np.flatnonzero(longer).tolist():
            prompt = cut_prompt(cache[i].prompts[0], inputs, cut.inputs)
            hashes[i] = prompt_hash(prompt)
    equal = 0
    # The rows with pairs, and with two responses of one length once they are cut.
    of_row = np.repeat(np.arange(index.num_rows), np.diff(index.response_offsets))
    lengths = np.minimum(index.response_lengths, targets)
    key, count = np.unique(of_row * (targets + 1) + lengths, return_counts=True)
    rows = np.unique(key[count > 1] // (targets + 1))
    for i in rows[index.num_pairs[rows] > 0].tolist():
        equal += differing_pairs(cache[i], targets, cut.targets).count(False)
    # A group of cut prompts that holds several whole ones.
    _, group = np.unique(hashes, return_inverse=True)
    whole = np.unique(np.stack([group.astype(np.uint64), index.prompt_hash]), axis=1)
    several = np.bincount(whole[0].astype(np.int64)) > 1
    return Seen(hashes, {"prompts": int(several[group].sum()), "pairs": equal})
