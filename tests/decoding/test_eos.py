"""Another id for EOS: the same network with two ids exchanged says the same."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest
from hugging_face import ragged_prompts

from jaxalign.decoding import (
    BeamSearch,
    Sampling,
    beam_search,
    constraints,
    contrastive_search,
    generate,
    programs,
)
from jaxalign.decoding.bad_words import without
from jaxalign.decoding.smc import smc
from jaxalign.serving.backend import EngineBackend
from jaxalign.serving.batching import Settings, Work
from jaxalign.serving.requests import Limits, parse

NEW = 8
EXCHANGED = np.arange(24)
EXCHANGED[[1, 2]] = 2, 1


class Letters:
    """A letter an id, and any of two ids as EOS."""

    vocab_size, escapes = 24, None

    def __init__(self, eos_id):
        self.eos_id, self.unk_id = eos_id, 3 - eos_id

    def token_bytes(self, first=False, special=False):
        none = b"" if special else None
        return [none] * 3 + [bytes([97 + i]) for i in range(21)]

    def to_json(self):
        return {"kind": "bytes"}

    def encode(self, text):
        return [ord(letter) - 94 for letter in text]

    def decode(self, ids, final=True):
        kept = []
        for i in ids:
            if i == self.eos_id:
                break
            kept += [chr(i + 94)] if i > 2 else []
        return "".join(kept)


@pytest.fixture(scope="module")
def both(tiny):
    """``(model, params, vocabulary, prompts)``: with EOS 1, and with EOS 2."""
    model, params = tiny
    prompts = ragged_prompts(4, 9, seed=4)
    table = params["token_embedder"]["embedding"]
    kernel = params["decoder"]["logits_dense"]["kernel"]
    kernel = kernel.at[:, 1].multiply(3)  # some texts end, others do not

    def network(ids):
        head = {"logits_dense": {"kernel": kernel[:, ids]}}
        embedder = {"embedding": table[ids]}
        decoder = {**params["decoder"], **head}
        return {**params, "token_embedder": embedder, "decoder": decoder}

    params, other = network(np.arange(24)), network(EXCHANGED)
    return (
        (model, params, Letters(1), prompts),
        (model, other, Letters(2), EXCHANGED[prompts]),
    )


def same(first, second, numbers):
    """Tokens with the two ids exchanged, and the same numbers; some have ended."""
    np.testing.assert_array_equal(EXCHANGED[first.tokens], second.tokens)
    np.testing.assert_array_equal(first.lengths, second.lengths)
    for name in numbers:
        np.testing.assert_allclose(
            getattr(first, name), getattr(second, name), atol=1e-5
        )
    assert (np.asarray(first.lengths) < NEW).any()


@pytest.mark.parametrize("kind", ["regex", "bad words"])
def test_constraints(both, kind):
    found = []
    for model, params, vocabulary, prompts in both:
        if kind == "regex":
            rule = constraints.regex("[a-k]{2,5}", vocabulary, 24)
        else:
            rule = without(["a", "bc"], vocabulary, 24)
        assert rule.accepts([*vocabulary.encode("kk"), vocabulary.eos_id])
        found.append(
            generate(
                *(model, params, prompts),
                key=jax.random.key(0),
                prompt_ids=np.arange(4),
                num_samples=1,
                max_new_tokens=NEW,
                sampling=Sampling(temperature=0.0, eos_id=vocabulary.eos_id),
                constraint=rule,
                prefixes=[[vocabulary.encode("k")]] * 4,
            )
        )
    same(*found, ["logps"])


def test_beam_search(both):
    found = [
        beam_search(
            *(model, params, prompts),
            max_new_tokens=NEW,
            search=BeamSearch(3, rules=Sampling(eos_id=vocabulary.eos_id)),
            num_return=2,
            constraint=constraints.regex("[a-k]*", vocabulary, 24),
        )
        for model, params, vocabulary, prompts in both
    ]
    same(*found, ["scores"])


def test_contrastive_search(both):
    found = [
        contrastive_search(
            *(model, params, prompts), max_new_tokens=NEW, eos_id=vocabulary.eos_id
        )
        for model, params, vocabulary, prompts in both
    ]
    same(*found, ["logps"])


@pytest.mark.parametrize("kind", ["regex", "infilling"])
def test_monte_carlo(both, kind):
    found = []
    for model, params, vocabulary, prompts in both:
        program = constraints.regex("kca", vocabulary, 24)
        if kind == "infilling":
            parts = [vocabulary.encode("kca")]
            program = programs.infilling(parts, eos_id=vocabulary.eos_id)
        found.append(
            smc(
                *(model, params, prompts, program),
                key=jax.random.key(0),
                num_particles=2,
                expansion=2,
                max_new_tokens=NEW,
                vocab_size=24,
                eos_id=vocabulary.eos_id,
            )
        )
    # One text alone is possible: its probability is the evidence, drawn or not.
    same(*found, ["log_evidence"])
    assert np.isfinite(found[0].log_evidence).all()
    assert found[1].ended.any() and (found[1].lengths == 4).all()


def test_a_blank_holds_no_eos(both):
    model, params, vocabulary, prompts = both[1]
    program = programs.infilling([None, [5]], eos_id=vocabulary.eos_id)
    found = smc(
        *(model, params, prompts, program),
        key=jax.random.key(0),
        num_particles=8,
        expansion=2,
        max_new_tokens=NEW,
        eos_id=vocabulary.eos_id,
    )
    for tokens, lengths in zip(found.tokens, found.lengths, strict=True):
        for row, length in zip(np.asarray(tokens), np.asarray(lengths), strict=True):
            assert row[: length - 1].tolist().count(2) == 0
            assert row[length - 2 : length].tolist() == [5, 2]


def test_a_prefix_holds_no_eos(both):
    model, params, vocabulary, prompts = both[1]
    with pytest.raises(ValueError, match=r"holds EOS \(2\)"):
        generate(
            *(model, params, prompts[:1]),
            key=jax.random.key(0),
            prompt_ids=np.arange(1),
            num_samples=1,
            max_new_tokens=NEW,
            sampling=Sampling(eos_id=2),
            prefixes=[[[5, 2]]],
        )


def test_the_server(both):
    limits = Limits(body_bytes=999, prompt_tokens=16, new_tokens=NEW, samples=1)
    found = []
    for model, params, vocabulary, _ in both:
        body = {"model": "m", "prompt": "kab", "temperature": 0}
        work = parse(body, chat=False, vocabulary=vocabulary, model="m", limits=limits)
        assert work.prompts == [[*vocabulary.encode("kab"), vocabulary.eos_id]]
        policy = types.SimpleNamespace(
            model=model, params=params, vocabulary=vocabulary
        )
        backend = EngineBackend(
            policy,
            max_prompt_tokens=16,
            max_new_tokens=NEW,
            max_samples=1,
            batch_size=2,
        )
        tickets = [
            backend.submit(
                [*vocabulary.encode(text), vocabulary.eos_id],
                *(0, Settings(0.0, 1.0)),
                max_new_tokens=NEW,
                num_samples=1,
            )
            for text in ("kab", "c", "defg", "hhhhh")
        ]
        answers = {}
        while len(answers) < len(tickets):
            answers |= backend.step()
        samples = [answers[ticket][0] for ticket in tickets]
        assert all(work.ended(sample) for sample in samples)
        found.append(samples)
    assert [EXCHANGED[s].tolist() for s in found[0]] == found[1]
    assert any(len(sample) < NEW for sample in found[1])
    assert not Work([], [], None, NEW, 1, eos_id=2).ended([1])
