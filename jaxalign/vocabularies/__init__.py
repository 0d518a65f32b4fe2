"""Text to token ids and back, without TensorFlow.

Ids are those of seqio's ``ByteVocabulary`` and ``SentencePieceVocabulary``: 0 is
padding, 1 ends a sequence, 2 is unknown, and ``extra_ids`` sentinels stand at the end.

A SentencePiece model loses what its normaliser folds (newlines, runs of spaces) and
what it has no piece for (braces and ``<`` in T5's). With ``escape=True`` such
characters are spelt with characters that the model does hold, and spelt back when
decoding, so that code, JSON and dialogues survive. Text that the model holds gives the
ids of seqio, unchanged.
"""

from __future__ import annotations

import pathlib
from typing import Any

from jaxalign import remote
from jaxalign.vocabularies.base import EOS_ID, PAD_ID, UNK_ID
from jaxalign.vocabularies.byte import ByteVocabulary
from jaxalign.vocabularies.sentence_piece import MODEL_FILE, SentencePieceVocabulary
from jaxalign.vocabularies.tokenizer_json import (
    TOKENIZER_FILE,
    TokenizerVocabulary,
    tokenizer_file,
)

__all__ = [
    "EOS_ID",
    "FILES",
    "MODEL_FILE",
    "PAD_ID",
    "UNK_ID",
    "ByteVocabulary",
    "SentencePieceVocabulary",
    "TokenizerVocabulary",
    "Vocabulary",
    "from_json",
    "tokenizer_file",
]

FILES = (MODEL_FILE, TOKENIZER_FILE)  # that a vocabulary may save beside its JSON
Vocabulary = ByteVocabulary | SentencePieceVocabulary | TokenizerVocabulary


def from_json(spec: dict[str, Any], directory: str | pathlib.Path = ".") -> Vocabulary:
    """Rebuilds a vocabulary from its ``to_json`` and the folder it was saved in.

    >>> from_json({"kind": "bytes", "extra_ids": 125}).vocab_size
    384
    """
    if spec.get("kind") == "bytes":
        return ByteVocabulary(extra_ids=spec["extra_ids"])
    if spec.get("kind") == "sentencepiece":
        path = str(remote.below(directory, spec["model"]))
        rest = {k: v for k, v in spec.items() if k not in ("kind", "model")}
        return SentencePieceVocabulary(path, **rest)
    if spec.get("kind") == "tokenizer":
        path = remote.below(directory, spec["model"])
        return TokenizerVocabulary(path.read_text("utf-8"), **spec["ids"])
    raise ValueError(
        f"Unknown vocabulary kind {spec.get('kind')!r}; known: 'bytes', "
        "'sentencepiece', 'tokenizer'."
    )
