"""Value and reward models: one scalar per prompt, one per response."""

import jax
import numpy as np
import pytest

from jaxalign import models


@pytest.fixture(scope="module")
def value(config, random_params):
    model = models.ScalarModel(config, "prompt_mean")
    return jax.jit(lambda p, b: model.apply({"params": p}, b)), random_params(model)


def test_value_is_an_affine_map_of_the_mean_state(value, model, unpacked):
    forward, params = value
    got = forward(params, unpacked)
    policy = {"token_embedder": params["token_embedder"], "encoder": params["encoder"]}
    tokens, segments = unpacked["encoder_input_tokens"], unpacked["encoder_segment_ids"]
    encode = jax.jit(lambda p: model.apply(p, tokens, segments, method="encode"))
    states = encode({"params": policy})
    head = jax.tree.map(np.asarray, params["value_head"])
    for i, length in enumerate((unpacked["encoder_segment_ids"] > 0).sum(1)):
        mean = np.asarray(states, np.float64)[i, :length].mean(0)
        want = mean @ head["kernel"][:, 0] + head["bias"][0]
        np.testing.assert_allclose(got[i], [want], atol=1e-5)


def test_value_packed_equals_unpacked(value, packed, unpacked):
    forward, params = value
    got = np.asarray(forward(params, packed))
    want = np.asarray(forward(params, unpacked))[:, 0]
    assert got.shape == (2, 3)
    # The unpacked batch repeats a prompt for each of its responses.
    np.testing.assert_allclose(got[0], want[[0, 2, 3]], atol=1e-5)
    np.testing.assert_allclose(got[1, :2], want[[6, 7]], atol=1e-5)
    assert got[1, 2] == 0


def test_reward_packed_equals_unpacked(
    config, random_params, packed, unpacked, flatten
):
    module = models.ScalarModel(config)
    params = random_params(module)
    assert "logits_dense" not in params["decoder"]
    forward = jax.jit(lambda p, b: module.apply({"params": p}, b))
    got, want = forward(params, packed), forward(params, unpacked)
    np.testing.assert_allclose(flatten(got), want[:, 0], atol=1e-5)
    assert np.all(np.asarray(got)[1, 2:] == 0)
    # The last decoder input matters, an earlier response of the row does not.
    changed = {k: v.copy() for k, v in packed.items()}
    changed["decoder_input_tokens"][1, 1, 9] += 1
    differs = np.asarray(forward(params, changed)) != np.asarray(got)
    np.testing.assert_array_equal(np.argwhere(differs), [[1, 1]])
