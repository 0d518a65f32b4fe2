"""A ``tokenizer.json`` that splits as a SentencePiece model does.

``AutoTokenizer`` of transformers 5 makes one of a T5's ``spiece.model`` by itself; of a
umT5 it takes nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator

import sentencepiece

from jaxalign.vocabularies import SentencePieceVocabulary
from jaxalign.vocabularies.tokenizer_json import tokenizers

# Numbers of fields in SentencePiece's ModelProto.
_TRAINER, _NORMALIZER = 2, 3
_MODEL_TYPE, _CHARACTERS = 3, 2
_UNIGRAM = 1
_SPACE = "▁"


def tokenizer_json(vocabulary: SentencePieceVocabulary) -> str:
    """The text of the file; ids are the vocabulary's.

    Raises:
      ImportError: without the package ``tokenizers``.
      ValueError: for a model that is not a unigram model.
    """
    package = tokenizers()
    proto = dict(_fields(vocabulary.model_bytes))
    trainer, normalizer = (
        dict(_fields(proto.get(n, b""))) for n in (_TRAINER, _NORMALIZER)
    )
    if trainer.get(_MODEL_TYPE, _UNIGRAM) != _UNIGRAM:
        raise ValueError(f"{vocabulary!r} is not a unigram model.")
    own = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.model_bytes)
    size = range(own.get_piece_size())
    model = package.Tokenizer(
        package.models.Unigram(
            [(own.id_to_piece(i), own.get_score(i)) for i in size],
            own.unk_id(),
            any(own.is_byte(i) for i in size),
        )
    )
    if characters := normalizer.get(_CHARACTERS):
        model.normalizer = package.normalizers.Precompiled(characters)
    spaces = dict(replacement=_SPACE, prepend_scheme="always", split=True)
    model.pre_tokenizer = package.pre_tokenizers.Sequence(
        [
            package.pre_tokenizers.WhitespaceSplit(),
            package.pre_tokenizers.Metaspace(**spaces),
        ]
    )
    model.decoder = package.decoders.Metaspace(**spaces)
    end = (own.id_to_piece(vocabulary.eos_id), vocabulary.eos_id)
    model.post_processor = package.processors.TemplateProcessing(
        single=f"$A {end[0]}", pair=f"$A {end[0]} $B {end[0]}", special_tokens=[end]
    )
    special = [own.id_to_piece(i) for i in size if own.is_control(i)]
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(vocabulary.extra_ids))]
    model.add_special_tokens([*special, own.id_to_piece(own.unk_id()), *sentinels])
    return model.to_str()


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a serialised message: number, and value as it stands."""
    at = 0

    def number() -> int:
        nonlocal at
        found = shift = 0
        while True:
            byte, at = raw[at], at + 1
            found |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return found

    while at < len(raw):
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or number()
        yield key >> 3, raw[at : at + size]
        at += size
