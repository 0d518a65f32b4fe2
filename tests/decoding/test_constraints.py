"""Token masks against brute force over every token sequence."""

from __future__ import annotations

import itertools
import re
import warnings

import jax
import numpy as np
import pytest
import sentencepiece

from jaxalign.decoding import constraints, regular
from jaxalign.decoding.checks import check_constraint
from jaxalign.vocabularies import ByteVocabulary, SentencePieceVocabulary

LONGEST = 4  # tokens of a sequence, EOS included


class Pieces:
    """Few tokens that overlap, a bare space marker, and half a character."""

    pieces = [b" a", b"a", b"b", b"ab", b" ", b"\xc3", b"\xa9", b"1", b"\n"]
    vocab_size = 3 + len(pieces)
    eos_id = 1
    escapes = None

    def token_bytes(self, first=False):
        pieces = self.pieces
        if first:
            pieces = [piece.removeprefix(b" ") for piece in pieces]
        return [None] * 3 + pieces

    def decode(self, ids):
        text = b""
        for i in ids:
            piece = self.pieces[i - 3]
            text += piece[1:] if not text and piece.startswith(b" ") else piece
        return text.decode("utf-8")


HANDPICKED = [
    "",
    "a",
    "a|ab",
    "a??",
    "a*?b",
    "(?:|a)b?",
    "(a|ab)(b|ba)",
    "[ab]{2}",
    "a{2,}",
    "(ab)*",
    "é",
    "[^a]",
    "a?é+",
    ".",
    "(?s:.)b",
    "a b",
    " a",
    "a ",
    r"\w+",
    r"\W",
    r"\d?[\w é]",
    r"\s?\S",
    r"[^\w]b?",
    "(?P<x>a)1",
    "[]a]b?",
    "[[a]1",
    "[a&&b]",
    "(a|b|1)?(a|é)?",
    "a{,2}",
    "(a+)+",
]


def random_patterns(count):
    rng = np.random.default_rng(0)

    def one(depth):
        kind = rng.integers(7 if depth else 2)
        if kind == 0:
            return str(rng.choice(list("ab1é ")))
        if kind == 1:
            return str(rng.choice(["[ab]", "[^a]", ".", r"\w", r"\s", "[b1 ]", r"\D"]))
        if kind in (2, 3):
            return one(depth - 1) + one(depth - 1)
        if kind == 4:
            return f"(?:{one(depth - 1)}|{one(depth - 1)})"
        return (
            f"(?:{one(depth - 1)}){rng.choice(['*', '+', '?', '{2}', '*?', '{1,2}'])}"
        )

    return [one(3) for _ in range(count)]


def spellings(vocabulary):
    """Every token sequence that ends in time, by its text; half characters left out."""
    found = {}
    for length in range(LONGEST):
        for ids in itertools.product(range(3, vocabulary.vocab_size), repeat=length):
            try:
                found[(*ids, 1)] = vocabulary.decode(ids)
            except UnicodeDecodeError:
                continue
    return found


@pytest.fixture(scope="module")
def all_spellings():
    return spellings(Pieces())


@pytest.mark.parametrize(
    "patterns", [HANDPICKED, random_patterns(60)], ids=["handpicked", "random"]
)
def test_masks_equal_brute_force(all_spellings, patterns):
    vocabulary, compared = Pieces(), 0
    for pattern in patterns:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # "[[a]" means the same yet
            matching = re.compile(pattern, re.ASCII)
        fits = [ids for ids, text in all_spellings.items() if matching.fullmatch(text)]
        # After each prefix, which tokens some fitting sequence goes on with.
        wanted = {}
        for ids in fits:
            for at in range(len(ids)):
                wanted.setdefault(ids[:at], set()).add(ids[at])
        try:
            automaton = jax.device_get(constraints.regex(pattern, vocabulary))
        except ValueError as error:
            assert not fits and "No sequence of tokens" in str(error)
            continue
        if not fits:  # too long for the tokens there are
            assert not automaton.allowed(0, LONGEST).any()
            continue
        for prefix, tokens in wanted.items():
            state = 0
            for token in prefix:
                state = int(automaton.advance(state, token))
            mask = automaton.allowed(state, LONGEST - len(prefix))
            assert set(np.flatnonzero(mask).tolist()) == tokens, (pattern, prefix)
            compared += 1
    assert compared > 300


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "no regular expression"),
        ("^a", "anchors are not supported"),
        (r"\bfoo", r"\\b is not supported"),
        ("(?=a)b", "is not supported; groups may be"),
        ("(?i:a)", "is not supported; groups may be"),
        (r"(a)\1", r"\\1 is not supported"),
        ("a++", "possessive quantifiers"),
    ],
)
def test_what_is_no_regular_language_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        regular.compile_regex(pattern)


def test_languages_that_no_tokens_spell_are_refused():
    with pytest.raises(ValueError, match="No sequence of tokens of this vocabulary"):
        constraints.regex("xyz", Pieces())


@pytest.fixture(scope="module", params=["bytes", "sentencepiece", "byte fallback"])
def vocabulary(request, tmp_path_factory):
    if request.param == "bytes":
        return ByteVocabulary(extra_ids=5)
    fallback = request.param == "byte fallback"
    path = tmp_path_factory.mktemp("sp") / "model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            ["The cat sat on the mat; 0 1 2 3 4 5 6 7 8 9, nstxr § ab cde fgh () [ ]"]
            * 20
        ),
        model_prefix=str(path),
        vocab_size=360 if fallback else 90,
        byte_fallback=fallback,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return SentencePieceVocabulary(f"{path}.model", extra_ids=4)


def walk(automaton, rng, limit):
    """A random text: any allowed token, in at most ``limit`` tokens."""
    ids, state = [], 0
    while not ids or ids[-1] != 1:
        allowed = np.flatnonzero(automaton.allowed(state, limit - len(ids)))
        assert allowed.size, "a dead end"
        ids.append(int(rng.choice(allowed)))
        state = int(automaton.advance(state, ids[-1]))
    return ids


@pytest.mark.parametrize(
    "pattern",
    [
        r"(The|A) (cat|mat)( sat)?\.?;?",
        r"\d{1,3}(, \d{1,3})*",
        r'\{"n": \d+\}',
        r"a\nb( c|\n\nd)+",
        r"  the  mats ",
        r"(§|\[x\]|nst)+",
        r"[a-f ]{5,9}",
    ],
)
def test_every_walk_matches(vocabulary, pattern):
    try:
        automaton = constraints.regex(pattern, vocabulary, vocabulary.vocab_size + 7)
    except ValueError as error:
        # Only the small vocabulary lacks a full stop or a quote.
        assert "No sequence of tokens" in str(error)
        assert pattern.startswith(r'\{"') and vocabulary.vocab_size < 300
        return
    automaton = jax.device_get(automaton)
    assert automaton.token_class.shape == (vocabulary.vocab_size + 7,)
    rng = np.random.default_rng(0)
    fewest = int(automaton.distance[0])
    for limit in (fewest, fewest + 1, fewest + 9):
        for _ in range(10):
            ids = walk(automaton, rng, limit)
            text = vocabulary.decode(ids)
            assert re.fullmatch(pattern, text), (ids, text)
    assert not automaton.allowed(0, fewest - 1).any()


def test_phrases_are_included(vocabulary):
    phrases = ["cat sat", "at s", "9, n"]
    automaton = jax.device_get(
        constraints.must_include(phrases, vocabulary, pattern=r"[a-zA-Z0-9, ]*")
    )
    rng = np.random.default_rng(1)
    for _ in range(10):
        text = vocabulary.decode(walk(automaton, rng, int(automaton.distance[0]) + 6))
        assert all(phrase in text for phrase in phrases)
        assert re.fullmatch("[a-zA-Z0-9, ]*", text)


def test_intersections_against_their_parts():
    rng = np.random.default_rng(0)
    a, b = regular.compile_regex("[ab]{2,5}"), regular.including("aba")
    both = regular.intersection([a, b])
    for _ in range(200):
        text = "".join(rng.choice(list("ab"), rng.integers(7)))
        assert both.accepts(text) == (a.accepts(text) and "aba" in text)
    with pytest.raises(ValueError, match="need more than 5 states"):
        regular.intersection([a, b], limit=5)


def test_what_no_response_can_meet_is_refused_before_decoding():
    vocabulary = ByteVocabulary()
    ids = vocabulary.encode
    rule = constraints.regex("[0-9]{10}", vocabulary)
    with pytest.raises(ValueError, match="max_new_tokens=10 .* at least 11"):
        check_constraint(rule, 10)
    check_constraint(rule, 11, [[ids("0123")], [ids("0123456789")]])
    for prefix, message in {
        "12x": r"prefixes\[1\]\[0\] breaks the constraint at its token 2",
        "0" * 11: "breaks the constraint at its token 10",
    }.items():
        with pytest.raises(ValueError, match=message):
            check_constraint(rule, 20, [[], [ids(prefix)]])


def test_a_broken_constraint_stays_broken():
    vocabulary = ByteVocabulary()
    rule = jax.device_get(constraints.regex("ab", vocabulary))
    state = rule.advance(0, vocabulary.encode("x")[0])
    for token in [*vocabulary.encode("ab"), 1]:
        assert not rule.allowed(state, 100).any()
        state = rule.advance(state, token)
    for text, ends, fits in [
        ("ab", [1], True),
        ("ab", [], True),  # as a stop leaves it
        ("a", [], False),
        ("a", [1], False),
        ("abx", [1], False),
        ("", [1], False),
    ]:
        assert rule.accepts([*vocabulary.encode(text), *ends]) == fits


def test_bad_words_and_a_pattern_are_one_language():
    vocabulary = ByteVocabulary()
    with pytest.raises(ValueError, match="No sequence of tokens"):
        constraints.must_include([], vocabulary, pattern="(yes|yea)", bad_words=["e"])
    rule = jax.device_get(
        constraints.must_include([], vocabulary, pattern="(yes|yea)", bad_words=["es"])
    )
    assert rule.accepts(vocabulary.encode("yea"))
    assert not rule.accepts(vocabulary.encode("yes"))
