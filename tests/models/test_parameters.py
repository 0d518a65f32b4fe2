"""Names, shapes, logical axes, initial scales, and the two layer layouts."""

import chex
import jax
import numpy as np
import pytest
from flax import traverse_util

from jaxalign import models

# T5X's tree for T5 1.1 (examples/t5): name -> (shape, logical axes); here E 24,
# H 3, D 8, F 32, V 40, 8 buckets.
ATTENTION = {
    "query/kernel": ((24, 24), ("embed", "joined_kv")),
    "key/kernel": ((24, 24), ("embed", "joined_kv")),
    "value/kernel": ((24, 24), ("embed", "joined_kv")),
    "out/kernel": ((24, 24), ("joined_kv", "embed")),
}
MLP = {
    "mlp/wi_0/kernel": ((24, 32), ("embed", "mlp")),
    "mlp/wi_1/kernel": ((24, 32), ("embed", "mlp")),
    "mlp/wo/kernel": ((32, 24), ("mlp", "embed")),
    "pre_mlp_layer_norm/scale": ((24,), ("embed",)),
}


def _expected():
    scale = ((24,), ("embed",))
    bias = ((3, 8), ("heads", "relpos_buckets"))
    out = {
        "token_embedder/embedding": ((40, 24), ("vocab", "embed")),
        "encoder/relpos_bias/rel_embedding": bias,
        "decoder/relpos_bias/rel_embedding": bias,
        "encoder/encoder_norm/scale": scale,
        "decoder/decoder_norm/scale": scale,
        "decoder/logits_dense/kernel": ((24, 40), ("embed", "vocab")),
    }
    for i in range(2):
        encoder, decoder = f"encoder/layers_{i}", f"decoder/layers_{i}"
        out |= {f"{encoder}/attention/{k}": v for k, v in ATTENTION.items()}
        out[f"{encoder}/pre_attention_layer_norm/scale"] = scale
        for name, norm in (
            ("self_attention", "pre_self_attention_layer_norm"),
            ("encoder_decoder_attention", "pre_cross_attention_layer_norm"),
        ):
            out |= {f"{decoder}/{name}/{k}": v for k, v in ATTENTION.items()}
            out[f"{decoder}/{norm}/scale"] = scale
        out |= {
            f"{stack}/{k}": v for stack in (encoder, decoder) for k, v in MLP.items()
        }
    return out


def _flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def test_t5x_names_shapes_and_axes(model, params):
    shapes = {name: x.shape for name, x in _flat(params).items()}
    axes = _flat(models.logical_axes(model))
    assert {k: (shapes[k], axes[k]) for k in shapes} == _expected()
    assert set(axes) == set(shapes)


def test_scanned_layers_are_stacked_on_the_second_axis(variant):
    model = variant(scan_layers=True)
    abstract = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
    axes = _flat(models.logical_axes(model))
    shapes = {name: x.shape for name, x in _flat(abstract).items()}
    assert set(axes) == set(shapes)
    name = "decoder/decoder/mlp/wo/kernel"
    assert shapes[name] == (32, 2, 24)
    assert axes[name] == ("mlp", "layers", "embed")
    assert shapes["encoder/encoder/pre_mlp_layer_norm/scale"] == (24, 2)
    # The bias is shared by the layers: it stays outside.
    assert shapes["encoder/relpos_bias/rel_embedding"] == (3, 8)


def test_one_layer_names_its_ungated_projection_wi(variant):
    model = variant(mlp_activations=("relu",), logits_via_embedding=True)
    axes = _flat(models.logical_axes(model))
    assert axes["encoder/layers_0/mlp/wi/kernel"] == ("embed", "mlp")
    assert not [name for name in axes if "wi_0" in name or "logits_dense" in name]


def test_conversion_is_exact(params):
    stacked = models.stack_layers(params)
    query = stacked["encoder"]["encoder"]["attention"]["query"]["kernel"]
    for i in range(2):
        np.testing.assert_array_equal(
            query[:, i],
            params["encoder"][f"layers_{i}"]["attention"]["query"]["kernel"],
        )
    chex.assert_trees_all_equal(models.unstack_layers(stacked), params)
    chex.assert_trees_all_equal(models.stack_layers(stacked), stacked)
    # Works on a ScalarModel's parameters, and inside jit.
    part = {"encoder": params["encoder"], "value_head": {"bias": np.zeros(1)}}
    back = jax.jit(lambda p: models.unstack_layers(models.stack_layers(p)))(part)
    chex.assert_trees_all_equal(back, part)
    gap = {"encoder": {"layers_0": {"x": np.zeros(1)}, "layers_2": {"x": np.zeros(1)}}}
    with pytest.raises(ValueError, match=r"layers_0 \.\.\. layers_1.*\[0, 2\]"):
        models.stack_layers(gap)


def test_initial_parameters(model, variant):
    key = jax.random.key(7, impl="rbg")  # compiles faster than the default
    params = models.init_params(model, key)
    chex.assert_trees_all_equal(params, models.init_params(model, key))
    scanned = models.init_params(variant(scan_layers=True), key)
    chex.assert_trees_all_equal(models.stack_layers(params), scanned)
    flat = {k: np.asarray(v) for k, v in _flat(params).items()}
    assert all(np.all(v == 1) for k, v in flat.items() if k.endswith("scale"))
    # Standard deviations, by T5X's initialisers; 576 to 960 draws each.
    for name, std in {
        "token_embedder/embedding": 1.0,
        "encoder/layers_0/attention/query/kernel": (24 * 8) ** -0.5,
        "encoder/layers_1/attention/key/kernel": 24**-0.5,
        "decoder/layers_1/encoder_decoder_attention/out/kernel": 24**-0.5,
        "decoder/layers_0/mlp/wo/kernel": 32**-0.5,
        "decoder/logits_dense/kernel": 24**-0.5,
    }.items():
        np.testing.assert_allclose(flat[name].std(), std, rtol=0.12, err_msg=name)
    layers = [flat[f"decoder/layers_{i}/mlp/wo/kernel"] for i in range(2)]
    assert not np.array_equal(*layers)
