"""T5X checkpoints written: read back by hand, whole or not there at all."""

import dataclasses
import os

import jax
import numpy as np
import pytest
import t5x_checkpoints as made
from flax import traverse_util

from jaxalign import models
from jaxalign.interop import arrays, leaves, t5x, t5x_layouts, t5x_slots

SHAPE = models.T5Config(
    vocab_size=40,
    emb_dim=24,
    num_heads=3,
    head_dim=6,
    mlp_dim=32,
    num_encoder_layers=2,
    num_decoder_layers=3,
    mlp_activations=("silu", "linear"),
)


@pytest.fixture(scope="module")
def params():
    return made.random_params()


def _nested(flat):
    return traverse_util.unflatten_dict(flat, sep="/")


def _target(flat):
    return {
        name.removeprefix("target/"): value
        for name, value in flat.items()
        if name.startswith("target/")
    }


def _assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def _kinds(params):
    scanned = models.stack_layers(_nested(params))
    return {
        "numpy": params,
        "nested": _nested(params),
        "scanned": scanned,
        "on a device": jax.device_put(scanned),
        "leaves": {k: leaves.of_array(v, k) for k, v in params.items()},
        "stacked leaves": {
            k: leaves.of_array(v, k)
            for k, v in traverse_util.flatten_dict(scanned, sep="/").items()
        },
    }


@pytest.mark.parametrize("kind", _kinds({}))
@pytest.mark.parametrize("chunk", [1 << 26, 1000])
def test_what_is_written_is_read_by_hand(kind, chunk, tmp_path, params, monkeypatch):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", chunk)
    folder = t5x.save(tmp_path / "model", _kinds(params)[kind], step=12)
    assert folder == tmp_path / "model" / "checkpoint_12"
    assert os.listdir(tmp_path / "model") == ["checkpoint_12"]
    flat, version = made.read_legacy(folder)
    assert version == 3
    assert flat["state/step"] == 12 and flat["state/step"].dtype == np.int32
    _assert_same(_target(flat), params)
    states = {name for name in flat if name.startswith("state/param_states/")}
    assert states == {
        f"state/param_states/{name}/{slot}"
        for name in params
        for slot in ("m", "v", "v_row", "v_col")
    }
    assert not any(np.any(flat[name]) for name in states)


def test_chunks_divide_the_shape():
    for shape in [(40, 24), (7, 13), (32128, 512), (1,), (3, 5, 1024)]:
        for elements in (1, 10, 1000, 1 << 24):
            chunks = arrays._chunks(shape, elements)
            assert np.prod(chunks) <= max(elements, 1)
            assert all(s % c == 0 for s, c in zip(shape, chunks, strict=True))
    assert arrays._chunks((40, 24), 960) == (40, 24)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trips_keep_every_bit(dtype, tmp_path, params):
    stored = {k: np.asarray(v, jax.numpy.dtype(dtype)) for k, v in params.items()}
    t5x.save(tmp_path / "a", stored, step=3, dtype=dtype, shape=SHAPE)
    once = t5x.open_checkpoint(tmp_path / "a")
    found = t5x.describe(once)
    assert found.shape.mlp_activations == ("silu", "linear")
    assert found.sources["mlp_activations"] == "config.gin" and found.step == 3
    # From checkpoint to checkpoint, what the optimizer keeps too.
    states = once.param_states()
    t5x.save(tmp_path / "b", found.leaves, step=3, dtype=dtype, param_states=states)
    twice = t5x.open_checkpoint(tmp_path / "b")
    assert set(once.leaves) == set(twice.leaves)
    for name in once.leaves:
        first, second = once.leaves[name].read(), twice.leaves[name].read()
        assert first.dtype == second.dtype and first.tobytes() == second.tobytes()
    _assert_same({k: leaf.read() for k, leaf in found.leaves.items()}, stored)


def test_a_network_restores_what_it_wrote(tmp_path, params):
    scanned = models.T5(dataclasses.replace(SHAPE, scan_layers=True))
    t5x.save(tmp_path, models.stack_layers(_nested(params)))
    like = models.networks.shapes(scanned)
    found, _ = t5x.restore(t5x.open_checkpoint(tmp_path), like)
    found = traverse_util.flatten_dict(models.unstack_layers(found), sep="/")
    _assert_same(found, params)


def test_a_bias_in_every_layer_is_written_as_scalable_t5_has_it(tmp_path, params):
    of_layer = {k: v for k, v in params.items() if "relpos_bias" not in k}
    rng = np.random.default_rng(1)
    for stack, depth in (("encoder", 2), ("decoder", 3)):
        for i in range(depth):
            name = f"{stack}/layers_{i}/relpos_bias/rel_embedding"
            of_layer[name] = rng.normal(size=(3, 32)).astype(np.float32)
    wanted = made.scanned(of_layer)
    assert wanted["encoder/encoder/relpos_bias/rel_embedding"].shape == (3, 2, 32)
    assert wanted["decoder/decoder/self_attention/out/kernel"].shape == (3, 3, 6, 24)
    for given in (_nested(of_layer), models.stack_layers(_nested(of_layer))):
        step = len(list(tmp_path.iterdir()))
        flat, _ = made.read_legacy(t5x.save(tmp_path, given, step=step))
        _assert_same(_target(flat), wanted)


def test_optimizer_slots_begin_as_adafactors_do():
    # What T5X's own Adafactor, by its standard rules, gave for these parameters.
    one = (1,)
    for name, shape, wanted in [
        ("encoder/layers_0/mlp/wo/kernel", (256, 128), (one, (256,), (128,))),
        ("encoder/layers_0/mlp/wi/kernel", (128, 127), ((128, 127), one, one)),
        ("encoder/encoder_norm/scale", (512,), ((512,), one, one)),
        ("encoder/encoder/mlp/wo/kernel", (32, 2, 24), (one, (32, 2), (2, 24))),
        ("encoder/encoder/mlp/wi_0/kernel", (24, 2, 32), (one, (2, 32), (24, 2))),
        (
            "decoder/decoder/self_attention/query/kernel",
            (24, 3, 3, 6),
            (one, (3, 3, 6), (24, 3)),
        ),
        (
            "decoder/decoder/self_attention/out/kernel",
            (3, 3, 6, 24),
            (one, (3, 3, 6), (3, 24)),
        ),
        ("encoder/encoder/pre_mlp_layer_norm/scale", (24, 2), ((24, 2), one, one)),
    ]:
        slots = t5x_slots.fresh(name, shape)
        found = tuple(slots[slot].shape for slot in ("v", "v_col", "v_row"))
        assert found == wanted and slots["m"].shape == one, name


# --- What cannot be written ---------------------------------------------------


def test_what_is_interrupted_leaves_nothing(tmp_path, params):
    seen = []

    def block(index):
        seen.extend(os.listdir(tmp_path))
        raise KeyboardInterrupt

    broken = leaves.Leaf((24,), np.dtype(np.float32), block)
    with pytest.raises(KeyboardInterrupt):
        t5x.save(tmp_path, {**params, "encoder/encoder_norm/scale": broken}, step=5)
    (name,) = seen  # some parameters were there, under another name
    assert name.startswith("checkpoint_5.tmp-")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_nothing_that_looks_whole(tmp_path, params):
    folder = t5x.save(tmp_path, params, step=5)
    os.rename(folder, tmp_path / "checkpoint_5.tmp-1700000000")
    assert t5x.detect(tmp_path) is None
    os.remove(tmp_path / "checkpoint_5.tmp-1700000000" / "checkpoint")
    assert t5x.detect(tmp_path / "checkpoint_5.tmp-1700000000") is None


def test_destinations_that_cannot_be(tmp_path, params):
    t5x.save(tmp_path, params, step=5)
    with pytest.raises(FileExistsError, match="checkpoint_5 exists; give another"):
        t5x.save(tmp_path, params, step=5)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        t5x.save(tmp_path / "file", params)
    with pytest.raises(ValueError, match="needs a local path, got gs://"):
        t5x.save("gs://bucket/model", params)
    with pytest.raises(ValueError, match=r"dtype must be one of .* got 'float16'"):
        t5x.save(tmp_path, params, dtype="float16")
    with pytest.raises(ValueError, match="at least one parameter"):
        t5x.save(tmp_path, {})
    with pytest.raises(ValueError, match="Expected the name of a file below"):
        t5x.save(tmp_path / "x", {"a\0b": np.ones(3)})
    assert not (tmp_path / "x").exists() or not list((tmp_path / "x").iterdir())


def test_a_disk_that_refuses_is_an_os_error(tmp_path, params, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: No space left [tensorstore_spec='...']")

    monkeypatch.setattr(arrays.ts, "open", refuse)
    with pytest.raises(OSError, match="cannot be written: RESOURCE_EXHAUSTED.*left$"):
        t5x.save(tmp_path, params)
    assert list(tmp_path.iterdir()) == []


def test_names_are_found_in_both_layouts():
    leaf = leaves.of_array(np.zeros((4, 2)))
    stored = {"target/encoder/encoder/mlp/wo/kernel": leaf}
    assert t5x_layouts.find(stored, "target/encoder/layers_1/mlp/wo/kernel")
    assert not t5x_layouts.find(stored, "target/encoder/layers_2/mlp/wo/kernel")
    assert not t5x_layouts.find(stored, "target/decoder/decoder/mlp/wo/kernel")
