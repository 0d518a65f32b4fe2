"""The network in a T5X checkpoint: told from its arrays, placed, partly restored."""

import dataclasses

import jax
import numpy as np
import pytest
import t5x_checkpoints as made
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxalign import models
from jaxalign.interop import t5x, t5x_files, t5x_network
from jaxalign.models import networks

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


def _like(**fields):
    return networks.shapes(models.T5(dataclasses.replace(SHAPE, **fields)))


def _flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def _fields(description):
    known = {field.name for field in dataclasses.fields(type(description.shape))}
    return {name: getattr(description.shape, name) for name in known}


# --- The shape ----------------------------------------------------------------


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


# --- Layouts of layers --------------------------------------------------------


@pytest.mark.parametrize("stored", ["apart", "scanned", "heads apart"])
@pytest.mark.parametrize("wanted", ["apart", "scanned"])
def test_every_layout_is_read_as_every_other(stored, wanted, tmp_path, params):
    lay_out = {"scanned": made.scanned, "heads apart": made.heads_apart}
    written = lay_out.get(stored, dict)(params)
    made.write_legacy(tmp_path / "checkpoint_7", written, chunks=(8, 2, 2))
    like = _like(scan_layers=wanted == "scanned")
    found, report = t5x.restore(t5x.open_checkpoint(tmp_path), like)
    nested = traverse_util.unflatten_dict(params, sep="/")
    expected = models.stack_layers(nested) if wanted == "scanned" else nested
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert report.left_over == report.initialised == ()
    assert {n for names in report.loaded.values() for n in names} == {
        f"target/{name}" for name in written
    }


@pytest.mark.parametrize("scan_layers", [False, True])
def test_umt5_has_a_bias_in_every_layer(scan_layers, tmp_path, params):
    of_layer = {}
    for name, value in params.items():
        if "relpos_bias" not in name:
            of_layer[name] = value
            continue
        stack, rest = name.split("/", 1)
        for i in range(2 + (stack == "decoder")):
            of_layer[f"{stack}/layers_{i}/{rest}"] = value + i
    made.write_legacy(tmp_path / "checkpoint_7", made.scanned(of_layer))
    checkpoint = t5x.open_checkpoint(tmp_path)
    if "relative_bias_per_layer" not in models.T5Config.__dataclass_fields__:
        with pytest.raises(t5x.T5XError, match="a position bias in every layer"):
            t5x.describe(checkpoint)
        return
    found = t5x.describe(checkpoint)
    assert found.shape.relative_bias_per_layer and found.shape.num_heads == 3
    like = _like(relative_bias_per_layer=True, scan_layers=scan_layers)
    restored = t5x.restore(checkpoint, like)[0]
    if scan_layers:
        restored = models.unstack_layers(restored)
    restored = _flat(restored)
    assert set(restored) == set(of_layer)
    for name, value in of_layer.items():
        np.testing.assert_array_equal(restored[name], value, err_msg=name)


# --- Placing ------------------------------------------------------------------


def test_each_device_reads_its_own_part(checkpoint, params, monkeypatch):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "model"))
    like = {
        name: jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=NamedSharding(
                mesh,
                PartitionSpec("model", "data")
                if name.endswith("embedding") and "token" in name
                else PartitionSpec(),
            ),
        )
        for name, leaf in _flat(_like()).items()
    }
    reads = []
    read = t5x.Leaf.read

    def recorded(leaf, index=None):
        block = read(leaf, index)
        reads.append((leaf.names[0], block.shape))
        return block

    monkeypatch.setattr(t5x.Leaf, "read", recorded)
    found, _ = t5x.restore(checkpoint, traverse_util.unflatten_dict(like, sep="/"))
    for name, value in _flat(found).items():
        np.testing.assert_array_equal(value, params[name])
        assert value.sharding == like[name].sharding
    embedding = "target/token_embedder/embedding"
    assert [shape for name, shape in reads if name == embedding] == [(10, 12)] * 8
    assert len(reads) == 8 + len(params) - 1  # copies share one read


def test_dtypes(checkpoint, params):
    found, _ = t5x.restore(checkpoint, _like(), dtype="bfloat16")
    for name, value in _flat(found).items():
        assert value.dtype == "bfloat16"
        wanted = params[name].astype(value.dtype)
        np.testing.assert_array_equal(np.asarray(value), wanted)


def test_parameters_outlive_the_file(tmp_path, params):
    file = made.write_msgpack(tmp_path / "checkpoint", params)
    found, _ = t5x.restore(t5x.open_checkpoint(tmp_path), _like())
    file.write_bytes(b"\xff" * file.stat().st_size)  # the mapped pages change
    for name, value in _flat(found).items():
        np.testing.assert_array_equal(value, params[name])


# --- Parts --------------------------------------------------------------------


def _scalar_like():
    network = models.ScalarModel(dataclasses.replace(SHAPE))
    return networks.shapes(network), network


def test_a_reward_models_trunk_comes_from_a_policy(checkpoint, params):
    like, network = _scalar_like()
    fresh = networks.init_params(network, jax.random.key(0))
    with pytest.raises(t5x.T5XError, match="lacks target/value_head"):
        t5x.restore(checkpoint, like)
    found, report = t5x.restore(checkpoint, like, initial=fresh)
    heads = {name for name in _flat(like) if name not in params}
    assert heads and set(report.initialised) == heads
    assert "target/decoder/logits_dense/kernel" in report.left_over
    for name, value in _flat(found).items():
        source = _flat(fresh) if name in heads else params
        np.testing.assert_array_equal(value, source[name])
    again, _ = t5x.restore(checkpoint, like, initial=lambda path: _flat(fresh)[path])
    jax.tree.map(np.testing.assert_array_equal, again, found)
    assert str(report).splitlines()[0] == f"{len(report.loaded)} parameters loaded"


def test_an_assignment_map_renames_and_leaves_out(checkpoint, params):
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), _like())
    found, report = t5x.restore(
        checkpoint,
        _like(),
        assignment_map=[
            (r"target/decoder/layers_0/(.*)", r"target/decoder/layers_2/\1"),
            (r".*relpos_bias.*", None),
        ],
        initial=zeros,
    )
    found = _flat(found)
    for name, value in params.items():
        source = name.replace("decoder/layers_0/", "decoder/layers_2/")
        wanted = 0 * value if "relpos_bias" in name else params[source]
        np.testing.assert_array_equal(found[name], wanted)
    assert len(report.initialised) == 2
    assert all(
        name.startswith("target/decoder/layers_0/") or "relpos_bias" in name
        for name in report.left_over
    )


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([(r"encoder/.*", "target/x")], r"\['encoder/\.\*'\] match no parameter"),
        ([(r"(", "x")], "is no regular expression"),
        ([(r"target/(.*)/scale", r"target/\2")], "does not fit"),
        ([(r"target/(.*)/scale", r"target/\1/scales")], "lacks target/.*scales and"),
        ([(r"target/encoder/.*norm/scale", None)], "need initial values"),
        (
            [(r"target/(.*)_0/mlp/wo/kernel", r"target/\1_0/mlp/wi_0/kernel")],
            r"wo/kernel must have shape \(32, 24\), but .*wi_0/kernel.* \(24, 32\)",
        ),
    ],
    ids=str,
)
def test_mistakes_in_an_assignment_map(rules, message, checkpoint):
    with pytest.raises(ValueError, match=message):
        t5x.restore(checkpoint, _like(), assignment_map=rules)


def test_initial_values_of_another_shape(checkpoint):
    rules = [("target/token_embedder/embedding", None)]
    with pytest.raises(t5x.T5XError, match=r"must have shape \(40, 24\), got \(2,\)"):
        t5x.restore(
            checkpoint, _like(), assignment_map=rules, initial=lambda _: np.zeros(2)
        )
    with pytest.raises(t5x.T5XError, match="initial has no value for token_embedder"):
        t5x.restore(checkpoint, _like(), assignment_map=rules, initial={})


# --- What the optimizer keeps -------------------------------------------------


def _shapes(**shapes):
    return {
        slot: {"encoder": {"kernel": jax.ShapeDtypeStruct(shape, np.float32)}}
        for slot, shape in shapes.items()
    }


@pytest.mark.parametrize("factored", [True, False])
def test_adafactors_moments_keep_the_axes_they_average(factored, tmp_path):
    sizes = {"v_row": (4,), "v_col": (6,), "v": (1,)}
    like = _shapes(v_row=(4, 1), v_col=(1, 6), v=(1, 1))
    other = _shapes(v_row=(1, 1), v_col=(1, 1), v=(4, 6))
    if not factored:
        sizes, like, other = {"v_row": (1,), "v_col": (1,), "v": (4, 6)}, other, like
    kept = {k: np.random.default_rng(3).random(v, "f4") for k, v in sizes.items()}
    target = {"encoder": {"kernel": np.ones((4, 6), np.float32)}}
    t5x.save(tmp_path, target, param_states={"encoder/kernel": kept})
    checkpoint = t5x.open_checkpoint(tmp_path)
    found = t5x.moments(checkpoint, like)
    for slot, tree in like.items():
        value = found[slot]["encoder"]["kernel"]
        assert value.shape == tree["encoder"]["kernel"].shape
        np.testing.assert_array_equal(value.ravel(), kept[slot].ravel())
    with pytest.raises(t5x.T5XError, match="min_dim_size_to_factor differs"):
        t5x.moments(checkpoint, other)
    none = {"v": {"decoder": {"kernel": np.ones(3)}}}
    with pytest.raises(t5x.T5XError, match="keeps no 'v' of decoder/kernel"):
        t5x.moments(checkpoint, none)
