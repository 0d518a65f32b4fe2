"""Beam search against Hugging Face; diverse beams against a search without caches."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import torch
from hugging_face import decoder_pass, ragged_prompts, torch_model

from jaxalign.decoding import BeamSearch, Sampling, beam_search, generate
from jaxalign.models import T5, init_params

NEW = 8


@pytest.fixture(scope="module")
def networks(tiny):
    """Two sizes: T5 1.1, and T5 1.0 with other heads, one layer and scanned layers."""
    other = dataclasses.replace(
        tiny[0].config,
        mlp_activations=("relu",),
        logits_via_embedding=True,
        scan_layers=True,
        num_heads=4,
        head_dim=4,
        emb_dim=24,
        num_decoder_layers=1,
    )
    model = T5(other)
    params = init_params(model, jax.random.key(9))
    params = jax.tree.map(lambda x: 2.0 * x if x.ndim > 1 else x, params)
    return [tiny, (model, params)]


CASES = [
    (0, 1, BeamSearch(4), {}),
    (0, 2, BeamSearch(3, 1.0, early_stopping="never"), {}),
    (1, 3, BeamSearch(4, 0.0, early_stopping=True), {}),
    (1, 4, BeamSearch(5, -1.0), {}),
    (
        0,
        5,
        BeamSearch(
            4,
            0.7,
            early_stopping=True,
            rules=Sampling(
                repetition_penalty=1.6, bad_words=[[5], [6, 7]], min_new_tokens=3
            ),
        ),
        {
            "repetition_penalty": 1.6,
            "bad_words_ids": [[5], [6, 7]],
            "min_new_tokens": 3,
        },
    ),
]


@pytest.mark.parametrize("network, seed, search, extra", CASES)
def test_beams_equal_hugging_face(networks, network, seed, search, extra):
    model, params = networks[network]
    theirs = torch_model(model, params)
    for length in (9, 5):  # padded to 9 by us, as it is by them
        prompts = ragged_prompts(8, length, seed=seed)
        with torch.no_grad():
            expected = theirs.generate(
                torch.tensor(prompts, dtype=torch.long),
                attention_mask=torch.tensor(prompts != 0, dtype=torch.long),
                max_new_tokens=NEW,
                do_sample=False,
                num_beams=search.num_beams,
                num_return_sequences=search.num_beams,
                length_penalty=search.length_penalty,
                early_stopping=search.early_stopping,
                output_scores=True,
                return_dict_in_generate=True,
                **extra,
            )
        padded = np.pad(prompts, ((0, 0), (0, 9 - length)))
        found = jax.device_get(
            beam_search(
                model,
                params,
                padded,
                max_new_tokens=NEW,
                search=search,
                num_return=search.num_beams,
            )
        )
        tokens = expected.sequences.numpy()[:, 1:]
        tokens = np.pad(tokens, ((0, 0), (0, NEW - tokens.shape[1])))
        # They pad beams with EOS, we with 0.
        tokens = np.where(np.cumsum(tokens == 1, 1) - (tokens == 1) > 0, 0, tokens)
        np.testing.assert_array_equal(found.tokens.reshape(-1, NEW), tokens)
        np.testing.assert_allclose(
            found.scores.ravel(), expected.sequences_scores.numpy(), rtol=1e-4
        )
        ends = np.where(tokens == 1, np.arange(NEW), NEW - 1).min(axis=1)
        np.testing.assert_array_equal(found.lengths.ravel(), ends + 1)
    assert len(np.unique(found.lengths)) > 1


def test_one_beam_is_greedy_and_more_are_better(tiny):
    prompts = ragged_prompts(8, 9, seed=0)
    none = BeamSearch(1, length_penalty=0.0)
    one = beam_search(*tiny, prompts, max_new_tokens=NEW, search=none)
    greedy = generate(
        *tiny,
        prompts,
        key=jax.random.key(0),
        prompt_ids=np.arange(8),
        num_samples=1,
        max_new_tokens=NEW,
        sampling=Sampling(temperature=0.0),
    )
    np.testing.assert_array_equal(one.tokens, greedy.tokens)
    np.testing.assert_allclose(one.scores, greedy.logps.sum(-1), rtol=1e-5)
    assert BeamSearch(2, 0.6, "brevity").normalizer(7.0) == pytest.approx(2.0**0.6)


def _naive_diverse(logps_of, search, length):
    """Groups of beams by the definition: every step scores whole sequences anew."""
    size = search.num_beams // search.num_groups
    groups = [{"running": [((0,), 0.0)], "done": []} for _ in range(search.num_groups)]
    for position in range(length):
        taken = np.zeros(24)
        for group in groups:
            found = []
            every = logps_of([sequence for sequence, _ in group["running"]])
            for (sequence, score), logps in zip(group["running"], every, strict=True):
                logps = logps - search.diversity_penalty * taken
                found += [((*sequence, v), score + logps[v]) for v in range(24)]
            found = sorted(found, key=lambda x: -x[1])[: 2 * size]
            last = position + 1 == length
            for sequence, score in found[:size]:
                if sequence[-1] == 1 or last:
                    value = score / float(search.normalizer(position + 1))
                    group["done"].append((sequence[1:], value))
            group["done"] = sorted(group["done"], key=lambda x: -x[1])[:size]
            group["running"] = [x for x in found if x[0][-1] != 1][:size]
            for sequence, _ in group["running"]:
                taken[sequence[-1]] += 1
    return sorted(sum((g["done"] for g in groups), []), key=lambda x: -x[1])


def test_diverse_beams_equal_a_search_without_caches(tiny):
    search = BeamSearch(
        6,
        1.0,
        "brevity",
        early_stopping="never",
        num_groups=3,
        diversity_penalty=0.8,
    )
    prompts = ragged_prompts(4, 9, seed=2)
    found = jax.device_get(
        beam_search(*tiny, prompts, max_new_tokens=5, search=search, num_return=6)
    )
    theirs = torch_model(*tiny)
    for row, prompt in enumerate(prompts):
        expected = _naive_diverse(
            lambda sequences: decoder_pass(theirs, prompt, sequences)[0],  # noqa: B023
            search,
            5,
        )
        for n, (tokens, score) in enumerate(expected):
            length = found.lengths[row, n]
            assert tuple(found.tokens[row, n, :length]) == tokens
            np.testing.assert_allclose(found.scores[row, n], score, rtol=1e-4)
    plain = beam_search(
        *tiny,
        prompts,
        max_new_tokens=5,
        search=BeamSearch(6, 1.0, "brevity", early_stopping="never"),
        num_return=6,
    )
    assert (np.asarray(plain.tokens) != found.tokens).any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_beams": 0}, "must be at least 1"),
        ({"num_beams": 4, "num_groups": 3}, "must be a multiple of num_groups=3"),
        ({"normalization": "mean"}, "'length' or 'brevity'"),
        ({"early_stopping": "always"}, "True, False or 'never'"),
        ({"diversity_penalty": 0.5}, "needs num_groups > 1"),
        ({"rules": Sampling(stop_sequences=[[3]])}, "leave out stop_sequences"),
    ],
)
def test_bad_searches_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BeamSearch(**arguments)


def test_sizes_that_do_not_fit_are_refused(tiny):
    prompts = ragged_prompts(2, 5, seed=0)
    with pytest.raises(ValueError, match=r"num_return must lie in \[1, num_beams=4\]"):
        beam_search(
            *tiny, prompts, max_new_tokens=4, search=BeamSearch(4), num_return=5
        )
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        beam_search(*tiny, prompts, max_new_tokens=0, search=BeamSearch(4))
