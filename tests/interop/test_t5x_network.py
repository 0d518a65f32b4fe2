"""The network in a T5X checkpoint, told from its arrays and gin files."""

import dataclasses

import numpy as np
import pytest
import t5x_checkpoints as made

from jaxalign import models
from jaxalign.interop import t5x, t5x_files, t5x_network

SHAPE = models.T5Config(
    vocab_size=40,
    emb_dim=24,
    num_heads=3,
    head_dim=6,
    mlp_dim=32,
    num_encoder_layers=2,
    num_decoder_layers=3,
)
GIN = """
from __gin__ import dynamic_registration
from t5x.examples.t5 import network
include 't5x/examples/t5/t5_1_1/base.gin'
ACTIVATIONS = ('swish', 'linear')
VOCABULARY = @seqio.SentencePieceVocabulary()
seqio.SentencePieceVocabulary.sentencepiece_model_file = 'gs://t5-data/sp.model'
network.T5Config:
  dtype = 'bfloat16'  # of its execution
  head_dim = 6
  mlp_activations = %ACTIVATIONS
  dropout_rate = %DROPOUT_RATE
"""


@pytest.fixture(scope="module")
def params():
    return made.random_params()


@pytest.fixture
def checkpoint(tmp_path, params):
    made.write_legacy(tmp_path / "model" / "checkpoint_7", params)
    return t5x.open_checkpoint(tmp_path / "model")


def _fields(description):
    known = {field.name for field in dataclasses.fields(type(description.shape))}
    return {name: getattr(description.shape, name) for name in known}


def test_the_shape_is_told_from_the_arrays(checkpoint, params):
    found = t5x.describe(checkpoint)
    assert found.kind == "T5" and found.step == 7 and found.left_over == ()
    assert _fields(found) == {name: getattr(SHAPE, name) for name in _fields(found)}
    assert set(found.leaves) == set(params)
    assumed = [name for name, source in found.sources.items() if source != "arrays"]
    assert assumed == ["mlp_activations"]
    assert found.sources["mlp_activations"] == "assumed"
    assert found.vocabulary is None


def test_t5_1_0(tmp_path):
    made.write_msgpack(tmp_path / "checkpoint", made.random_params(t5_1_0=True))
    shape = t5x.describe(t5x.open_checkpoint(tmp_path)).shape
    assert shape.mlp_activations == ("relu",) and shape.logits_via_embedding


def test_a_gin_file_beside_it_says_the_rest(checkpoint, tmp_path):
    (tmp_path / "model" / "config.gin").write_text(GIN)
    found = t5x.describe(checkpoint)
    assert found.shape.mlp_activations == ("silu", "linear")
    assert found.sources["mlp_activations"] == "config.gin"
    assert found.shape.dropout_rate == 0
    assert found.vocabulary == {
        "class": "seqio.SentencePieceVocabulary",
        "sentencepiece_model_file": "gs://t5-data/sp.model",
    }
    # That of the checkpoint itself is nearer, one that is given replaces both, and an
    # argument is over all.
    text = GIN.replace("swish", "relu")
    (checkpoint.found.path / "config.gin").write_text(text)
    assert t5x.describe(checkpoint).shape.mlp_activations[0] == "relu"
    other = tmp_path / "other.gin"
    other.write_text("dense.MlpBlock.activations = ('silu', 'linear')")  # Flaxformer's
    found = t5x.describe(checkpoint, [other])
    assert found.shape.mlp_activations[0] == "silu"
    found = t5x.describe(checkpoint, mlp_activations=("gelu", "linear"))
    assert found.shape.mlp_activations[0] == "gelu"
    assert found.sources["mlp_activations"] == "argument"


def test_included_gin_files_are_read_where_they_lie_beside(checkpoint, tmp_path):
    (tmp_path / "base.gin").write_text("network.T5Config.mlp_activations = ('relu', 1)")
    (tmp_path / "small.gin").write_text(
        "include 't5x/examples/base.gin'\nnetwork.T5Config.mlp_activations = %A\n"
        "A = ('silu', 'linear')\nVOCABULARY = @seqio.ByteVocabulary()"
    )
    found = t5x.describe(checkpoint, [tmp_path / "small.gin"])
    assert found.shape.mlp_activations == ("silu", "linear")
    assert found.vocabulary == {"class": "seqio.ByteVocabulary"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 2}, "num_heads is 2 by argument, but the arrays .* say 3"),
        ({"mlp_activations": ("relu",)}, "is gated: it takes 2"),
        ({"mlp_activations": ("gelu", "linearr")}, "Did you mean 'linear'"),
        ({"num_head": 3}, "'num_head' is no field.*Did you mean 'num_heads'"),
        ({"logits_via_embedding": True}, "logits_via_embedding is True by argument"),
    ],
    ids=str,
)
def test_what_contradicts_the_arrays_is_refused(fields, message, checkpoint):
    with pytest.raises(ValueError, match=message):
        t5x.describe(checkpoint, **fields)


def test_a_gin_file_that_is_not_this_checkpoints(checkpoint, tmp_path):
    file = tmp_path / "model" / "config.gin"
    file.write_text("network.T5Config.emb_dim = 512")
    with pytest.raises(ValueError, match="emb_dim is 512 by config.gin.* say 24"):
        t5x.describe(checkpoint)
    file.write_text("network.T5Config:\n  emb_dim = = 3")
    with pytest.raises(ValueError, match="config.gin is not a gin file"):
        t5x.describe(checkpoint)
    with pytest.raises(FileNotFoundError):
        t5x.describe(checkpoint, [tmp_path / "none.gin"])


def _without(tmp_path, params, *names):
    kept = {k: v for k, v in params.items() if not any(n in k for n in names)}
    made.write_msgpack(tmp_path / "checkpoint", kept)
    return t5x.open_checkpoint(tmp_path)


def test_heads_that_no_array_tells_are_demanded(tmp_path, params):
    found = _without(tmp_path, params, "relpos_bias")
    with pytest.raises(ValueError, match="num_heads cannot be told.*18 wide"):
        t5x.describe(found)
    with pytest.raises(ValueError, match="18 wide, which it does not divide"):
        t5x.describe(found, num_heads=4)
    with pytest.raises(t5x.T5XError, match="lacks target/.*relpos_bias.* and 1 more"):
        t5x.describe(found, num_heads=3)


def test_ul2_is_not_taken_for_a_t5_1_1():
    sizes = {"emb_dim": 4096, "mlp_dim": 16384, "num_encoder_layers": 32}
    empty = t5x_files.Checkpoint(t5x.Found("legacy", None, None), t5x_files.Leaves({}))
    with pytest.raises(ValueError, match=r"UL2.*mlp_activations=\('silu', 'linear'\)"):
        t5x_network._activations(empty, sizes, {})


def test_missing_arrays_and_wrong_shapes_are_named(tmp_path, params):
    name = "decoder/layers_1/encoder_decoder_attention/key/kernel"
    for gone, message in {
        name: f"lacks target/{name}; the nearest name it has is target/decoder/layers",
        "decoder/": "has no decoder: expected its layers as target/decoder/layers_0/",
        "token_embedder": "lacks target/token_embedder/embedding",
    }.items():
        with pytest.raises(t5x.T5XError, match=message):
            t5x.describe(_without(tmp_path, params, gone))
    wrong = {**params, name: params[name][:, :-1]}
    with pytest.raises(
        t5x.T5XError, match=rf"{name} must have.*\(24, 18\).*\(24, 17\)"
    ):
        t5x.describe(_without(tmp_path, wrong))


def test_an_embedding_of_another_rank_is_named(tmp_path, params):
    wrong = {**params, "token_embedder/embedding": np.ones(3, np.float32)}
    with pytest.raises(t5x.T5XError, match=r"embedding must have 2 axes.* \(3,\)"):
        t5x.describe(_without(tmp_path, wrong))


def test_heads_are_told_from_kernels_that_keep_them_apart(tmp_path, params):
    for lay_out in (made.scanned, made.heads_apart):
        found = _without(tmp_path, lay_out(params), "relpos_bias")
        with pytest.raises(t5x.T5XError, match="lacks target/.*relpos_bias"):
            t5x.describe(found)  # it got so far


def test_more_arrays_than_the_network_has(tmp_path, params):
    more = {**params, "decoder/adapter/kernel": np.zeros((2, 2), np.float32)}
    found = t5x.describe(_without(tmp_path, more))
    assert found.left_over == ("target/decoder/adapter/kernel",)
