"""Small vocabularies of all kinds, for tests of what tokens spell."""

from __future__ import annotations

import functools
import random

import sentencepiece

from jaxalign.vocabularies import ByteVocabulary, SentencePieceVocabulary

# Holds capitals, digits and the punctuation of escapes; like T5's, no braces or "<".
CORPUS = [
    "The quick brown fox jumps over the lazy dog; PACK MY BOX WITH FIVE DOZEN JUGS.",
    "Numbers 0 1 2 3 4 5 6 7 8 9, sums 48/2 = 24 and 16-3 = 13 (see § 3 | table).",
    "Größe, naïve café: \"quoted\" words & more! Is it? Yes: 100% [sure] 'so' #1 @x *y",
]


@functools.cache
def vocabularies(folder: str) -> tuple:
    """Bytes; pieces with and without escapes, with and without byte fallback."""
    found = [ByteVocabulary(5)]
    for fallback in (False, True):
        path = f"{folder}/{fallback}"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 20),
            model_prefix=path,
            vocab_size=400 if fallback else 150,
            byte_fallback=fallback,
            hard_vocab_limit=False,
            character_coverage=1.0,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
        for escape in (True, False):
            found.append(SentencePieceVocabulary(f"{path}.model", 5, escape))
    return tuple(found)


def random_ids(vocabulary, rng: random.Random, length: int, texts=()) -> list[int]:
    """Any ids but EOS, many of them from escapes and from ``texts``."""
    texts = (*texts, "§§x1f389;n( a{", "🎉\n é")
    hot = [i for text in texts for i in vocabulary.encode(text)]
    if vocabulary.to_json()["kind"] == "sentencepiece":
        hot += [i for i in range(vocabulary.vocab_size) if vocabulary._model.is_byte(i)]
    ids = [
        rng.choice(hot) if rng.random() < 0.7 else rng.randrange(vocabulary.vocab_size)
        for _ in range(length)
    ]
    return [i for i in ids if i != 1]
