"""Vocabularies with ids of their own: tokenizer.json files, MADLAD-400's pieces."""

from __future__ import annotations

import json
import pickle

import foreign_folders
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxalign import vocabularies
from jaxalign.vocabularies import SentencePieceVocabulary, TokenizerVocabulary

IDS = {"pad_id": 0, "eos_id": 2, "start_id": 0}
TEXTS = ["def f(x):\n    return {x: 1}\n", "emoji 🎉 and 日本語", " <a> ", "", "\n"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    foreign_folders.write_tokenizer("bpe", folder)
    return (folder / "tokenizer.json").read_text()


@pytest.fixture(scope="module")
def vocabulary(text):
    return TokenizerVocabulary(text, **IDS)


@pytest.fixture(scope="module")
def madlad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("madlad")
    foreign_folders.write_tokenizer("madlad", folder)
    path = str(folder / "spiece.model")
    return SentencePieceVocabulary(path, 0, escape=False, pad_id=1, eos_id=2)


@pytest.mark.parametrize("said", TEXTS)
def test_texts_survive_behind_a_template_and_before_eos(vocabulary, said):
    ids = vocabulary.encode(said)
    assert ids[0] == 1 and 2 not in ids  # <s>, as RoBERTa's template has it
    assert vocabulary.decode([*ids, 2, 70, 71]) == said
    assert vocabulary.decode([0, *ids, 334, 0]) == said  # a sentinel is no text


@given(st.text(), st.text())
def test_parts_spell_the_whole(vocabulary, before, behind):
    ids = [*vocabulary.encode(before), *vocabulary.encode_inside(behind)]
    assert vocabulary.decode(ids) == before + behind
    spelt = vocabulary.token_bytes()
    raw = b"".join(spelt[i] or b"" for i in ids)
    assert raw.decode() == before + behind
    so_far = ""
    for n in range(len(ids)):
        shown = vocabulary.decode(ids[:n], final=False)
        assert shown.startswith(so_far) and (before + behind).startswith(shown)
        so_far = shown


def test_what_ids_spell(vocabulary):
    plain, special = vocabulary.token_bytes(), vocabulary.token_bytes(special=True)
    assert len(plain) == len(special) == vocabulary.vocab_size == 335
    assert {i for i, raw in enumerate(plain) if raw is None} == {0, 1, 2, 3} | set(
        range(330, 335)
    )
    assert special[2] == b"" and {bytes([b]) for b in range(256)} <= set(plain)
    assert vocabulary.escapes is None and vocabulary.unk_id == 3


def test_they_are_their_content(text, vocabulary, madlad, tmp_path):
    for folder, one in ((tmp_path / "a", vocabulary), (tmp_path / "b", madlad)):
        folder.mkdir()
        one.save(folder)
        spec = json.loads(json.dumps(one.to_json()))
        again = vocabularies.from_json(spec, folder)
        for other in (again, pickle.loads(pickle.dumps(one))):
            assert other == one and other.fingerprint == one.fingerprint
            assert (other.pad_id, other.eos_id, other.unk_id, other.start_id) == (
                one.pad_id, one.eos_id, one.unk_id, one.start_id
            )  # fmt: skip
            assert other.encode("the quick fox") == one.encode("the quick fox")
    others = [
        TokenizerVocabulary(text, **IDS | {"eos_id": 3}),
        TokenizerVocabulary(text.replace('"<extra_id_4>"', '"<extra_id_9>"'), **IDS),
    ]
    assert len({one.fingerprint for one in (vocabulary, madlad, *others)}) == 4


def test_madlads_ids(madlad):
    assert (madlad.pad_id, madlad.eos_id, madlad.unk_id, madlad.start_id) == (
        1,
        2,
        0,
        0,
    )
    ids = madlad.encode("the quick brown fox")
    assert madlad.decode([*ids, 2, *ids]) == "the quick brown fox"
    assert madlad.decode([*ids, 1, 1]) == "the quick brown fox"
    assert madlad.encode("日")[-1] == madlad.unk_id


def test_errors_say_what_is_wrong(text, madlad):
    with pytest.raises(ValueError, match="eos_id is 335, and the tokenizer has 335"):
        TokenizerVocabulary(text, **IDS | {"eos_id": 335})
    with pytest.raises(ValueError, match="no tokenizer.json"):
        TokenizerVocabulary("{}", **IDS)
    with pytest.raises(ValueError, match=r"ids \(-1, 2, 0\), expected \(0, 1, 2\)"):
        SentencePieceVocabulary(madlad.path, 0)
    with pytest.raises(ValueError, match=r"ids \(-1, 2, 0\), expected \(1, 3, 2\)"):
        SentencePieceVocabulary(madlad.path, 0, pad_id=1, eos_id=3)
    with pytest.raises(ValueError, match="'sentencepiece', 'tokenizer'"):
        vocabularies.from_json({"kind": "words"})
