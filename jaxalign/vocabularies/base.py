"""What all vocabularies share: special ids, identity and the cleaning of ids."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

import numpy as np

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2


class BaseVocabulary:
    """The part of a vocabulary that does not depend on its kind."""

    # start_id: what a decoder reads before the first token.
    pad_id, eos_id, unk_id, start_id = PAD_ID, EOS_ID, UNK_ID, PAD_ID
    extra_ids: int
    vocab_size: int
    fingerprint: str
    escapes: tuple[str, dict[str, str]] | None = None  # opener, and what letters mean

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, BaseVocabulary) and self.fingerprint == other.fingerprint
        )

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def save(self, directory: str | pathlib.Path) -> None:
        """Writes what ``from_json`` needs beside the JSON; nothing for bytes."""

    def until_eos(self, ids: Iterable[int]) -> np.ndarray:
        """The ids before the first EOS, padding left out."""
        array = np.asarray(ids if hasattr(ids, "__len__") else list(ids), np.int64)
        stops = np.flatnonzero(array == self.eos_id)
        array = array[: stops[0]] if len(stops) else array
        return array[array != self.pad_id]
