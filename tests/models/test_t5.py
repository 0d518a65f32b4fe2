"""The network over the response batch: packing, rows, layouts, numerics."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import models
from jaxalign.models.layers import Dropout, RelativePositionBias, bucket_table

TOKEN_LOGPS = jax.jit(models.token_logps, static_argnums=0)


def test_packed_equals_unpacked(model, params, packed_result, unpacked, flatten):
    logps = jax.jit(models.response_logps, static_argnums=0)(model, params, unpacked)
    np.testing.assert_allclose(flatten(packed_result[0]), logps[:, 0], atol=2e-5)
    assert np.all(packed_result[0][1, 2:] == 0)  # absent responses


def test_padding_changes_nothing(
    model, params, packed, packed_result, value_and_gradient
):
    grown = dict(packed)
    for name, value in packed.items():
        if name.startswith("encoder"):
            grown[name] = np.pad(value, ((0, 1), (0, 5)))
        elif name.startswith("decoder"):
            grown[name] = np.pad(value, ((0, 1), (0, 1), (0, 3)))
        else:
            grown[name] = np.pad(value, ((0, 1), (0, 0)))
    # Nor does what stands in the padding.
    grown["encoder_input_tokens"][0, -1] = 7
    grown["decoder_input_tokens"][0, -1] = 7
    logps, grads = value_and_gradient(model, params, grown)
    np.testing.assert_allclose(logps[:2], packed_result[0], atol=2e-5)
    chex.assert_trees_all_close(packed_result[1], grads, rtol=1e-4, atol=1e-4)
    assert np.all(logps[2] == 0)


def test_segments_cannot_see_each_other(model, params, packed):
    before = np.asarray(TOKEN_LOGPS(model, params, packed))
    changed = {k: v.copy() for k, v in packed.items()}
    # Another first prompt: to the bit, only its two responses change.
    changed["encoder_input_tokens"][0, :3] += 1
    after = np.asarray(TOKEN_LOGPS(model, params, changed))
    own = packed["decoder_segment_ids"][0] <= 2
    own &= packed["decoder_segment_ids"][0] > 0
    np.testing.assert_array_equal(before[0][~own], after[0][~own])
    assert np.all(before[0][own] != after[0][own])
    np.testing.assert_array_equal(before[1], after[1])


def test_decoder_is_causal(model, params, packed):
    before = np.asarray(TOKEN_LOGPS(model, params, packed))
    changed = {k: v.copy() for k, v in packed.items()}
    changed["decoder_input_tokens"][0, 1, 3] += 1  # inside response 2 of length 7
    after = np.asarray(TOKEN_LOGPS(model, params, changed))
    differs = before != after
    assert differs[0, 1, 3:7].all()
    assert differs.sum() == 4


def test_scores_under_another_prompt(model, params, packed):
    other = np.where(packed["response_prompt"] == 0, 1, 0)
    other[0, 3] = -1
    want = TOKEN_LOGPS(model, params, packed | {"response_prompt": other})
    assert np.all(np.isfinite(want))
    without = packed["decoder_segment_ids"][0] == 4
    assert np.all(np.asarray(want)[0][without] == 0)

    @jax.jit
    def score_given_states(params, batch, prompt):
        tokens, segments = batch["encoder_input_tokens"], batch["encoder_segment_ids"]
        encoded = model.apply({"params": params}, tokens, segments, method="encode")
        # With states given the encoder's inputs are not read again.
        rest = {k: v for k, v in batch.items() if k != "encoder_input_tokens"}
        return models.token_logps(model, params, rest, prompt=prompt, encoded=encoded)

    got = score_given_states(params, packed, other)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_cross_attention_never_copies_the_encoder_over_rows(variant):
    b, k, length, decoder_length = 2, 5, 7, 11
    model = variant(logits_chunk=0)
    shape = jax.ShapeDtypeStruct
    batch = {
        name: shape((b, length), jnp.int32)
        for name in ("encoder_input_tokens", "encoder_segment_ids")
    } | {
        name: shape((b, k, decoder_length), jnp.int32)
        for name in ("decoder_input_tokens", "decoder_segment_ids")
    }
    batch["response_prompt"] = shape((b, 6), jnp.int32)
    params = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
    jaxpr = jax.make_jaxpr(lambda p, x: model.apply({"params": p}, x))(params, batch)
    shapes = {
        tuple(map(int, found.split(",")))
        for found in re.findall(r"\w+\[([\d,]+)\]", str(jaxpr))
    }
    over_encoder = {s for s in shapes if length in s}
    assert (b, 3, k * decoder_length, length) in over_encoder  # attention weights
    assert not [s for s in over_encoder if k in s or b * k in s]


@pytest.mark.parametrize(
    "fields",
    [
        {"remat_policy": "minimal"},
        {"scan_layers": True, "remat_policy": "full", "logits_chunk": 4},
    ],
    ids=["minimal", "scan-full-chunk"],
)
def test_scan_and_remat_change_nothing(
    fields, variant, params, packed, packed_result, value_and_gradient
):
    model = variant(**fields)
    scanned = fields.get("scan_layers", False)
    if scanned:
        params = models.stack_layers(params)
    logps, grads = value_and_gradient(model, params, packed)
    if scanned:
        grads = models.unstack_layers(grads)
    np.testing.assert_allclose(logps, packed_result[0], atol=2e-5)
    chex.assert_trees_all_close(grads, packed_result[1], rtol=1e-4, atol=1e-4)


def test_bfloat16_activations(variant, params, packed, packed_result):
    model = variant(dtype="bfloat16")

    def states_and_logits(params, batch):
        encoded = model.apply(
            {"params": params},
            batch["encoder_input_tokens"],
            batch["encoder_segment_ids"],
            method="encode",
        )
        return encoded, model.apply({"params": params}, batch)

    encoded, logits = jax.eval_shape(states_and_logits, params, packed)
    assert (encoded.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    fresh = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
    assert {x.dtype for x in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    logps = jax.jit(models.response_logps, static_argnums=0)(model, params, packed)
    assert logps.dtype == jnp.float32
    mask = packed["response_mask"] > 0
    tokens = packed["decoder_loss_weights"].sum()
    # bfloat16 has 8 bits: a few hundredths of a nat a token, and not exactly equal.
    gap = np.abs(np.asarray(logps) - packed_result[0])[mask]
    assert 0 < gap.sum() / tokens < 0.05


def test_embedding_head_is_scaled(variant, params):
    tied = variant(logits_via_embedding=True)
    tied_params = {**params, "decoder": dict(params["decoder"])}
    del tied_params["decoder"]["logits_dense"]
    states = np.random.default_rng(0).normal(size=(2, 24)).astype(np.float32)
    logits = tied.apply({"params": tied_params}, states, method="logits")
    embedding = np.asarray(params["token_embedder"]["embedding"], np.float64)
    np.testing.assert_allclose(logits, states @ embedding.T / 24**0.5, rtol=1e-4)


def test_dropout_is_one_mask_per_row_and_keeps_the_mean():
    x = jnp.ones((4, 3, 5, 500))
    y = Dropout(0.25).apply({}, x, False, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(y, jnp.broadcast_to(y[..., :1, :], y.shape))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(float(y.mean()) - 1) < 0.05
    assert not np.array_equal(y[0, 0], y[0, 1])
    np.testing.assert_array_equal(Dropout(0.25).apply({}, x, True), x)


def test_dropout_needs_a_key(variant, params, packed):
    model = variant(dropout_rate=0.5)
    score = jax.jit(
        lambda p, b, key: models.response_logps(
            model, p, b, deterministic=False, dropout_key=key
        )
    )
    # The rbg generator compiles faster than the default one.
    keys = [jax.random.key(i, impl="rbg") for i in (1, 2)]
    first = score(params, packed, keys[0])
    np.testing.assert_array_equal(first, score(params, packed, keys[0]))
    other = score(params, packed, keys[1])
    present = packed["response_mask"] > 0
    assert np.all((np.asarray(first) != np.asarray(other))[present])
    assert np.all(np.isfinite(first))
    with pytest.raises(ValueError, match=r"deterministic=False.*needs dropout_key"):
        models.response_logps(model, params, packed, deterministic=False)


def test_relative_bias_matrix_and_step_agree(config):
    for bidirectional in (True, False):
        bias = RelativePositionBias(config, bidirectional)
        table = np.arange(3 * 8, dtype=np.float32).reshape(3, 8)
        variables = {"params": {"rel_embedding": table}}
        full = bias.apply(variables, 19)
        assert full.shape == (1, 3, 19, 19)
        rows = bias.apply(variables, jnp.arange(19), 19, method="at")  # [q, H, k]
        np.testing.assert_array_equal(full[0], jnp.moveaxis(rows, 1, 0))
        # Keys 3 before and 3 after a query; only an encoder tells "after" apart.
        assert full[0, 0, 10, 7] == (2 if bidirectional else 3)
        assert full[0, 0, 10, 13] == (6 if bidirectional else 0)


def test_buckets_of_powers_are_exact():
    """log2(d / 8) * 2 + 8 for the encoder's 16 buckets, by hand."""
    table = bucket_table(16, 128)
    assert [table[d] for d in (0, 7, 8, 11, 12, 16, 32, 64, 91, 128)] == [
        *(0, 7, 8, 8, 9, 10, 12, 14, 15, 15)
    ]
