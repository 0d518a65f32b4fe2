"""Rules that look back, against Hugging Face's logits processors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers.generation import logits_process as hf

from jaxalign.decoding import Sampling, history
from jaxalign.models import T5, T5Config

RULES = Sampling(
    repetition_penalty=1.7,
    bad_words=[[5], [6, 7], [2, 3, 4]],
    min_new_tokens=4,
    length_penalty=(5, 1.3),
    stop_sequences=[[9, 9], [8]],
)
VOCAB = 14
MODEL = T5(T5Config(VOCAB, 8, 2, 4, 16, 1, 1))


def _tokens(rows=6, length=9):
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, VOCAB, (rows, length)).astype(np.int32)
    tokens[0, :4] = [2, 3, 2, 3]
    tokens[1, 5:7] = [6, 6]
    tokens[2, 2:4] = [9, 9]
    return tokens


def test_rules_equal_hugging_face():
    tokens, eos = _tokens(), torch.tensor([1])
    processors = hf.LogitsProcessorList(
        [
            hf.RepetitionPenaltyLogitsProcessor(1.7),
            hf.NoBadWordsLogitsProcessor([[5], [6, 7], [2, 3, 4]], eos),
            hf.MinNewTokensLengthLogitsProcessor(1, 4, eos),
            hf.ExponentialDecayLengthPenalty((5, 1.3), eos, 1),
        ]
    )
    rng = np.random.default_rng(1)
    state = history.empty((len(tokens),), RULES, MODEL)
    apply = jax.jit(
        lambda logits, state, position: history.apply_rules(
            logits, RULES, state, position
        )
    )
    ruled_out = 0
    for position in range(tokens.shape[1] + 1):
        logits = (3 * rng.standard_normal((len(tokens), VOCAB))).astype(np.float32)
        so_far = np.pad(tokens[:, :position], ((0, 0), (1, 0)))
        expected = processors(torch.tensor(so_far).long(), torch.tensor(logits))
        found = apply(logits, state, jnp.full(len(tokens), position))
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)
        ruled_out += np.isinf(found[:, [4, 7]]).sum()
        if position < tokens.shape[1]:
            state = history.extend(state, jnp.asarray(tokens[:, position]))
    assert ruled_out > 0


def test_stop_sequences_and_restart():
    tokens = _tokens()
    state = history.empty((len(tokens),), RULES, MODEL)
    for position in range(tokens.shape[1]):
        state = history.extend(state, jnp.asarray(tokens[:, position]))
        tail = tokens[:, max(position - 1, 0) : position + 1]
        expected = (tokens[:, position] == 8) | (
            (tail == 9).all(axis=1) & (position > 0)
        )
        np.testing.assert_array_equal(history.stopped(state, RULES), expected)
    again = history.restart(state, jnp.arange(len(tokens)) < 2)
    fresh = history.empty((len(tokens),), RULES, MODEL)
    for new, start, old in zip(again, fresh, state, strict=True):
        np.testing.assert_array_equal(new[:2], start[:2])
        np.testing.assert_array_equal(new[2:], old[2:])


def test_allowed_tokens_and_dead_ends():
    logits = jnp.array([[0.5, 1.0, 2.0, 3.0]] * 3)
    allowed = jnp.array([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    found = np.asarray(history.apply_rules(logits, Sampling(), allowed=allowed))
    np.testing.assert_array_equal(found[0], [0.5, -np.inf, 2.0, -np.inf])
    np.testing.assert_array_equal(np.isfinite(found[1]), [False, True, False, False])
    np.testing.assert_array_equal(found[2], logits[2])
