"""Gradients of Hugging Face's PyTorch T5, and folders that are refused."""

import dataclasses
import errno
import json
import os
import pickle
import shutil

import chex
import foreign_folders
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign import models
from jaxalign.interop import folders, huggingface, tensor_files
from jaxalign.interop import huggingface_config as configs
from jaxalign.models.layers import bucket_table

LENGTHS, DECODER_LENGTHS = (23, 9, 3), (7, 5, 1)


def _torch_model(feed_forward_proj, tied):
    config = transformers.T5Config(
        vocab_size=50,
        d_model=20,
        d_kv=6,
        d_ff=28,
        num_layers=1,
        num_decoder_layers=2,
        num_heads=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj=feed_forward_proj,
        tie_word_embeddings=tied,
        dropout_rate=0.0,
        attn_implementation="eager",
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    if not tied:
        # transformers 5 ties at construction and unties by what a checkpoint holds.
        model.lm_head.weight = torch.nn.Parameter(torch.empty(50, 20))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim == 2 else 100
            parameter.normal_(0, fan_in**-0.5, generator=generator)
            if parameter.ndim == 1:
                parameter += 1
    return model


def _batch():
    """Three prompts of different lengths, right-padded, one response each."""
    rng = np.random.default_rng(0)
    encoder = np.arange(23) < np.array(LENGTHS)[:, None]
    decoder = (np.arange(7) < np.array(DECODER_LENGTHS)[:, None])[:, None]
    targets = rng.integers(1, 50, decoder.shape) * decoder
    inputs = np.concatenate([np.zeros((3, 1, 1), int), targets[..., :-1]], axis=-1)
    return {
        "encoder_input_tokens": (rng.integers(1, 50, (3, 23)) * encoder).astype("i4"),
        "encoder_segment_ids": encoder.astype("i4"),
        "decoder_input_tokens": inputs.astype("i4"),
        "decoder_target_tokens": targets.astype("i4"),
        "decoder_loss_weights": decoder.astype("f4"),
        "decoder_segment_ids": decoder.astype("i4"),
        "response_prompt": np.zeros((3, 1), "i4"),
        "response_mask": np.ones((3, 1), "f4"),
    }


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("proj", ["relu", "gated-gelu"])
def test_logits_logps_and_gradients_equal_pytorch(proj, tied, tmp_path):
    theirs = _torch_model(proj, tied)
    theirs.save_pretrained(tmp_path)
    foreign = huggingface.open_folder(tmp_path)
    assert foreign.shape.logits_via_embedding == tied
    assert len(foreign.shape.mlp_activations) == (1 if proj == "relu" else 2)
    model, params = foreign.model(), huggingface.read(tmp_path)
    batch = _batch()

    where = batch["decoder_segment_ids"][:, 0] > 0
    long = {k: torch.from_numpy(v.astype("i8")) for k, v in batch.items()}
    want = theirs(
        input_ids=long["encoder_input_tokens"],
        attention_mask=long["encoder_segment_ids"],
        decoder_input_ids=long["decoder_input_tokens"][:, 0],
    ).logits
    logps = want.log_softmax(-1).gather(
        -1, long["decoder_target_tokens"][:, 0, :, None]
    )
    logps = logps[..., 0] * torch.from_numpy(where)
    logps.sum().backward()

    def loss(params, batch):
        logps = models.response_logps(model, params, batch)
        return logps.sum(), (logps, model.apply({"params": params}, batch))

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, (got_logps, got)), grads = step(params, batch)
    want = want.detach().numpy()
    np.testing.assert_allclose(np.asarray(got)[:, 0][where], want[where], atol=1e-4)
    np.testing.assert_allclose(
        got_logps[:, 0], logps.sum(1).detach().numpy(), atol=1e-4
    )
    expected = {k: v.grad.numpy() for k, v in theirs.named_parameters()}
    for path, leaf in folders.unstack(grads).items():
        name, transposed = foreign.names[path]
        want = expected[name].T if transposed else expected[name]
        np.testing.assert_allclose(
            leaf.read(), want, rtol=1e-4, atol=2e-4, err_msg=path
        )


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_equal_pytorch(bidirectional):
    distance = np.arange(-700, 701)
    want = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket(
        torch.from_numpy(distance), bidirectional=bidirectional
    ).numpy()
    table = bucket_table(16 if bidirectional else 32, 128)
    if bidirectional:
        got = table[np.minimum(np.abs(distance), 128)] + 16 * (distance > 0)
    else:
        got = table[np.clip(-distance, 0, 128)]
    np.testing.assert_array_equal(got, want)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A T5 1.1 with its tokenizer, in several files."""
    path = tmp_path_factory.mktemp("t5") / "sharded"
    foreign_folders.write("t5_1_1", path, max_shard_size="20KB")
    assert (path / tensor_files.INDEX).is_file()
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def _one_file(folder):
    """The same folder with all tensors in one file; returns them."""
    state = {}
    for path in folder.glob("*.safetensors"):
        state |= safetensors.numpy.load_file(path)
        path.unlink()
    (folder / tensor_files.INDEX).unlink(missing_ok=True)
    safetensors.numpy.save_file(state, folder / tensor_files.SINGLE)
    return state


def _change(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _axes(shape):
    """Mesh axes of the first and the last axis, where they divide it."""
    axes = [None] * len(shape)
    for axis, name in ((0, "a"), (-1, "b")):
        if shape[axis] % 2 == 0 and len(shape) > 1:
            axes[axis] = name
    return axes


def test_a_device_reads_its_own_part(folder, monkeypatch):
    foreign = huggingface.open_folder(folder)
    mesh = jax.make_mesh(
        (2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    read = []
    items = tensor_files._Place._items

    def watched(self, first, count):
        read.append(count)
        return items(self, first, count)

    monkeypatch.setattr(tensor_files._Place, "_items", watched)
    for scan_layers in (False, True):
        model = foreign.model(scan_layers=scan_layers)
        shardings = jax.tree.map(
            lambda x: NamedSharding(mesh, PartitionSpec(*_axes(x.shape))),
            models.shapes(model),
        )
        params = huggingface.read(folder, shardings, scan_layers=scan_layers)
        whole = huggingface.read(folder, scan_layers=scan_layers)
        chex.assert_trees_all_equal(jax.device_get(params), jax.device_get(whole))
        assert all(
            x.sharding == y
            for x, y in zip(
                jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True
            )
        )
    # No read is larger than the largest tensor.
    largest = max(np.prod(leaf.shape) for leaf in foreign.leaves.values())
    assert max(read) <= largest
    name = "token_embedder/embedding"
    leaf, whole = foreign.leaves[name], foreign.leaves[name].read()
    read.clear()
    part = leaf.read((slice(8, 12), slice(3, 9)))
    np.testing.assert_array_equal(part, whole[8:12, 3:9])
    assert read == [4 * whole.shape[1]]


def test_bfloat16_is_read_and_written(folder, tmp_path):
    import ml_dtypes

    foreign = huggingface.open_folder(folder)
    out = tmp_path / "half"
    huggingface.write(
        out, foreign.leaves, foreign.model(), None, dtype="bfloat16", shard=20_000
    )
    assert len(list(out.glob("*.safetensors"))) > 1
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(out)
    assert theirs.dtype == torch.bfloat16
    for dtype in ("float32", "bfloat16"):
        got = huggingface.read(out, dtype=dtype)
        want = huggingface.read(folder)
        want = jax.tree.map(
            lambda x, d=dtype: np.asarray(x).astype(ml_dtypes.bfloat16).astype(d), want
        )
        chex.assert_trees_all_equal(jax.device_get(got), want)


def test_mt5_folders_of_transformers_4_and_5_are_the_same_network(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    foreign_folders.write("mt5", new)
    assert json.loads((new / "config.json").read_text())["tie_word_embeddings"]
    shutil.copytree(new, old)
    state = _one_file(old)
    for stack in ("encoder", "decoder"):  # as old files repeat it
        state[f"{stack}.embed_tokens.weight"] = state["shared.weight"]
    state[configs.UNREAD] = np.zeros((8, 3), "f4")
    safetensors.numpy.save_file(state, old / tensor_files.SINGLE)
    _change(old, tie_word_embeddings=False, transformers_version="4.11.0")
    a, b = huggingface.open_folder(new), huggingface.open_folder(old)
    assert a.shape == b.shape and not a.shape.logits_via_embedding
    assert a.left_over == () and len(b.left_over) == 3
    chex.assert_trees_all_equal(huggingface.read(new), huggingface.read(old))


def test_a_head_that_is_tied_but_not_scaled_is_the_embedding(copy):
    state = _one_file(copy)
    del state["lm_head.weight"]
    safetensors.numpy.save_file(state, copy / tensor_files.SINGLE)
    params = huggingface.read(copy)  # transformers 5 writes tie_word_embeddings=true
    np.testing.assert_array_equal(
        params["decoder"]["logits_dense"]["kernel"], state["shared.weight"].T
    )
    _change(copy, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lacks 'lm_head.weight'"):
        huggingface.open_folder(copy)


@pytest.mark.parametrize("name", ["lm_head", "encoder.embed_tokens"])
def test_a_second_embedding_is_not_lost(copy, name):
    state = _one_file(copy)
    state["lm_head.weight"] = state["shared.weight"].copy()
    state[f"{name}.weight"] = state["shared.weight"] + 1
    safetensors.numpy.save_file(state, copy / tensor_files.SINGLE)
    _change(copy, scale_decoder_outputs=True)
    with pytest.raises(ValueError, match=rf"'{name}.weight' differs from 'shared"):
        huggingface.open_folder(copy)


def test_the_encoder_of_a_whole_t5_is_an_encoder(copy):
    _change(copy, architectures=["T5EncoderModel"], is_encoder_decoder=False)
    foreign = huggingface.open_folder(copy)
    assert foreign.kind == "EmbeddingModel" and "lm_head.weight" in foreign.left_over
    assert set(huggingface.read(copy)) == {"encoder", "token_embedder"}


def test_tensors_that_do_not_fit_are_refused(copy):
    state = _one_file(copy)
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"

    def refused(changed, match):
        safetensors.numpy.save_file(changed, copy / tensor_files.SINGLE)
        with pytest.raises(ValueError, match=match):
            huggingface.read(copy)

    renamed = {k.replace(".q.", ".qq.") if k == name else k: v
               for k, v in state.items()}  # fmt: skip
    refused(renamed, rf"lacks '{name}'.*nearest: '.*qq\.weight'.*config.json belong")
    refused(state | {name: state[name][:17]}, r"must have shape \(20, 18\).*\(20, 17\)")
    refused(state | {"adapter": np.zeros(1)}, r"1 tensors .* no place for.*'adapter'")
    safetensors.numpy.save_file(state, copy / tensor_files.SINGLE)
    for fields, match in (
        ({"num_layers": 1}, r"no place for, such as \['encoder.block.1"),
        ({"num_layers": 3}, r"lacks 'encoder.block.2"),
        ({"d_ff": 27}, r"must have shape \(20, 27\), but .* gives \(20, 28\)"),
        ({"feed_forward_proj": "relu", "is_gated_act": None, "dense_act_fn": None},
         r"lacks 'encoder.block.0.layer.1.DenseReluDense.wi.weight'"),
        ({"model_type": "umt5"}, r"lacks 'encoder.block.1.layer.0.*attention_bias"),
    ):  # fmt: skip
        before = (copy / "config.json").read_text()
        _change(copy, **fields)
        with pytest.raises(ValueError, match=match):
            huggingface.read(copy)
        (copy / "config.json").write_text(before)


def test_damaged_files_are_told_before_anything_is_read(copy):
    path = sorted(copy.glob("*.safetensors"))[1]
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for damaged, match in (
        (whole[:-1], "was cut off or changed"),
        (whole + b"0", "was cut off or changed"),
        (whole[: length // 2], "cut off within its header"),
        (whole[:3], "not a safetensors file"),
        (b"", "not a safetensors file"),
        (b"\xff" * 8 + whole[8:], "not a safetensors file"),
        (whole[:8] + b"{" * length + whole[8 + length :], "header is damaged"),
        (whole.replace(b'"F32"', b'"I64"', 1), "dtype I64"),
        (whole.replace(b'"F32"', b'"F64"', 1), "bytes"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(tensor_files.DamagedFolderError, match=match) as told:
            huggingface.read(copy)
        assert path.name in str(told.value)
    path.write_bytes(whole)
    leaf = next(x for x in tensor_files.read_file(path).values() if len(x.shape) == 2)
    path.write_bytes(b"")  # between opening and reading
    with pytest.raises(tensor_files.DamagedFolderError, match="ends too early"):
        leaf.read()


def test_an_index_leads_to_files_of_its_folder_only(copy):
    index = copy / tensor_files.INDEX
    whole = json.loads(index.read_text())
    tensor, name = next(iter(whole["weight_map"].items()))
    outside = copy.parent / name
    shutil.copy(copy / name, outside)
    for bad in (f"../{name}", str(outside), f"a/../../{name}", ""):
        changed = {"weight_map": whole["weight_map"] | {tensor: bad}}
        index.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="name of a file below"):
            huggingface.open_folder(copy)
    for bad, error, match in (
        ({tensor: "gone.safetensors"}, FileNotFoundError, "'gone.safetensors', which"),
        ({"other": name}, tensor_files.DamagedFolderError, "'other' in .*lacks it"),
        ({"other": 3}, ValueError, "name of a file below"),
    ):
        index.write_text(json.dumps({"weight_map": whole["weight_map"] | bad}))
        with pytest.raises(error, match=match):
            huggingface.open_folder(copy)
    index.write_text("[1")
    with pytest.raises(tensor_files.DamagedFolderError, match="is not JSON"):
        huggingface.open_folder(copy)


class _Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_a_pickle_is_never_opened(copy, name, monkeypatch):
    monkeypatch.chdir(copy)
    _one_file(copy)
    (copy / tensor_files.SINGLE).unlink()
    (copy / name).write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises((FileNotFoundError, tensor_files.DamagedFolderError)) as told:
        huggingface.read(copy)
    assert name in str(told.value)
    if name != tensor_files.SINGLE:
        assert "Pickles can run code" in str(told.value)
    assert not (copy / "exploded").exists()


def test_folders_without_what_it_takes(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"with a config\.json"):
        huggingface.read(tmp_path / "nowhere")
    for path in (*copy.glob("*.safetensors"), copy / tensor_files.INDEX):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors file\."):
        huggingface.read(copy)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"layer_norm_epsilon": 1e-5}, r"layer_norm_epsilon=1e-06, got 1e-05"),
        ({"dense_act_fn": "silu"}, r"dense_act_fn='relu' with .*'relu', got 'silu'"),
        ({"is_gated_act": True}, r"is_gated_act=False with feed_forward_proj='relu'"),
        ({"feed_forward_proj": "gelu"}, r"feed_forward_proj must be one of"),
        ({"relative_attention_max_distance": 16}, r"must exceed half of the 32"),
        ({"model_type": "longt5"}, r"'umt5'\), got 'longt5': .*attends locally"),
        ({"model_type": "bart"}, r"got 'bart': other architectures"),
        ({"d_model": None}, r"config.json lacks 'd_model'"),
    ],
)
def test_a_config_of_another_function_is_refused(fields, told):
    config = dict(
        vocab_size=8, d_model=4, num_heads=1, d_kv=4, d_ff=4, num_layers=1,
        feed_forward_proj="relu", layer_norm_epsilon=1e-6, decoder_start_token_id=0,
        dense_act_fn="relu", is_gated_act=False,
    )  # fmt: skip
    configs.shape_of(config)
    with pytest.raises(ValueError, match=told):
        configs.shape_of(config | fields)


def test_another_tokenizer_than_the_embeddings_is_refused(copy):
    def refused(match):
        with pytest.raises(ValueError, match=match):
            huggingface.open_folder(copy)

    before = (copy / "config.json").read_text()
    for fields, match in (
        ({"eos_token_id": 2}, r"ids \(0, 1, 2\), expected \(0, 2"),
        ({"pad_token_id": 5000}, r"pad_token_id in \[0, 228\)"),
        ({"decoder_start_token_id": 2}, r"decoder_start_token_id=0, got 2"),
        ({"is_encoder_decoder": False}, r"is_encoder_decoder=true"),
    ):
        _change(copy, **fields)
        refused(match)
        (copy / "config.json").write_text(before)
    settings = copy / "tokenizer_config.json"
    kept = json.loads(settings.read_text())
    settings.write_text(json.dumps(kept | {"extra_ids": 1000}))
    refused(r"tokenizer has 1,100 ids, the embedding 228 rows; .*another network's")
    settings.write_text(json.dumps(kept))
    (copy / "added_tokens.json").write_text('{"<mine>": 200}')
    refused(r"adds tokens of its own")
    for path in copy.glob("*token*"):
        path.unlink()
    (copy / "spiece.model").unlink()
    assert huggingface.open_folder(copy).vocabulary is None
    foreign_folders.write_tokenizer("bpe", copy)
    refused(r"tokenizer has 335 ids, the embedding 228")


def test_a_tokenizer_that_ends_texts_otherwise_is_refused(tmp_path):
    foreign_folders.write("codet5", tmp_path / "a")
    _change(tmp_path / "a", eos_token_id=3)
    with pytest.raises(ValueError, match=r"eos token is 2, config.json says eos.*=3"):
        huggingface.open_folder(tmp_path / "a")


def test_without_the_tokenizers_package_the_message_says_what_to_install(
    tmp_path, monkeypatch
):
    foreign_folders.write("codet5", tmp_path / "a")
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxalign\[tokenizers\]'"):
        huggingface.open_folder(tmp_path / "a")


def test_a_folder_is_written_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    foreign = huggingface.open_folder(folder)
    model, vocabulary = foreign.model(), foreign.vocabulary

    def write(path, leaves=foreign.leaves, model=model, **more):
        huggingface.write(path, leaves, model, vocabulary, **more)

    with pytest.raises(FileExistsError, match="there already"):
        write(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="there already"):
        write(tmp_path / "file")
    with pytest.raises(OSError, match="file/out cannot be written"):
        write(tmp_path / "file" / "out")
    scalar = models.ScalarModel(model.config)
    with pytest.raises(ValueError, match="kind 'ScalarModel' has no Hugging Face"):
        write(tmp_path / "out", model=scalar)
    few = {k: v for k, v in foreign.leaves.items() if "norm" not in k}
    with pytest.raises(ValueError, match=r"not those of 2 \+ 2 layers"):
        write(tmp_path / "out", few)
    with pytest.raises(ValueError, match="dtype must be"):
        write(tmp_path / "out", dtype="float16")
    odd = dataclasses.replace(model.config, mlp_activations=("silu", "relu"))
    with pytest.raises(ValueError, match="has no Hugging Face name"):
        write(tmp_path / "out", model=models.T5(odd))

    def full(at):
        raise OSError(errno.ENOSPC, "No space left on device")

    last = list(foreign.leaves)[-1]
    leaf = dataclasses.replace(foreign.leaves[last], block=full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "out", foreign.leaves | {last: leaf})
    assert os.listdir(tmp_path) == ["file"]
    (tmp_path / "out").mkdir()  # an empty folder may be filled
    write(tmp_path / "out", card="# A card")
    assert (tmp_path / "out" / "README.md").read_text() == "# A card"
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]
    chex.assert_trees_all_equal(
        huggingface.read(tmp_path / "out"), huggingface.read(folder)
    )
