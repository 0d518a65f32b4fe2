"""Sampling against enumeration (numpy float64) and Hugging Face's logits warpers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from transformers.generation import logits_process as hf

from jaxalign.decoding import sampling as sampling_lib
from jaxalign.decoding.sampling import Sampling

SETTINGS = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(temperature=1.7),
    Sampling(top_k=1),
    Sampling(top_k=5),
    Sampling(top_k=1000),
    Sampling(top_p=0.9),
    Sampling(top_p=0.35),
    Sampling(top_p=1e-4),
    Sampling(temperature=0.7, top_k=6, top_p=0.8),
    Sampling(temperature=1.5, top_k=3, top_p=0.5),
    Sampling(min_p=0.2),
    Sampling(temperature=1.3, min_p=0.05),
    Sampling(typical_p=0.6),
    Sampling(typical_p=0.15),
    Sampling(temperature=1.4, top_k=9, top_p=0.95, min_p=0.02, typical_p=0.8),
]


_sample = jax.jit(sampling_lib.sample, static_argnames="sampling")


def _logits(rows: int, vocab: int, scale: float = 2.0) -> np.ndarray:
    rng = np.random.default_rng(rows * 1000 + vocab)
    return (scale * rng.standard_normal((rows, vocab))).astype(np.float32)


def _enumerate(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The sampler's distribution of one row, by its definition, in float64."""

    def softmax(values):
        weights = np.exp(values - values.max())
        return weights / weights.sum()

    logits = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-logits)
    keep = np.ones(len(logits), bool)
    if sampling.top_k:
        keep[order[sampling.top_k :]] = False
    probs = softmax(np.where(keep, logits, -np.inf))
    if sampling.top_p < 1.0:
        mass = 0.0
        for token in order:
            if mass >= sampling.top_p:
                keep[token] = False
            mass += probs[token]
    probs = softmax(np.where(keep, logits, -np.inf))
    keep &= probs >= sampling.min_p * probs.max()
    if sampling.typical_p < 1.0:
        probs = softmax(np.where(keep, logits, -np.inf))
        entropy = scipy.stats.entropy(probs)
        with np.errstate(divide="ignore"):
            distance = np.abs(-np.log(probs) - entropy)
        mass = 0.0
        for token in np.argsort(distance):
            if mass >= sampling.typical_p:
                keep[token] = False
            mass += probs[token]
    return softmax(np.where(keep, logits, -np.inf))


@pytest.mark.parametrize("vocab", [11, 300])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_transforms_equal_hugging_face(setting, vocab):
    logits = _logits(8, vocab)
    scores = torch.tensor(logits)
    if setting.temperature != 1.0:
        scores = hf.TemperatureLogitsWarper(setting.temperature)(None, scores)
    if setting.top_k:
        scores = hf.TopKLogitsWarper(setting.top_k)(None, scores)
    if setting.top_p < 1.0:
        scores = hf.TopPLogitsWarper(setting.top_p)(None, scores)
    if setting.min_p:
        scores = hf.MinPLogitsWarper(setting.min_p)(None, scores)
    if setting.typical_p < 1.0:
        scores = hf.TypicalLogitsWarper(setting.typical_p)(None, scores)
    expected = torch.log_softmax(scores, -1).numpy()
    found = np.asarray(
        jax.nn.log_softmax(sampling_lib.sampler_logits(jnp.asarray(logits), setting))
    )
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
    np.testing.assert_allclose(found, expected, atol=2e-5)


# One of each rule: every setting is a compilation, and the transforms are tested above.
@pytest.mark.parametrize(
    "setting", [SETTINGS[i] for i in (0, 1, 4, 6, 9, 11, 13, 15)], ids=str
)
def test_frequencies_follow_the_enumerated_distribution(setting):
    draws = 20_000
    logits = _logits(1, 12, scale=1.0)
    expected = _enumerate(logits[0], setting)
    keys = jax.random.split(jax.random.key(7), draws)
    drawn = _sample(
        jnp.broadcast_to(logits, (draws, logits.shape[1])), keys, sampling=setting
    )
    counts = np.bincount(np.asarray(drawn.tokens), minlength=12)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    if kept.sum() > 1:
        p_value = scipy.stats.chisquare(counts[kept], draws * expected[kept]).pvalue
        assert p_value > 1e-3, (counts, draws * expected)


def test_frequencies_over_several_blocks_of_the_vocabulary():
    # 300 tokens: the inversion sums blocks of 128, the last one padded.
    draws = 60_000
    logits = _logits(1, 300, scale=1.0)
    expected = _enumerate(logits[0], Sampling())
    keys = jax.random.split(jax.random.key(3), draws)
    tokens = jax.jit(jax.vmap(lambda key: _sample(logits[0], key, Sampling()).tokens))(
        keys
    )
    counts = np.bincount(np.asarray(tokens), minlength=300)
    assert scipy.stats.chisquare(counts, draws * expected).pvalue > 1e-3


def test_both_log_probabilities_are_recorded():
    setting = Sampling(temperature=0.5, top_k=4, top_p=0.9)
    logits = _logits(16, 20)
    keys = jax.random.split(jax.random.key(0), 16)
    drawn = _sample(jnp.asarray(logits), keys, sampling=setting)
    rows, tokens = np.arange(16), np.asarray(drawn.tokens)
    full = np.stack([_enumerate(row, Sampling()) for row in logits])
    own = np.stack([_enumerate(row, setting) for row in logits])
    np.testing.assert_allclose(drawn.logps, np.log(full[rows, tokens]), atol=1e-5)
    expected = np.log(own[rows, tokens])
    np.testing.assert_allclose(drawn.sampler_logps, expected, atol=1e-5)
    assert np.abs(np.asarray(drawn.logps - drawn.sampler_logps)).max() > 0.1


def test_greedy_takes_the_maximum_and_is_certain():
    logits = _logits(6, 50)
    keys = jax.random.split(jax.random.key(0), 6)
    drawn = _sample(jnp.asarray(logits), keys, Sampling(temperature=0.0))
    np.testing.assert_array_equal(drawn.tokens, logits.argmax(-1))
    np.testing.assert_array_equal(drawn.sampler_logps, 0.0)
    top = [np.log(_enumerate(row, Sampling()).max()) for row in logits]
    np.testing.assert_allclose(drawn.logps, top, atol=1e-5)


def test_a_tiny_temperature_is_greedy_and_finite():
    logits = _logits(6, 50) * 1e3
    keys = jax.random.split(jax.random.key(0), 6)
    drawn = _sample(jnp.asarray(logits), keys, Sampling(temperature=1e-6))
    np.testing.assert_array_equal(drawn.tokens, logits.argmax(-1))
    assert np.isfinite(np.asarray(drawn.sampler_logps)).all()


def test_tokens_without_mass_are_never_drawn():
    # Mass sits on two tokens at the block borders; the extremes of the uniform
    # number must still land on one of them.
    logits = np.full((300,), -np.inf, np.float32)
    logits[[127, 256]] = 0.0
    uniform = jnp.array([0.0, 0.25, 0.5, 0.75, 1.0 - 2**-24, 1.0])
    rows = jnp.broadcast_to(logits, (6, 300))
    tokens, total = map(np.asarray, sampling_lib._categorical(uniform, rows))
    np.testing.assert_allclose(total, np.log(2.0), rtol=1e-6)
    np.testing.assert_array_equal(tokens, [127, 127, 256, 256, 256, 256])


def test_ties_at_the_border_are_kept_together():
    logits = jnp.array([0.0, 1.0, 0.0, 1.0])
    for rules in (Sampling(top_k=3), Sampling(top_p=0.9)):
        np.testing.assert_array_equal(
            sampling_lib.sampler_logits(logits, rules), logits
        )
    np.testing.assert_array_equal(
        sampling_lib.sampler_logits(logits, Sampling(top_k=1)),
        [-np.inf, 1.0, -np.inf, 1.0],
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"temperature": -1.0}, "temperature must be 0 .greedy. or finite"),
        ({"temperature": 1e-9}, "temperature must be 0 .greedy. or finite"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be an integer >= 0"),
        ({"top_k": 2.5}, "top_k must be an integer >= 0"),
        ({"top_p": 0.0}, "top_p must lie in"),
        ({"top_p": 1.5}, "top_p must lie in"),
        ({"typical_p": 0.0}, "typical_p must lie in"),
        ({"min_p": 1.5}, "min_p must lie in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
        ({"length_penalty": (-1, 1.0)}, "length_penalty must be"),
        ({"bad_words": [[]]}, "bad_words holds an empty sequence"),
        ({"bad_words": [[1]]}, "bad_words forbids EOS"),
        ({"min_new_tokens": -1}, "min_new_tokens must be >= 0"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)


def test_entropy_and_forced_tokens():
    logits = _logits(5, 20)
    keys = jax.random.split(jax.random.key(0), 5)
    forced = jnp.array([3, -1, 7, -1, -1])
    draw = jax.jit(
        lambda forced: sampling_lib.sample(
            jnp.asarray(logits), keys, Sampling(top_k=3), forced=forced, entropy=True
        )
    )
    free, found = draw(jnp.full(5, -1)), draw(forced)
    full = np.stack([_enumerate(row, Sampling()) for row in logits])
    np.testing.assert_allclose(
        found.entropies, scipy.stats.entropy(full, axis=1), rtol=1e-5
    )
    expected = np.where(forced >= 0, forced, free.tokens)
    np.testing.assert_array_equal(found.tokens, expected)
    np.testing.assert_allclose(
        found.logps, np.log(full[np.arange(5), expected]), atol=1e-5
    )
    np.testing.assert_array_equal(found.sampler_logps == 0.0, forced >= 0)
