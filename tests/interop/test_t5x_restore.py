"""Parameters of a T5X checkpoint in every layout, placed, and restored in part."""

import dataclasses

import jax
import numpy as np
import pytest
import t5x_checkpoints as made
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxalign import models
from jaxalign.interop import leaves, placing, t5x
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


@pytest.mark.parametrize("at_once", [0, 1 << 30])
def test_each_device_gets_its_own_part(at_once, checkpoint, params, monkeypatch):
    monkeypatch.setattr(placing, "_AT_ONCE", at_once)
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
    read = leaves.Leaf.read

    def recorded(leaf, index=None):
        block = read(leaf, index)
        if leaf.block.__module__ != leaves.__name__:  # of a file, not of memory
            reads.append((leaf.names[0], block.shape))
        return block

    monkeypatch.setattr(leaves.Leaf, "read", recorded)
    found, _ = t5x.restore(checkpoint, traverse_util.unflatten_dict(like, sep="/"))
    for name, value in _flat(found).items():
        np.testing.assert_array_equal(value, params[name])
        assert value.sharding == like[name].sharding
    embedding = "target/token_embedder/embedding"
    parts = [(40, 24)] if at_once else [(10, 12)] * 8
    assert [shape for name, shape in reads if name == embedding] == parts
    assert len(reads) == len(parts) + len(params) - 1  # copies share one read


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
