"""Stops and streams: what is told of some tokens stays true when more come."""

from __future__ import annotations

import random

import numpy as np
import pytest
import sentence_pieces

from jaxalign.decoding import Generator
from jaxalign.decoding.stops import Stops

STOPS = ["\n", "{", "§", " a", ".", "a\n", "§x", "\ufffd", "ab", "b", "é", "\n\n", "🎉"]


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    return sentence_pieces.vocabularies(str(tmp_path_factory.mktemp("pieces")))


def test_text_told_so_far_is_a_prefix_of_the_whole(vocabularies):
    rng = random.Random(0)
    for vocabulary in vocabularies:
        for _ in range(150):
            ids = sentence_pieces.random_ids(vocabulary, rng, rng.randint(0, 12))
            whole, before = vocabulary.decode(ids), ""
            for n in range(len(ids) + 1):
                told = vocabulary.decode(ids[:n], final=False)
                assert whole.startswith(told) and told.startswith(before), (ids, n)
                before = told


def test_the_stop_completed_first_ends_a_response_however_it_is_looked_at(vocabularies):
    rng, ended = random.Random(1), 0
    for vocabulary in vocabularies:
        for _ in range(40):
            texts = rng.sample(STOPS, rng.randint(1, 3))
            stops = Stops(texts, vocabulary)
            ids = sentence_pieces.random_ids(vocabulary, rng, 10, texts)
            # One token after the other, one character after the other.
            expected = None
            for n in range(len(ids) + 1):
                told = vocabulary.decode(ids[:n], final=False)
                for end in range(len(told) + 1):
                    done = [t for t in texts if told[:end].endswith(t)]
                    if done and expected is None:
                        expected = (told[:end], end - max(map(len, done)), n)
            for size in (1, 3, 8):  # tokens a look
                looks = [ids[:n] for n in range(0, len(ids) + size, size)]
                cuts = [cut for cut in map(stops.cut, looks) if cut]
                assert (cuts[0] if cuts else None) == expected, (ids, texts)
                told = ""
                for look in looks:
                    text = vocabulary.decode(look, final=False)
                    cut = stops.cut(look)
                    kept = cut.start if cut else len(text) - stops.held(text)
                    assert text[:kept].startswith(told)
                    told = text[:kept]
                    if cut:
                        break
            if expected is None and (cut := stops.cut(ids, final=True)):
                assert cut.tokens == len(ids)
            ended += expected is not None
    assert ended > 40


def test_of_stops_completed_together_the_longest_cuts():
    (vocabulary,) = [sentence_pieces.ByteVocabulary()]
    ids = vocabulary.encode("xabc")
    assert Stops(["bc", "abc", "c"], vocabulary).cut(ids) == ("xabc", 1, 4)
    assert Stops(["abcd", "b"], vocabulary).cut(ids) == ("xab", 2, 3)
    # A stop inside of forced tokens does not count, one that reaches out of them does.
    assert Stops(["a"], vocabulary).cut(ids, forced=2) is None
    assert Stops(["ab"], vocabulary).cut(ids, forced=2) == ("xab", 1, 3)
    with pytest.raises(ValueError, match="must be a text, not empty"):
        Stops(["a", ""], vocabulary)


class Letters:
    """Ids 2..23 are letters."""

    vocab_size, eos_id = 24, 1

    def decode(self, ids, final=True):
        return "".join(chr(ord("a") + i - 2) for i in ids if i > 1)


def test_stopped_responses_are_the_beginnings_of_the_others(tiny):
    model, params = tiny
    rng = np.random.default_rng(0)
    prompts = [np.append(rng.integers(2, 24, 5), 1) for _ in range(9)]
    settings = {
        "max_prompt_length": 16,
        "max_new_tokens": 24,
        "num_samples": 4,
        "batch_size": 4,
        "slots": 2,
    }
    whole = list(Generator(model, Letters(), **settings)(params, prompts))
    stop = ["d", "ef", "e"]
    found = list(Generator(model, Letters(), stop=stop, **settings)(params, prompts))
    ended = 0
    for a, b in zip(whole, found, strict=True):
        for n in range(4):
            cut = Stops(stop, Letters()).cut(a.tokens[n].tolist())
            size = cut.tokens if cut else len(a.tokens[n])
            assert b.texts[n] == (cut.text if cut else a.texts[n])
            np.testing.assert_array_equal(b.tokens[n], a.tokens[n][:size])
            np.testing.assert_allclose(b.logps[n], a.logps[n][:size], atol=1e-4)
            assert len(b.sampler_logps[n]) == size
            ended += cut is not None
    assert ended > 10


def test_an_engine_decodes_nothing_for_samples_that_were_ended(tiny):
    from jaxalign.decoding import Engine, Sampling

    engine = Engine(
        *tiny,
        prompt_length=16,
        max_new_tokens=24,
        num_samples=4,
        groups=4,
        slots=2,
        sampling=Sampling(min_new_tokens=24),
    )
    ticket = engine.submit([3, 4, 1], prompt_id=0)
    assert engine.step(max_steps=3) == []
    assert engine.end(ticket, 0) and not engine.end(ticket + 1, 0)
    assert engine.step(max_steps=2) == []
    # Its slot went on with the next sample.
    assert list(map(len, engine.progress()[ticket])) == [3, 5, 2, 0]
    (finished,) = [f for _ in range(30) for f in engine.step(max_steps=8)]
    assert list(map(len, finished.tokens)) == [3, 24, 24, 24]
