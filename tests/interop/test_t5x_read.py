"""T5X checkpoints as arrays: formats, variants of them, what is wrong with a file."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import t5x_checkpoints as made
from flax import serialization, traverse_util

from jaxalign.interop import leaves, t5x, t5x_formats, t5x_msgpack

FORMATS = {
    "legacy": lambda path, params: made.write_legacy(path, params),
    "msgpack": lambda path, params: made.write_msgpack(path / "checkpoint", params),
    "orbax": lambda path, params: made.write_orbax(path, params),
}


@pytest.fixture(scope="module")
def params():
    return made.random_params()


def _target(checkpoint):
    return {
        name.removeprefix("target/"): checkpoint.leaves[name].read()
        for name in checkpoint.leaves
        if name.startswith("target/")
    }


def _assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_bits(kind, tmp_path, params):
    path = tmp_path / "model" / "checkpoint_7"
    FORMATS[kind](path, params)
    for given in (path, path.parent):  # itself, and the model directory
        found = t5x.detect(given)
        assert (found.format, found.path) == (kind, path)
    checkpoint = t5x.open_checkpoint(path)
    _assert_same(_target(checkpoint), params)
    assert checkpoint.step == 7
    states = checkpoint.param_states()
    assert set(states) == set(params)
    slots = states["decoder/layers_2/mlp/wo/kernel"]
    assert set(slots) == {"m", "v", "v_row", "v_col"}
    wanted = params["decoder/layers_2/mlp/wo/kernel"] ** 2
    np.testing.assert_array_equal(slots["v"].read(), wanted)


def test_the_newest_checkpoint_of_a_model_directory(tmp_path, params):
    made.write_legacy(tmp_path / "checkpoint_9", params, step=9)
    made.write_orbax(tmp_path / "checkpoint_10", params, step=10)
    (tmp_path / "checkpoint_11.tmp-1700000000").mkdir()  # T5X was killed there
    (tmp_path / "checkpoint_12").mkdir()
    assert t5x.detect(tmp_path).path.name == "checkpoint_10"
    assert t5x.open_checkpoint(tmp_path / "checkpoint_9").step == 9
    file = made.write_msgpack(tmp_path / "old" / "checkpoint_3", params, step=3)
    assert t5x.detect(file.parent).path == file  # one file for each step


@pytest.mark.parametrize(
    "options",
    [
        {"driver": "gcs"},
        {"driver": "gfile"},
        {"driver": "gcs", "old": True},
        {"chunks": (7, 5)},
        {"version": 2},
    ],
    ids=str,
)
def test_legacy_checkpoints_as_they_were_written_over_the_years(
    options, tmp_path, params
):
    made.write_legacy(tmp_path / "checkpoint_7", params, **options)
    _assert_same(_target(t5x.open_checkpoint(tmp_path)), params)


def test_bfloat16_and_what_version_2_made_of_it(tmp_path):
    params = made.random_params(dtype=ml_dtypes.bfloat16)
    made.write_legacy(tmp_path / "three", params)
    _assert_same(_target(t5x.open_checkpoint(tmp_path / "three")), params)
    bits = {name: value.view(np.uint16) for name, value in params.items()}
    made.write_legacy(tmp_path / "two", bits, version=2)
    _assert_same(_target(t5x.open_checkpoint(tmp_path / "two")), params)
    made.write_legacy(tmp_path / "none", bits)  # version 3 means what it says
    with pytest.raises(t5x.T5XError, match="must be of floats.*uint16"):
        t5x.describe(t5x.open_checkpoint(tmp_path / "none"))


def test_a_compressed_msgpack_file(tmp_path, params):
    file = made.write_msgpack(tmp_path / "checkpoint", params, compress=True)
    _assert_same(_target(t5x.open_checkpoint(tmp_path)), params)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="checkpoint is damaged"):
        t5x.open_checkpoint(tmp_path)


def test_orbax_without_ocdbt(tmp_path, params):
    made.write_orbax(tmp_path / "checkpoint_7", params, use_ocdbt=False)
    assert not (tmp_path / "checkpoint_7" / "state" / "manifest.ocdbt").exists()
    _assert_same(_target(t5x.open_checkpoint(tmp_path)), params)


def test_orbax_before_it_described_its_trees(tmp_path, params):
    """As T5X's own test data has it: names in place of arrays, another prefix."""
    tree = {}
    for name, value in params.items():
        stored = "_optimizer.target." + name.replace("/", ".")
        made.write_zarr(tmp_path / stored, value)
        tree[f"_optimizer/target/{name}"] = f"PLACEHOLDER://{stored}"
    tree |= {"_optimizer/state/step": np.int32(4), "params_axes": None}
    nested = traverse_util.unflatten_dict(tree, sep="/")
    (tmp_path / "checkpoint").write_bytes(serialization.msgpack_serialize(nested))
    checkpoint = t5x.open_checkpoint(tmp_path)
    assert checkpoint.found.format == "legacy" and checkpoint.step == 4
    _assert_same(_target(checkpoint), params)


def test_what_the_optimizer_keeps_need_not_be_there(tmp_path, params):
    path = made.write_legacy(tmp_path / "checkpoint_7", params)
    flat = traverse_util.flatten_dict(
        serialization.msgpack_restore((path / "checkpoint").read_bytes()), sep="/"
    )
    prefix = "optimizer/state/param_states/"
    for name in [name for name in flat if name.startswith(prefix)]:
        stored = name.removeprefix("optimizer/").replace("/", ".")
        made.write_zarr(path / stored, flat[name])
        kvstore = {"driver": "file", "path": stored}
        flat[name] = {"driver": "zarr", "kvstore": kvstore, "metadata": {}}
    nested = traverse_util.unflatten_dict(flat, sep="/")
    (path / "checkpoint").write_bytes(serialization.msgpack_serialize(nested))
    assert len(t5x.open_checkpoint(path).param_states()) == len(params)
    for folder in path.iterdir():
        if not t5x_formats.of_parameters(f"{folder.name}/.zarray"):
            shutil.rmtree(folder)
    checkpoint = t5x.open_checkpoint(path)
    assert set(t5x.describe(checkpoint).leaves) == set(params)
    with pytest.raises(t5x.T5XError, match="lacks the array 'state/param_states"):
        checkpoint.param_states()


def test_arrays_that_flax_writes_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("flax.serialization.MAX_CHUNK_SIZE", 96)
    params = made.random_params()
    made.write_msgpack(tmp_path / "checkpoint", params)
    _assert_same(_target(t5x.open_checkpoint(tmp_path)), params)
    leaf = t5x.open_checkpoint(tmp_path).leaves["target/token_embedder/embedding"]
    part = (slice(3, 11), slice(2, None))
    np.testing.assert_array_equal(
        leaf.read(part), params["token_embedder/embedding"][part]
    )
    assert leaf.read((slice(4, 4), slice(None))).shape == (0, 24)


def test_an_inline_array_stays_in_its_file_until_it_is_read(tmp_path, params):
    file = made.write_msgpack(tmp_path / "checkpoint", params)
    tree = t5x_msgpack.load(file)
    array = tree["optimizer"]["target"]["token_embedder"]["embedding"]
    assert not array.flags.owndata and not array.flags.writeable
    found = t5x.open_checkpoint(file).leaves["target/token_embedder/embedding"].read()
    assert found.flags.owndata  # what is read outlives the file
    file.unlink()


# --- Blocks of views ----------------------------------------------------------


def test_blocks_of_views_are_blocks_of_the_whole():
    rng = np.random.default_rng(0)
    whole = rng.normal(size=(4, 3, 5, 6))
    leaf = leaves.of_array(whole, "x")
    views = [
        (leaves.joined(leaf, 2), whole.reshape(4, 3, 30)),
        (leaves.joined(leaf, 0), whole.reshape(12, 5, 6)),
        (leaves.transposed(leaf, (2, 0, 3, 1)), whole.transpose(2, 0, 3, 1)),
        (leaves.layer(leaf, 2, 1), whole[:, 2]),
        (leaves.stacked([leaf, leaf], 1), np.stack([whole, whole], 1)),
    ]
    order = leaves.transposed(leaf, (0, 2, 1, 3))
    joined = whole.transpose(0, 2, 1, 3).reshape(20, 3, 6)
    views.append((leaves.joined(order, 0), joined))
    apart = leaves.split(leaves.of_array(joined, "x"), 0, 4)
    views.append((apart, joined.reshape(4, 5, 3, 6)))
    last = leaves.of_array(whole.reshape(4, 3, 30), "x")
    views.append((leaves.split(last, 2, 5), whole))
    for view, wanted in views:
        assert view.shape == wanted.shape and view.names[0] == "x"
        np.testing.assert_array_equal(np.asarray(view), wanted)
        for _ in range(20):
            cuts = [sorted(rng.integers(0, size + 1, 2)) for size in wanted.shape]
            index = tuple(slice(int(a), int(b)) for a, b in cuts)
            np.testing.assert_array_equal(view.read(index), wanted[index])


# --- What is wrong with a path or a file --------------------------------------


def test_paths_with_no_checkpoint_say_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such path"):
        t5x.open_checkpoint(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="it holds nothing"):
        t5x.open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "checkpoint").write_text("all of it")
    assert t5x.detect(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="it holds checkpoint, config.json"):
        t5x.open_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="it is another file"):
        t5x.open_checkpoint(tmp_path / "config.json")


def test_other_peoples_orbax_checkpoints_are_none_of_t5x(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "policy", {"encoder": np.ones(3)})
    assert t5x.detect(tmp_path / "policy") is None
    assert t5x.detect(tmp_path) is None


def test_mesh_tensorflow_is_named(tmp_path):
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-0"\n')
    assert t5x.detect(tmp_path).format == "mesh-tensorflow"
    with pytest.raises(t5x.T5XError, match="Mesh TensorFlow.*convert_tf_checkpoint"):
        t5x.open_checkpoint(tmp_path)


@pytest.mark.parametrize("version", [1, 4])
def test_versions_that_nobody_here_has_seen(version, tmp_path, params):
    made.write_msgpack(tmp_path / "checkpoint", params, version=version)
    with pytest.raises(t5x.T5XError, match=rf"version {version}; known are \[2, 3\]"):
        t5x.open_checkpoint(tmp_path)


def test_every_cut_of_a_msgpack_file_is_noticed(tmp_path):
    file = made.write_msgpack(tmp_path / "checkpoint", made.random_params())
    data = file.read_bytes()
    for size in [*range(64, 600, 7), len(data) // 2, len(data) - 1]:
        file.write_bytes(data[:size])
        with pytest.raises(ValueError, match="is cut short"):
            t5x.open_checkpoint(tmp_path)
    file.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="1 bytes follow"):
        t5x.open_checkpoint(tmp_path)


def _legacy(tmp_path, params):
    path = made.write_legacy(tmp_path / "checkpoint_7", params, chunks=(16, 16))
    return path, path / "target.token_embedder.embedding"


def test_lost_and_cut_chunks_are_errors_not_zeros(tmp_path, params):
    path, array = _legacy(tmp_path, params)
    name, chunk = "target/token_embedder/embedding", array / "1.0"
    data = chunk.read_bytes()
    chunk.write_bytes(data[: len(data) // 2])
    with pytest.raises(t5x.T5XError, match=f"{name}' cannot be read"):
        t5x.open_checkpoint(path).leaves[name].read()
    chunk.unlink()
    with pytest.raises(t5x.T5XError, match=f"{name}' cannot be read.*missing"):
        t5x.open_checkpoint(path).leaves[name].read()
    # Other rows are there.
    found = t5x.open_checkpoint(path).leaves[name].read((slice(0, 16), slice(None)))
    np.testing.assert_array_equal(found, params["token_embedder/embedding"][:16])
    shutil.rmtree(array)
    with pytest.raises(t5x.T5XError, match=f"lacks the array '{name}'"):
        t5x.describe(t5x.open_checkpoint(path))


def test_a_lost_chunk_of_orbax_is_an_error(tmp_path, params):
    made.write_orbax(tmp_path / "checkpoint_7", params, use_ocdbt=False)
    stored = tmp_path / "checkpoint_7/state/target.token_embedder.embedding"
    (stored / "0.0").unlink()
    with pytest.raises(t5x.T5XError, match="embedding' cannot be read.*missing"):
        _target(t5x.open_checkpoint(tmp_path))
    shutil.rmtree(stored)
    with pytest.raises(t5x.T5XError, match="embedding' cannot be read"):
        _target(t5x.open_checkpoint(tmp_path))
    (stored.parent / "_METADATA").write_text('{"tree_metadata": {"(\'target\'')
    with pytest.raises(t5x.T5XError, match="_METADATA is not readable"):
        t5x.open_checkpoint(tmp_path)


def test_arrays_of_two_checkpoints(tmp_path, params):
    path, array = _legacy(tmp_path, params)
    metadata = json.loads((array / ".zarray").read_text())
    metadata["shape"] = [41, 24]
    (array / ".zarray").write_text(json.dumps(metadata))
    with pytest.raises(t5x.T5XError, match=r"shape \(40, 24\).*has \(41, 24\)"):
        t5x.describe(t5x.open_checkpoint(path))


def test_a_stored_path_leads_nowhere_else(tmp_path, params):
    outside = tmp_path / "outside"
    made.write_zarr(outside, np.zeros((40, 24), np.float32))
    path = made.write_legacy(tmp_path / "checkpoint_7", params)
    file = path / "checkpoint"
    for wrong in (b"../outside", b"/etc/passwd"):
        padded = wrong + b"/" * (len(b"target.token_embedder.embedding/") - len(wrong))
        data = file.read_bytes().replace(b"target.token_embedder.embedding/", padded)
        (tmp_path / "evil").mkdir(exist_ok=True)
        (tmp_path / "evil" / "checkpoint").write_bytes(data)
        with pytest.raises(ValueError, match="Expected the name of a file below"):
            t5x.describe(t5x.open_checkpoint(tmp_path / "evil"))


def test_a_tree_without_parameters(tmp_path):
    file = tmp_path / "checkpoint"
    file.write_bytes(b"\x81\xa7version\x03")
    with pytest.raises(t5x.T5XError, match="must hold a tree with 'target'"):
        t5x.open_checkpoint(tmp_path)
