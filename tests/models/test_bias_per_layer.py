"""A position bias in every layer (umT5): layouts, steps, packing, identity."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxalign import models


@pytest.fixture(scope="module")
def own(config, random_params):
    model = models.T5(dataclasses.replace(config, relative_bias_per_layer=True))
    return model, random_params(model)


def test_each_layer_has_a_table(own):
    model, params = own
    for stack in ("encoder", "decoder"):
        assert "relpos_bias" not in params[stack]
        for layer in ("layers_0", "layers_1"):
            table = params[stack][layer]["relpos_bias"]["rel_embedding"]
            assert table.shape == (3, 8)
    scanned = models.T5(dataclasses.replace(model.config, scan_layers=True))
    stacked = models.shapes(scanned)["encoder"]["encoder"]["relpos_bias"]
    assert stacked["rel_embedding"].shape == (3, 2, 8)  # as T5X's scalable_t5
    assert models.logical_axes(scanned)["decoder"]["decoder"]["relpos_bias"] == {
        "rel_embedding": ("heads", "layers", "relpos_buckets")
    }


@pytest.mark.slow
def test_layouts_and_steps_agree(own, packed):
    model, params = own
    want = model.apply({"params": params}, packed)
    scanned = models.T5(dataclasses.replace(model.config, scan_layers=True))
    stacked = models.stack_layers(params)
    got = scanned.apply({"params": stacked}, packed)
    np.testing.assert_allclose(got, want, atol=1e-5)
    # Both layers' tables are read: those of one in place of the other's is another
    # function.
    swapped = jax.tree.map(lambda x: x, params)
    for stack in ("encoder", "decoder"):
        layers = swapped[stack]
        table = layers["layers_0"]["relpos_bias"]
        layers["layers_1"] = layers["layers_1"] | {"relpos_bias": table}
    other = model.apply({"params": swapped}, packed)
    assert np.abs(np.asarray(other) - np.asarray(want)).max() > 1e-2

    rng = np.random.default_rng(3)
    prompt, mask = rng.integers(2, 40, (2, 6)).astype("i4"), np.ones((2, 6), "i4")
    tokens = rng.integers(2, 40, (2, 3, 5)).astype("i4")
    ones = np.ones_like(tokens)
    for network, weights in ((model, params), (scanned, stacked)):

        def apply(method, *args, network=network, weights=weights):
            return network.apply({"params": weights}, *args, method=method)

        encoded = apply("encode", prompt, mask)
        states = apply("decode", encoded, mask, tokens, ones, ones)
        teacher = apply("logits", states)
        cross = apply("cross_key_values", encoded)
        for ring in (False, True):
            cache = network.init_self_cache(2, 3, 5)
            for i in range(5):
                at = (np.full((2, 3), i), i) if ring else (i,)
                step = (tokens[..., i], at[0], cache, cross, mask, *at[1:])
                logits, cache = apply("decode_step", *step)
                np.testing.assert_allclose(logits, teacher[:, :, i], atol=1e-5)


def test_it_is_part_of_what_a_network_is(own, config):
    model, _ = own
    assert model.config.architecture()["relative_bias_per_layer"] is True
    again = models.restored(models.stored(model))
    assert again == model
    # Checkpoints written before there was such a field are the same networks.
    assert "relative_bias_per_layer" not in models.T5(config).config.architecture()
    assert models.restored(models.stored(models.T5(config))).config == config
