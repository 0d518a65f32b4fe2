"""Bytes as token ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxalign.files import json_sha256
from jaxalign.vocabularies.base import BaseVocabulary


class ByteVocabulary(BaseVocabulary):
    """UTF-8 bytes as ids ``byte + 3`` (ByT5, arXiv 2105.13626).

    Args:
      extra_ids: sentinels at the end; 125 gives the 384 ids of the released ByT5.

    >>> ByteVocabulary().encode("hé")
    [107, 198, 172]
    """

    def __init__(self, extra_ids: int = 0):
        self.extra_ids = extra_ids
        self.vocab_size = 3 + 256 + extra_ids
        self.fingerprint = json_sha256(self.to_json())

    def __repr__(self) -> str:
        return f"ByteVocabulary(extra_ids={self.extra_ids})"

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without EOS."""
        # Through numpy: prompts of thousands of bytes are common.
        raw = np.frombuffer(text.encode("utf-8"), np.uint8)
        return (raw.astype(np.int32) + 3).tolist()

    def decode(self, ids: Iterable[int], final: bool = True) -> str:
        """Text up to the first EOS; ids that are no bytes are left out.

        Half a character is left out too, so `final` changes nothing: no text of the
        first ids is ever taken back.
        """
        kept = self.until_eos(ids) - 3
        kept = kept[(kept >= 0) & (kept < 256)].astype(np.uint8).tobytes()
        return kept.decode("utf-8", errors="ignore")

    def token_bytes(
        self, first: bool = False, special: bool = False
    ) -> list[bytes | None]:
        """What each id spells; special ids None, or empty with ``special``."""
        letters = [bytes([b]) for b in range(256)]
        none = b"" if special else None
        return [none] * 3 + letters + [none] * self.extra_ids

    def to_json(self) -> dict[str, Any]:
        """A JSON description for :func:`from_json`."""
        return {"kind": "bytes", "extra_ids": self.extra_ids}
