"""Regular expressions mean what Python says, or are refused: a fuzz."""

from __future__ import annotations

import random
import re
import warnings

import pytest

from jaxalign.decoding import regular

# Pieces that the two syntaxes may read differently, and what surrounds them.
PIECES = [
    *"abcx 019-,.&~|^$*+?(){}[]\\#:=<>!é§\n\t",
    *"{2} {1,2} {,2} {1,} {,} {a} {0} {2}? a|b || (|a) (a|) (?:a|ab) ()".split(),
    *["{1, 2}", "{ 1}", "[ --]", r"\ ", "a**", "a*?", "a+?", "a??"],
    *"[+--] [a-z--] [a&&b] [a~~b] [a||b] [[:alpha:]] []a] [^]a] [a-] [-a] [^-]".split(),
    *r"[!--/] [\]-a] [\w-] [\d.] [^\W] [\s\S] \d \w \s \D \W \S \. \- \x41".split(),
    *r"\u00e9 \x2d \n \t \f \v \a \0 \101 \# \& \~ \} \A \Z \z \b \B \1".split(),
    *r"\p \K \G \h \R \< (?: (?s: (?i: (?x: (?m: (?u: (?a: (?-s: (?P<n>".split(),
    *"(?P=n) (?= (?! (?<= (?<! (?> (?#c) (?i) (?x) (?s) *+ ++".split(),
]
LETTERS = "abcxyzAZ 0129-,.+*/'&~|^$(){}[]\\#:=<>!_é§日ſK\n\t\r\v\x1c\u2028"


def soup(rng):
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 6)))


def klass(rng):
    members = "ac-z+-.[]^&~|!\\] 09,-/é"
    body = "".join(rng.choice(members) for _ in range(rng.randint(1, 6)))
    return f"[{body}]{rng.choice(['', '*', '{2}', '{1, 2}', '+'])}"


def nested(rng, depth=3):
    kind = rng.randrange(7 if depth else 2)
    if kind == 0:
        return rng.choice(["a", "b", "ab", " ", "-", "é", r"\.", "{", "}"])
    if kind == 1:
        return rng.choice([".", "[ab]", "[^a]", r"\w", r"\s", r"\D", "[b-]", "[--a]"])
    if kind in (2, 3):
        return nested(rng, depth - 1) + nested(rng, depth - 1)
    if kind == 4:
        return f"({nested(rng, depth - 1)}|{nested(rng, depth - 1)})"
    often = ["*", "+", "?", "{2}", "*?", "{1,2}", "{,2}", "{ 2}", "{0}", "{1,}?"]
    return f"(?:{nested(rng, depth - 1)}){rng.choice(often)}"


def texts(rng, pattern):
    """Random ones, and pieces of the pattern itself, which are nearer to matching."""
    plain = re.sub(r"[\\()?:|*\[\]]", "", pattern)
    for letters in (LETTERS, "ab", pattern, plain or "a"):
        for _ in range(5):
            yield "".join(rng.choice(letters) for _ in range(rng.randint(0, 5)))
    yield from ("", pattern, plain)


def disagreements(make, count, seed):
    """How many patterns were compared, and where the two sides differ."""
    rng, compared, wrong = random.Random(seed), 0, []
    for _ in range(count):
        pattern = make(rng)
        try:
            automaton = regular.compile_regex(pattern)
        except ValueError:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            matcher = re.compile(pattern, re.ASCII)
        compared += 1
        for text in texts(rng, pattern):
            if automaton.accepts(text) != bool(matcher.fullmatch(text)):
                wrong.append((pattern, text))
    return compared, wrong


@pytest.mark.parametrize(
    ("make", "count", "least"),
    [
        pytest.param(soup, 1500, 400, id="soup"),
        pytest.param(klass, 1000, 400, id="classes"),
        pytest.param(nested, 400, 360, id="nested", marks=pytest.mark.slow),
    ],
)
def test_patterns_mean_what_python_says(make, count, least):
    compared, wrong = disagreements(make, count, seed=0)
    assert not wrong
    assert compared > least


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        (r"\d{1, 3}", "1{1, 3}", "12"),
        (r"x{ 2}", "x{ 2}", "xx"),
        ("[+--]", ",", "a"),
        ("[!--/]", "'", "0"),
        ("[a&&b]", "&", "c"),
        ("[[:alpha:]]", ":]", "b"),
        (r"\d", "3", "\u0663"),
        (r"\s", "\v", "\u2028"),
        (".", "\r", "\n"),
        ("(?s).", "\n", ""),
        ("(?x)a b # c", "ab", "a b"),
        (r"\x41\u00e9\101", "AéA", "A"),
    ],
)
def test_python_reads_them_so(pattern, matching, other):
    automaton = regular.compile_regex(pattern)
    assert automaton.accepts(matching) and not automaton.accepts(other)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a$", "anchors are not supported"),
        (r"\Aa", r"\\A is not supported"),
        ("(?>a|b)c", "atomic groups"),
        ("(?i)a", "re.IGNORECASE is not supported"),
        ("(?m:a)", "re.MULTILINE is not supported"),
        ("(?<!a)b", "look-around"),
        ("(a)?(?(1)b|c)", "conditional"),
        (r"[\w--]", "no regular expression: bad character range"),
        ("a{3,2}", "no regular expression"),
        ("(" * 5000 + ")" * 5000, "nested too deeply|no regular expression"),
        (3, "must be text"),
    ],
)
def test_what_cannot_be_said_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        regular.compile_regex(pattern)
