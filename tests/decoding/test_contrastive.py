"""Contrastive search against its definition, without caches."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from hugging_face import decoder_pass, ragged_prompts, torch_model

from jaxalign.decoding import Sampling, contrastive_search, generate

NEW = 6


def _naive(theirs, prompt, top_k, alpha):
    sequence, logps = (0,), []
    while len(sequence) <= NEW and sequence[-1] != 1:
        every = decoder_pass(theirs, prompt, [sequence])[0][0]
        tokens = np.argsort(-every)[:top_k]
        candidates = [(*sequence, int(token)) for token in tokens]
        states = decoder_pass(theirs, prompt, candidates)[1]
        likeness = torch.cosine_similarity(states[:, :-1], states[:, -1:], dim=-1)
        likeness = likeness.max(dim=1).values.numpy()
        best = np.argmax((1 - alpha) * np.exp(every[tokens]) - alpha * likeness)
        logps.append(every[tokens[best]])
        sequence = candidates[best]
    return sequence[1:], logps


def test_contrastive_search_equals_its_definition(tiny):
    theirs, prompts = torch_model(*tiny), ragged_prompts(4, 9, seed=4)
    found = {}
    for alpha in (0.6, 0.1):
        found[alpha] = jax.device_get(
            contrastive_search(
                *tiny, prompts, max_new_tokens=NEW, top_k=3, penalty_alpha=alpha
            )
        )
        for row, prompt in enumerate(prompts):
            tokens, logps = _naive(theirs, prompt, 3, alpha)
            length = found[alpha].lengths[row, 0]
            assert tuple(found[alpha].tokens[row, 0, :length]) == tokens
            assert (found[alpha].tokens[row, 0, length:] == 0).all()
            np.testing.assert_allclose(
                found[alpha].logps[row, 0, :length], logps, atol=1e-4
            )
    assert (found[0.6].tokens != found[0.1].tokens).any()


def test_one_candidate_is_greedy(tiny):
    prompts = ragged_prompts(4, 9, seed=4)
    greedy = generate(
        *tiny,
        prompts,
        key=jax.random.key(0),
        prompt_ids=np.arange(4),
        num_samples=1,
        max_new_tokens=NEW,
        sampling=Sampling(temperature=0.0),
    )
    found = contrastive_search(*tiny, prompts, max_new_tokens=NEW, top_k=1)
    np.testing.assert_array_equal(found.tokens, greedy.tokens)


def test_bad_settings_are_refused(tiny):
    prompts = ragged_prompts(2, 9, seed=4)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        contrastive_search(*tiny, prompts, max_new_tokens=NEW, top_k=0)
    with pytest.raises(ValueError, match=r"penalty_alpha must lie in \[0, 1\], got 2"):
        contrastive_search(*tiny, prompts, max_new_tokens=NEW, penalty_alpha=2.0)
