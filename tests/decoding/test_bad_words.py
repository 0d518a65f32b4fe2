"""Bad words are never in the text, and nothing else is ruled out: a fuzz."""

from __future__ import annotations

import random

import jax
import pytest
import sentence_pieces

from jaxalign.decoding import bad_words

WORDS = [
    "no",
    ".",
    "{",
    "\n",
    "\n\n",
    "§",
    "é",
    "🎉",
    "x1",
    "1",
    " t",
    "§x",
    "ab ",
    "(b",
]


@pytest.mark.parametrize("which", range(5))
def test_the_words_that_a_token_completes_rule_it_out(tmp_path_factory, which):
    folder = str(tmp_path_factory.mktemp("pieces"))
    vocabulary = sentence_pieces.vocabularies(folder)[which]
    rng = random.Random(which)
    compared = ruled_out = 0
    for _ in range(5):
        words = rng.sample(WORDS, rng.randint(1, 3))
        size = vocabulary.vocab_size + 3
        rule = jax.device_get(bad_words.without(words, vocabulary, size))
        for _ in range(40):
            ids, state = [], 0
            for token in sentence_pieces.random_ids(vocabulary, rng, 12, words):
                new = [*ids, token]
                told = vocabulary.decode(new, final=False)
                whole = vocabulary.decode(new)
                holds = any(word in told for word in words)
                would = any(word in whole for word in words)
                after = int(rule.advance(state, token))
                if after == -1:
                    # Also where only ending could follow, and that would complete one.
                    assert holds or would, (words, new)
                    ruled_out += 1
                    continue
                assert not holds, (words, new)
                # Whether the response may end here: its text as it stands then.
                assert (rule.distance[after] == 0) == (not would), (words, new)
                ids, state = new, after
                compared += 1
    assert compared > 500 and ruled_out > 20


def test_empty_words_are_refused():
    with pytest.raises(ValueError, match="A bad word must be a text, not empty"):
        bad_words.without([""], sentence_pieces.ByteVocabulary())
