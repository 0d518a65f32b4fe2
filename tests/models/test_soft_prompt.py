"""Soft prompts are what tokens with the same embeddings would be."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from jaxalign import models
from jaxalign.decoding import BeamSearch, Sampling, beam_search, generate
from jaxalign.models import adapters, soft_prompt

IDS = (7, 3, 21)  # whose embeddings the rows are
PROMPT = adapters.SoftPrompt(length=3, start=IDS)


@pytest.fixture(scope="module")
def prompted(params):
    """Parameters with a soft prompt whose rows are embeddings of `IDS`."""
    return adapters.overlay(params, PROMPT.init(jax.random.key(0), params))


@pytest.fixture(scope="module")
def spelt(unpacked):
    """The examples, one in a row, each prompt after `IDS` as tokens."""
    tokens = unpacked["encoder_input_tokens"]
    before = np.tile(np.array(IDS, np.int32), (len(tokens), 1))
    of_tokens = unpacked["encoder_segment_ids"]
    return {
        **unpacked,
        "encoder_input_tokens": np.concatenate([before, tokens], 1),
        "encoder_segment_ids": np.concatenate([before * 0 + 1, of_tokens], 1),
    }


def logps(model, params, batch):
    run = jax.jit(functools.partial(models.response_logps, model))
    return np.asarray(run(params, batch))


@pytest.mark.parametrize(
    "fields", [{}, {"scan_layers": True}, {"attention": "chunked"}]
)
def test_rows_are_tokens_unpacked_and_packed(
    fields, params, prompted, packed, unpacked, spelt, flatten, variant
):
    model = variant(**fields)
    if model.config.scan_layers:
        params, prompted = map(models.stack_layers, (params, prompted))
    wanted = logps(model, params, spelt)[:, 0]
    assert abs(wanted - logps(model, params, unpacked)[:, 0]).max() > 1e-2
    for batch, pick in ((unpacked, lambda x: x[:, 0]), (packed, flatten)):
        found = pick(logps(model, prompted, batch))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_tokens(
    model, params, prompted, packed, spelt, value_and_gradient
):
    """The rows' own are what the tokens have more than where they stand elsewhere."""
    _, found = value_and_gradient(model, prompted, packed)
    _, wanted = value_and_gradient(model, params, spelt)
    own = found["token_embedder"].pop("soft_prompt")
    table, tokens = (x["token_embedder"].pop("embedding") for x in (found, wanted))
    table = table.copy()
    table[list(IDS)] += own
    largest = abs(tokens).max()
    np.testing.assert_allclose(table, tokens, rtol=0, atol=1e-4 * largest)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * abs(b).max() + 1e-6)


def test_states_of_tokens_stay_where_tokens_are(model, params, prompted, packed, spelt):
    """And those of the rows follow, prompt by prompt."""
    states = models.encode(model, prompted, packed)
    wanted = np.asarray(models.encode(model, params, spelt))
    length = packed["encoder_input_tokens"].shape[1]
    assert states.shape[1] == length + 3 * len(IDS)
    segments = packed["encoder_segment_ids"]
    places = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]  # rows and segments
    first = (0, 2, 3, 6, 7)  # of the prompt's rows in `spelt`
    for (row, number), alone in zip(places, first, strict=True):
        own = np.asarray(states[row, :length])[segments[row] == number]
        close = {"rtol": 1e-4, "atol": 1e-5}
        np.testing.assert_allclose(own, wanted[alone, 3 : 3 + len(own)], **close)
        at = length + 3 * (number - 1)
        np.testing.assert_allclose(states[row, at : at + 3], wanted[alone, :3], **close)


def test_decoding_is_that_of_the_tokens(model, params, prompted, examples):
    """Samples and beams."""
    tokens = np.zeros((len(examples), 11), np.int32)
    spelt = np.zeros((len(examples), 14), np.int32)
    for i, (prompt, _) in enumerate(examples):
        tokens[i, : len(prompt)] = prompt
        spelt[i, : 3 + len(prompt)] = [*IDS, *prompt]
    settings = {"key": jax.random.key(4), "max_new_tokens": 6, "num_samples": 3}
    settings |= {"sampling": Sampling(1.0), "prompt_ids": np.arange(len(tokens))}
    wanted = generate(model, params, spelt, **settings)
    found = generate(model, prompted, tokens, **settings)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.logps, wanted.logps, rtol=1e-4, atol=1e-5)
    beams = {"search": BeamSearch(3), "max_new_tokens": 6}
    wanted = beam_search(model, params, spelt, **beams)
    found = beam_search(model, prompted, tokens, **beams)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    # A row without a prompt has no response, whatever is before prompts.
    tokens[0] = 0
    assert not generate(model, prompted, tokens, **settings).tokens[0].any()


@pytest.mark.parametrize("read", ["prompt_mean", "response_last", "response_mean"])
def test_numbers_of_prompts_and_responses_have_it_too(
    read, config, random_params, packed, unpacked
):
    net = models.ScalarModel(config, read=read)
    base = random_params(net)
    params = adapters.overlay(base, PROMPT.init(jax.random.key(0), base))
    adapters.check_targets(PROMPT, base, net)
    run = jax.jit(lambda params, batch: net.apply({"params": params}, batch))
    kind = read.partition("_")[0]
    found = np.asarray(run(params, packed))[packed[f"{kind}_mask"] > 0]
    alone = np.asarray(run(params, unpacked))[:, 0]
    if kind == "prompt":
        alone = alone[[0, 2, 3, 6, 7]]
    np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-5)
    bare = np.asarray(run(base, packed))[packed[f"{kind}_mask"] > 0]
    assert abs(found - bare).max() > 1e-3


def test_vectors_of_prompts_have_it_too(config, random_params, packed, unpacked):
    net = models.EmbeddingModel(config, features=5)
    base = random_params(net)
    params = adapters.overlay(base, PROMPT.init(jax.random.key(0), base))
    adapters.check_targets(PROMPT, base, net)
    found, alone = (net.apply({"params": params}, b) for b in (packed, unpacked))
    found = np.asarray(found)[packed["prompt_mask"] > 0]
    alone = np.asarray(alone)[[0, 2, 3, 6, 7], 0]
    np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-5)


def test_rows_begin_where_they_are_told(params):
    table = params["token_embedder"]["embedding"]

    def rows(**settings):
        own = adapters.SoftPrompt(**settings).init(jax.random.key(3), params)
        return np.asarray(own["token_embedder"]["soft_prompt"])

    np.testing.assert_array_equal(rows(length=5, start=IDS), table[[7, 3, 21, 7, 3]])
    np.testing.assert_array_equal(rows(length=2, start=IDS), table[[7, 3]])
    drawn = rows(length=30)
    same = (drawn[:, None] == table[None]).all(-1)
    assert (same.sum(1) == 1).all() and (same.sum(0) <= 1).all()
    uniform = rows(length=30, start="uniform")
    assert abs(uniform).max() <= 0.5 and abs(uniform.mean()) < 0.05
    np.testing.assert_allclose(uniform.std(), 12**-0.5, rtol=0.05)
    stored = adapters.stored(PROMPT)
    assert adapters.restored({**stored, "start": list(IDS)}) == PROMPT


def test_what_cannot_be_is_refused(model, params, prompted, packed):
    for settings, message in (
        ({"length": 0}, "length must be a whole number of at least 1, got 0"),
        ({"length": 2.0}, "length must be a whole number"),
        ({"start": "vocab"}, "one of .* or a sequence of ids, got 'vocab'"),
        ({"start": []}, "or a sequence of ids"),
        ({"start": [1, -2]}, "or a sequence of ids"),
        ({"start": [1, 2.5]}, "or a sequence of ids"),
    ):
        with pytest.raises(ValueError, match=message):
            adapters.SoftPrompt(**settings)
    with pytest.raises(ValueError, match="has the id 40, but .* ids 0 to 39"):
        adapters.SoftPrompt(start=[2, 40]).init(jax.random.key(0), params)
    with pytest.raises(ValueError, match=r"token_embedder/embedding; .*\['encoder'\]"):
        PROMPT.init(jax.random.key(0), {"encoder": {}})
    tokens, segments = packed["encoder_input_tokens"], packed["encoder_segment_ids"]
    with pytest.raises(ValueError, match="how many prompts a row has room for"):
        model.apply({"params": prompted}, tokens, segments, method="encode")
    with pytest.raises(ValueError, match="encoded with other parameters"):
        bare = models.encode(model, params, packed)
        models.response_logps(model, prompted, packed, encoded=bare)
    with pytest.raises(ValueError, match="cannot be merged .* --format=peft"):
        adapters.merge(prompted)
    assert soft_prompt.held(prompted) and not soft_prompt.held(adapters.plain(prompted))


def test_a_network_that_would_not_look_at_it_is_refused(config, params):
    class Deaf(models.T5):
        def encode(self, tokens, segments, *, deterministic=True):
            return self.encoder(self.token_embedder(tokens), segments, deterministic)

        def decode(self, encoded, of_encoder, *arguments, deterministic=True):
            embed = self.token_embedder
            tokens, *rest = arguments
            args = embed(tokens), encoded, *rest, of_encoder, deterministic
            return self.decoder(*args)

    with pytest.raises(ValueError, match="Deaf puts no soft prompt before its tokens"):
        adapters.check_targets(PROMPT, params, Deaf(config))
