"""What a configuration refuses, and how it says so."""

import dataclasses

import numpy as np
import pytest

from jaxalign.models import T5Config
from jaxalign.models.layers import bucket_table

SHAPE = dict(
    vocab_size=40,
    emb_dim=24,
    num_heads=3,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=2,
    num_decoder_layers=2,
)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "float16"}, r"float16.*refused.*feed-forward.*65504.*bfloat16"),
        ({"dtype": "bfloat61"}, r"dtype must be one of.*Did you mean 'bfloat16'"),
        ({"remat_policy": "ful"}, r"remat_policy must be.*Did you mean 'full'"),
        ({"mlp_activations": ("gellu",)}, r"mlp_activations.*Did you mean 'gelu'"),
        ({"mlp_activations": "gelu"}, r"sequence of names.*string 'gelu'"),
        ({"mlp_activations": ()}, r"must name an activation"),
        ({"num_heads": 0}, r"num_heads must be a positive integer, got 0"),
        ({"emb_dim": 24.0}, r"emb_dim must be a positive integer, got 24\.0"),
        ({"dropout_rate": 1.0}, r"dropout_rate must be in \[0, 1\), got 1\.0"),
        ({"relative_attention_num_buckets": 3}, r"num_buckets must be at least 4.*3"),
        (
            {
                "relative_attention_num_buckets": 32,
                "relative_attention_max_distance": 16,
            },
            r"max_distance must exceed half of the 32 buckets.*at least 17, got 16",
        ),
        ({"logits_chunk": -1}, r"logits_chunk must be 0 .*got -1"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        T5Config(**SHAPE | fields)


@pytest.mark.parametrize("buckets", [4, 5, 8, 31, 32])
def test_every_distance_has_a_bucket_in_the_tightest_table(buckets):
    config = T5Config(
        **SHAPE,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=buckets // 2 + 1,
    )
    for count in (buckets, buckets // 2):  # of a decoder, of an encoder's direction
        table = bucket_table(count, config.relative_attention_max_distance)
        assert table[0] == 0 and table[-1] == count - 1
        assert np.all(np.diff(table) >= 0)


def test_is_hashable_with_a_list():
    config = T5Config(**SHAPE, mlp_activations=["relu"])
    assert hash(config) == hash(T5Config(**SHAPE, mlp_activations=("relu",)))


def test_identity_is_shape_and_never_execution():
    config = T5Config(**SHAPE, dtype="bfloat16", attention="pallas", logits_chunk=8)
    assert not set(config.architecture()) & set(config.execution())
    fields = dataclasses.asdict(config)
    del fields["relative_bias_per_layer"]  # told where it is true
    assert {**config.architecture(), **config.execution()} == {
        **fields,
        "mlp_activations": list(config.mlp_activations),
    }
    other = T5Config(**SHAPE, scan_layers=True, remat_policy="full")
    assert other.architecture() == config.architecture()


def test_a_stored_network_runs_here_with_its_numbers_and_layout():
    trained = T5Config(
        **SHAPE,
        dtype="bfloat16",
        attention="pallas",
        scan_layers=True,
        remat_policy="full",
    )
    new = T5Config.stored(trained.architecture(), trained.execution())
    old = T5Config.stored({**trained.architecture(), **trained.execution()}, {})
    assert (
        new
        == old
        == dataclasses.replace(trained, attention="chunked", remat_policy="none")
    )
    assert T5Config.stored(trained.architecture(), {}) == T5Config(**SHAPE)
