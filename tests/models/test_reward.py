"""Reward models: what they read, whatever the packing; and sums of heads."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import models
from jaxalign.models import joint, reward

POINTWISE = [
    {"read": "response_last", "members": 3},
    {"read": "response_mean", "attributes": "good=1.0,long=-0.5"},
    {"read": "joint_mean", "members": 2},
    {"read": "joint_label", "label": 7},
]


def outputs(model, params, batch):
    function = jax.jit(
        lambda p, b: model.apply({"params": p}, b, method="outputs")
    )  # fmt: skip
    return np.asarray(function(params, batch))


@pytest.mark.parametrize("settings", POINTWISE, ids=lambda s: s["read"])
def test_packed_equals_unpacked(
    config, random_params, packed, unpacked, flatten, settings
):
    model = models.RewardModel(config, **settings)
    params = random_params(model)
    got, want = (outputs(model, params, b) for b in (packed, unpacked))
    assert got.shape == (*packed["response_mask"].shape, model.members,
                         len(model.weights))  # fmt: skip
    np.testing.assert_allclose(flatten(got), want[:, 0], atol=2e-5)
    assert not got[packed["response_mask"] == 0].any()
    whole = model.apply({"params": params}, packed)
    np.testing.assert_allclose(whole, reward.combine(model, got), atol=2e-5)


@pytest.mark.parametrize("settings", POINTWISE, ids=lambda s: s["read"])
def test_scores_are_read_off_features(config, random_params, packed, settings):
    model = models.RewardModel(config, **settings, prototypes=3)
    params = random_params(model)
    assert params["prototypes"].shape == (3, config.emb_dim)

    @jax.jit
    def read(params, batch):
        features = model.apply({"params": params}, batch, method="features")
        return features, model.apply({"params": params}, features, method="heads")

    features, found = read(params, packed)
    real = packed["response_mask"] > 0
    assert features.dtype == jnp.float32 and not np.asarray(features)[~real].any()
    expected = outputs(model, params, packed)
    np.testing.assert_allclose(np.asarray(found)[real], expected[real], atol=2e-5)


def test_a_single_head_at_the_last_state_is_the_scalar_model(
    config, random_params, packed
):
    scalar = models.ScalarModel(config)
    params = random_params(scalar)
    own = {**params, "reward_head": params["value_head"]}
    del own["value_head"]
    found = models.RewardModel(config).apply({"params": own}, packed)
    expected = scalar.apply({"params": params}, packed)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_joint_rows_are_prompt_and_response(packed, examples):
    tokens, segments = joint.with_response(packed)
    found = np.asarray(tokens)[packed["response_mask"] > 0]
    texts = [[*x, *y] for x, ys in examples for y in ys]
    for row, text in zip(found, texts, strict=True):
        np.testing.assert_array_equal(row[: len(text)], text)
        assert not row[len(text) :].any()
    lengths = np.asarray(segments).sum(-1)[packed["response_mask"] > 0]
    assert lengths.tolist() == list(map(len, texts))


def with_pairs(batch):
    """Pairs of the first row's responses: those of its first and third prompt."""
    return {
        **batch,
        "pair_mask": np.array([[1, 1, 1], [0, 0, 0]], np.float32),
        "pair_chosen": np.array([[0, 5, 3], [0, 0, 0]], np.int32),
        "pair_rejected": np.array([[1, 4, 5], [0, 0, 0]], np.int32),
    }


@pytest.mark.parametrize("read", reward.PAIRWISE)
def test_pairs_are_read_in_both_orders(config, random_params, packed, examples, read):
    label = {"label": 3} if read == "pair_label" else {}
    model = models.RewardModel(config, read=read, **label)
    params = random_params(model)
    batch = with_pairs(packed)
    tokens, _ = joint.with_pair(batch, swapped=True)
    (x, ys), (z, ws) = examples[0], examples[2]
    row = [*x, *ys[1], *ys[0]]
    np.testing.assert_array_equal(tokens[0, 0, : len(row)], row)
    row = [*z, *ws[1], *ws[2]]
    np.testing.assert_array_equal(tokens[0, 1, : len(row)], row)
    swapped = {
        **batch,
        "pair_chosen": batch["pair_rejected"],
        "pair_rejected": batch["pair_chosen"],
    }
    found = outputs(model, params, batch)
    assert np.all(np.abs(found[0]) > 0) and not found[1].any()
    np.testing.assert_array_equal(outputs(model, params, swapped), -found)


@pytest.mark.parametrize("tied", [False, True])
def test_the_labels_logit_is_the_policys(config, random_params, examples, tied):
    config = dataclasses.replace(config, logits_via_embedding=tied)
    policy = models.T5(config)
    params = random_params(policy)
    model = models.RewardModel(config, read="joint_label", label=7)
    # A policy's parameters are a scorer's: nothing is new.
    shapes = jax.tree.map(jnp.shape, models.shapes(model))
    assert shapes == jax.tree.map(jnp.shape, models.shapes(policy))
    prompt, responses = examples[0]
    text = np.array([[*prompt, *responses[0]]])
    ones = np.ones_like(text)

    def first(module):
        encoded = module.encode(text, ones)
        start = np.zeros((1, 1, 1), np.int32)
        states = module.decode(encoded, ones, start, start + 1, start + 1)
        return module.logits(states)[0, 0, 0, 7]

    expected = policy.apply({"params": params}, method=first)
    place = _place(prompt, responses[0])
    found = model.apply({"params": params}, place)
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-4)


def _place(prompt, response):
    one = np.ones((1, 1), np.float32)
    target = np.array(response, np.int32)[None, None]
    return {
        "encoder_input_tokens": np.array([prompt], np.int32),
        "encoder_segment_ids": np.ones((1, len(prompt)), np.int32),
        "decoder_target_tokens": target,
        "decoder_segment_ids": np.ones_like(target),
        "prompt_mask": one,
        "response_mask": one,
        "response_prompt": np.zeros((1, 1), np.int32),
    }


def test_heads_become_one_number():
    config = models.T5Config(8, 4, 1, 4, 4, 1, 1)
    model = models.RewardModel(
        config, members=3, attributes="a=1.0,b=-0.5", aggregate="worst"
    )
    outputs = np.random.default_rng(0).normal(size=(5, 3, 2))
    plain = outputs[..., 0] - 0.5 * outputs[..., 1]
    found = reward.combine(model, outputs)
    np.testing.assert_allclose(found, plain.min(-1), rtol=1e-5)
    mean, deviation = outputs.mean(0), outputs.std(0)
    z = (outputs - mean) / deviation
    z = z[..., 0] - 0.5 * z[..., 1]
    standard = {"mean": mean, "deviation": deviation}
    found = reward.combine(model, outputs, standard, how="penalised", penalty=2.0)
    np.testing.assert_allclose(found, z.mean(-1) - 2 * z.std(-1), rtol=1e-4, atol=1e-5)


def test_thresholds_ascend_from_equal_steps():
    config = models.T5Config(8, 4, 1, 4, 4, 1, 1)
    model = models.RewardModel(config, levels=5, attributes="a=1.0,b=1.0")
    params = models.init_params(model, jax.random.key(0))
    found = model.apply({"params": params}, method="thresholds")
    np.testing.assert_allclose(found, [[-1.5, -0.5, 0.5, 1.5]] * 2, atol=1e-6)
    assert models.restored(models.stored(model)) == model


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"read": "last"}, "RewardModel.read must be one of"),
        ({"read": "joint_label"}, r"label must be an id in \[0, 40\), got -1"),
        ({"read": "joint_label", "label": 40}, "got 40"),
        ({"read": "pair_label", "label": 1, "members": 2}, "members must be 1"),
        ({"members": 0}, "members >= 1"),
        ({"levels": 1}, "at least 2"),
        ({"aggregate": "best"}, "aggregate must be one of"),
        ({"attributes": "good"}, "must be name=weight"),
        ({"attributes": "good=1,good=2"}, "each once"),
        ({"attributes": "good=nan"}, "got 'good=nan'"),
    ],
)
def test_what_cannot_be_is_refused(config, settings, says):
    with pytest.raises(ValueError, match=says):
        models.shapes(models.RewardModel(config, **settings))
