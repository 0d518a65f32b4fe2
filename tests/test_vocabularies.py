"""Vocabularies: ids equal to seqio's, and text that survives the round trip.

seqio is imported by the tests, not with them: collecting them is not to wait for it.
"""

import pathlib

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign import vocabularies
from jaxalign.vocabularies import ByteVocabulary, SentencePieceVocabulary

# Holds capitals, digits and the punctuation of escapes; like T5's, no braces, "<",
# "~", "^", "`" or backslash.
CORPUS = [
    "The quick brown fox jumps over the lazy dog; PACK MY BOX WITH FIVE DOZEN JUGS.",
    "Numbers 0 1 2 3 4 5 6 7 8 9, sums 48/2 = 24 and 16-3 = 13 (see § 3 | table).",
    "Größe, naïve café: \"quoted\" words & more! Is it? Yes: 100% [sure] 'so' #1 @x *y",
    "KVQXZ vkqxz 12+34>5 _under_score_ $9 \u00a7",
]
TEXTS = [
    "plain words",
    "two\nlines\n\nand a\ttab",
    '{"json": [1, 2], "code": "x < y"}',
    "def f(x):\n    return {x: 1}\n",
    "  leading, inner   runs and trailing  ",
    "§ escapes § itself §n §§n §x7b; §",
    "emoji 🎉👩‍👩‍👧 and 日本語",
    "e\u0301 composes; ﬁ folds; \u2047 ▁ stay",
    "<extra_id_0> at a <extra_id_9> word start",
    "\n <extra_id_1>",
    "",
    " ",
    "\n",
    "a\n ",
    "\r\n\x00\x7f",
]


def train(path: pathlib.Path, **options) -> str:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_prefix=str(path),
        bos_id=-1,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
        **{
            "pad_id": 0,
            "eos_id": 1,
            "unk_id": 2,
            "vocab_size": 160,
            "normalization_rule_name": "nmt_nfkc",
            **options,
        },
    )
    return f"{path}.model"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return train(tmp_path_factory.mktemp("sp") / "tiny")


@pytest.fixture(scope="module")
def vocabulary(model) -> SentencePieceVocabulary:
    return SentencePieceVocabulary(model, extra_ids=10)


@pytest.mark.parametrize("extra_ids", [0, 125])
@pytest.mark.parametrize("text", TEXTS)
def test_bytes_equal_seqio(extra_ids, text):
    import seqio

    ours, theirs = ByteVocabulary(extra_ids), seqio.ByteVocabulary(extra_ids)
    assert ours.vocab_size == theirs.vocab_size
    assert (ours.pad_id, ours.eos_id, ours.unk_id) == (0, theirs.eos_id, theirs.unk_id)
    ids = list(theirs.encode(text))
    assert ours.encode(text) == ids
    assert ours.decode([*ids, 1, 107, 0]) == theirs.decode([*ids, 1, 107, 0]) == text


@settings(deadline=None)  # the first imports seqio
@given(st.lists(st.integers(0, 383)))
def test_bytes_decode_any_ids_as_seqio_does(ids):
    import seqio

    assert ByteVocabulary(125).decode(ids) == seqio.ByteVocabulary(125).decode(ids)


@given(st.text())
def test_bytes_round_trip(text):
    assert ByteVocabulary().decode(ByteVocabulary().encode(text)) == text


@pytest.mark.parametrize("extra_ids", [0, 10])
@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_without_escape_equals_seqio(model, extra_ids, text):
    import seqio

    ours = SentencePieceVocabulary(model, extra_ids, escape=False)
    theirs = seqio.SentencePieceVocabulary(model, extra_ids)
    assert ours.vocab_size == theirs.vocab_size
    assert (ours.eos_id, ours.unk_id) == (theirs.eos_id, theirs.unk_id)
    ids = list(theirs.encode(text))
    assert ours.encode(text) == ids
    assert ours.decode([*ids, 1, 7, 0]) == theirs.decode(ids)


@pytest.mark.parametrize("text", [CORPUS[0], "café, 24 <extra_id_3> and more (see 3)"])
def test_escape_changes_nothing_that_the_model_holds(model, vocabulary, text):
    import seqio

    assert vocabulary.encode(text) == list(
        seqio.SentencePieceVocabulary(model, 10).encode(text)
    )


def test_sentinels_are_last_and_descending(vocabulary):
    size = vocabulary.vocab_size
    assert vocabulary.encode("<extra_id_0> a <extra_id_9>")[0] == size - 1
    assert vocabulary.encode("<extra_id_0> a <extra_id_9>")[-1] == size - 10


@pytest.mark.parametrize("text", TEXTS)
def test_escape_round_trips(vocabulary, text):
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert vocabularies.UNK_ID not in ids


def test_without_escape_newlines_and_braces_are_lost(model):
    plain = SentencePieceVocabulary(model, 10, escape=False)
    assert plain.decode(plain.encode("a\nb")) == "a b"
    assert plain.encode("a {b}").count(vocabularies.UNK_ID) == 2


@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity", "nfkc_cf"])
def test_escape_round_trips_any_text(tmp_path_factory, rule):
    path = tmp_path_factory.mktemp(rule) / "m"
    vocabulary = SentencePieceVocabulary(
        train(path, normalization_rule_name=rule), extra_ids=3
    )
    alphabet = st.one_of(
        st.sampled_from("\n\t\r {}<>§snx7b;aéA\u0301日🎉\u2047▁ ᄀ\u1161"),
        st.sampled_from(["<extra_id_0>", " <extra_id_2> ", "§n ", "  "]),
        st.characters(codec="utf-8"),
    )

    @settings(max_examples=200, deadline=None)
    @given(st.lists(alphabet).map("".join))
    def check(text):
        assert vocabulary.decode(vocabulary.encode(text)) == text

    check()


def test_byte_fallback_pieces_hold_emoji_but_not_newlines(tmp_path):
    vocabulary = SentencePieceVocabulary(
        train(tmp_path / "m", byte_fallback=True, vocab_size=400), extra_ids=0
    )
    text = "party 🎉\nat { nine }"
    assert "🎉" in vocabulary.escape_text(text)
    assert "\n" not in vocabulary.escape_text(text)
    assert vocabulary.decode(vocabulary.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="§nstx7bdf;() \n"))
def test_malformed_escapes_decode_without_error(vocabulary, text):
    assert isinstance(vocabulary.unescape_text(text), str)
    assert vocabulary.unescape_text("§xd800; §x110000; §q") == "§xd800; §x110000; §q"


def test_json_round_trip_and_fingerprints(tmp_path, model, vocabulary):
    vocabulary.save(tmp_path)
    again = vocabularies.from_json(vocabulary.to_json(), tmp_path)
    assert again == vocabulary and hash(again) == hash(vocabulary)
    assert again.encode("a\n{b}") == vocabulary.encode("a\n{b}")
    others = [
        SentencePieceVocabulary(model, 10, escape=False),
        SentencePieceVocabulary(model, 9),
        ByteVocabulary(),
        ByteVocabulary(125),
        vocabulary,
    ]
    assert len({v.fingerprint for v in others}) == len(others)
    assert vocabularies.from_json(ByteVocabulary(125).to_json()) == ByteVocabulary(125)


def test_errors_say_what_to_do(tmp_path, model):
    with pytest.raises(FileNotFoundError, match=r"tiny\.model"):
        SentencePieceVocabulary(str(pathlib.Path(model).parent / "tinny.model"))
    with pytest.raises(ValueError, match="pad_id=0, eos_id=1, unk_id=2"):
        SentencePieceVocabulary(train(tmp_path / "m", pad_id=-1, eos_id=2, unk_id=0))
    with pytest.raises(ValueError, match="'bytes'"):
        vocabularies.from_json({"kind": "words"})
