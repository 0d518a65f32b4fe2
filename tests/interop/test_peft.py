"""Adapters of the package peft, read and written; the golden numbers are its own."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

peft = pytest.importorskip("peft", reason="needs peft, of the extra 'test'")
torch = pytest.importorskip("torch", reason="needs torch, of the extra 'test'")
transformers = pytest.importorskip("transformers", reason="of the extra 'test'")

from jaxalign import models  # noqa: E402
from jaxalign.cluster import mesh as meshes  # noqa: E402
from jaxalign.interop import peft as ours  # noqa: E402
from jaxalign.models import adapters  # noqa: E402
from jaxalign.training import checkpoints  # noqa: E402

# peft reads a property of transformers that is to be renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q", "v"]),
    "rslora": lambda: peft.LoraConfig(
        r=4, lora_alpha=12, use_rslora=True, target_modules=["q", "k", "v", "o", "wo"]
    ),
    "dora": lambda: peft.LoraConfig(
        r=4, lora_alpha=12, use_dora=True, target_modules=["q", "wi_0", "wi_1"]
    ),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k", "v", "wo"], feedforward_modules=["wo"]
    ),
}
INPUTS = torch.tensor([[5, 6, 7, 8, 1], [9, 4, 1, 0, 0]])
TARGETS = torch.tensor([[0, 11, 12, 13], [0, 7, 8, 0]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of a T5 1.1 with random weights."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    folder = tmp_path_factory.mktemp("base") / "t5"
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def theirs(folder):
    return transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()


def moved(base, kind):
    """A model of peft whose adapter is not where it starts."""
    torch.manual_seed(1)
    config = CONFIGS[kind]()
    config.task_type = "SEQ_2_SEQ_LM"
    model = peft.get_peft_model(theirs(base), config).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert "lora" in name or "ia3" in name
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def logits_of(model):
    mask = (INPUTS != 0).long()
    return model(
        input_ids=INPUTS, attention_mask=mask, decoder_input_ids=TARGETS
    ).logits


def batch():
    inputs, targets = INPUTS.numpy().astype(np.int32), TARGETS.numpy().astype(np.int32)
    return {
        "encoder_input_tokens": inputs,
        "encoder_segment_ids": (inputs != 0).astype(np.int32),
        "decoder_input_tokens": targets[:, None],
        "decoder_segment_ids": np.ones_like(targets)[:, None],
        "prompt_mask": np.ones((2, 1), np.float32),
        "response_prompt": np.zeros((2, 1), np.int32),
    }


def our_logits(model, params):
    return model.apply({"params": params}, batch())[:, 0]


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_of_peft_has_equal_logits_and_goes_back(kind, base, tmp_path):
    model = moved(base, kind)
    model.save_pretrained(tmp_path / "theirs")
    wanted = logits_of(model).detach().numpy()
    found = ours.open_folder(tmp_path / "theirs")
    net, plain = found.foreign.model(), checkpoints.load(base).params
    expanded = found.adapter.expand(adapters.overlay(plain, found.tree()))
    tolerance = {"rtol": 0, "atol": 1e-4}
    np.testing.assert_allclose(our_logits(net, expanded), wanted, **tolerance)
    assert abs(our_logits(net, plain) - wanted).max() > 1e-2
    # By path alone, merged leaf by leaf; and as peft merges it.
    loaded = checkpoints.load(tmp_path / "theirs")
    np.testing.assert_allclose(our_logits(net, loaded.params), wanted, **tolerance)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        loaded.params,
        adapters.merge(expanded),
    )
    merged = model.merge_and_unload().state_dict()
    for path, (name, turned) in found.foreign.names.items():
        leaf = loaded.params
        for part in path.split("/"):
            leaf = leaf[part]
        leaf = np.asarray(leaf).T if turned else np.asarray(leaf)
        np.testing.assert_allclose(leaf, merged[name], rtol=1e-5, atol=1e-6)
    ours.write(tmp_path / "ours", found.adapter, found.tree(), net, base)
    back = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "ours").eval()
    np.testing.assert_allclose(logits_of(back).detach().numpy(), wanted, **tolerance)
    again = ours.open_folder(tmp_path / "ours")
    assert again.adapter == found.adapter
    jax.tree.map(np.testing.assert_array_equal, again.tree(), found.tree())
    with pytest.raises(FileExistsError, match="is there already"):
        ours.write(tmp_path / "ours", found.adapter, found.tree(), net, base)


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_are_those_of_pytorch(kind, base, tmp_path):
    model = moved(base, kind)
    model.save_pretrained(tmp_path / "theirs")
    found = ours.open_folder(tmp_path / "theirs")
    net, plain = found.foreign.model(), checkpoints.load(base).params
    weights = torch.sin(torch.arange(2 * 4 * 32.0)).reshape(2, 4, 32)
    (logits_of(model) * weights).sum().backward()

    def loss(own):
        params = found.adapter.expand(adapters.overlay(plain, own))
        return (our_logits(net, params) * weights.numpy()).sum()

    gradients = jax.jit(jax.grad(loss))(found.tree())
    grads = {
        name.replace(".default", "").removesuffix(".weight"): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    ours.write(tmp_path / "g", found.adapter, gradients, net, base)
    held = ours.tensor_files.read_file(tmp_path / "g" / ours.TENSORS)
    assert {name.removesuffix(".weight") for name in held} == set(grads)
    for name, leaf in held.items():
        wanted = grads[name.removesuffix(".weight")].numpy()
        bound = 1e-4 * abs(wanted).max()
        assert abs(leaf.read() - wanted).max() <= bound, name


@pytest.mark.parametrize("submodules", [1, None])
def test_a_soft_prompt_of_peft_has_equal_logits_and_goes_back(
    submodules, base, tmp_path
):
    """With None the tensor has rows for the decoder, which peft does not read."""
    torch.manual_seed(1)
    config = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM",
        num_virtual_tokens=3,
        num_transformer_submodules=submodules,
    )
    model = peft.get_peft_model(theirs(base), config).eval()
    rows = model.prompt_encoder["default"].embedding.weight
    assert rows.shape == (3 * (submodules or 2), 16)
    model.save_pretrained(tmp_path / "theirs")
    logits = logits_of(model)
    wanted = logits.detach().numpy()
    tolerance = {"rtol": 0, "atol": 1e-4}
    loaded = checkpoints.load(tmp_path / "theirs")
    found = our_logits(loaded.model, loaded.params)
    np.testing.assert_allclose(found, wanted, **tolerance)
    plain = adapters.plain(loaded.params)
    jax.tree.map(np.testing.assert_array_equal, plain, checkpoints.load(base).params)
    assert abs(our_logits(loaded.model, plain) - wanted).max() > 1e-2
    opened = ours.open_folder(tmp_path / "theirs")
    assert opened.adapter == adapters.SoftPrompt(length=3)
    weights = torch.sin(torch.arange(2 * 4 * 32.0)).reshape(2, 4, 32)
    (logits * weights).sum().backward()

    def loss(own):
        params = opened.adapter.expand(adapters.overlay(plain, own))
        return (our_logits(loaded.model, params) * weights.numpy()).sum()

    gradient = jax.jit(jax.grad(loss))(opened.tree())["token_embedder"]["soft_prompt"]
    torchs = rows.grad.numpy()
    bound = 1e-4 * abs(torchs).max()
    np.testing.assert_allclose(gradient, torchs[:3], rtol=0, atol=bound)
    assert not torchs[3:].any()
    # And back, onto a mesh as well.
    ours.write(tmp_path / "ours", opened.adapter, opened.tree(), loaded.model, base)
    back = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "ours").eval()
    np.testing.assert_allclose(logits_of(back).detach().numpy(), wanted, **tolerance)
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    again = checkpoints.load(tmp_path / "ours", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


def test_a_soft_prompt_that_cannot_be_read_is_told(base, tmp_path):
    rows = {"token_embedder": {"soft_prompt": np.ones((3, 16), np.float32)}}
    net, folder = checkpoints.load(base).model, tmp_path / "a"
    ours.write(folder, adapters.SoftPrompt(3), rows, net, base)
    config = json.loads((folder / ours.CONFIG).read_text())
    for change, message in (
        ({"num_virtual_tokens": 2}, r"must be \(2, 16\).* got \(3, 16\)"),
        ({"num_virtual_tokens": "3"}, "num_virtual_tokens must be a whole number"),
        ({"task_type": "CAUSAL_LM"}, "of task_type='CAUSAL_LM' is not supported"),
        ({"peft_type": "P_TUNING"}, "must be LORA, IA3 or PROMPT_TUNING"),
    ):
        (folder / ours.CONFIG).write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            checkpoints.load(folder)
    (folder / ours.CONFIG).write_text(json.dumps(config))
    held = ours.tensor_files.read_file(folder / ours.TENSORS)
    (tmp_path / "b").mkdir()
    renamed = {"embedding": held["prompt_embeddings"]}
    ours.tensor_files.write_folder(tmp_path / "b", renamed, "float32", shard=1 << 62)
    (tmp_path / "b" / ours.tensor_files.SINGLE).replace(folder / ours.TENSORS)
    with pytest.raises(ValueError, match="must hold 'prompt_embeddings' alone"):
        checkpoints.load(folder)
    more = adapters.overlay(rows, {"decoder": {"logits_dense": {"kernel": np.ones(1)}}})
    with pytest.raises(ValueError, match="trained beside the soft prompt"):
        ours.write(tmp_path / "c", adapters.SoftPrompt(3), more, net, base)
    assert not (tmp_path / "c").exists()


def test_what_cannot_be_read_is_told(base, tmp_path):
    moved(base, "lora").save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / ours.CONFIG
    config = json.loads(path.read_text())

    def refused(error, message, **changes):
        path.write_text(json.dumps(config | changes))
        with pytest.raises(error, match=message):
            checkpoints.load(tmp_path / "a")

    refused(ValueError, "modules_to_save=.*merge_and_unload", modules_to_save=["x"])
    refused(
        ValueError, "must be LORA, IA3 or PROMPT_TUNING, got 'LOHA'", peft_type="LOHA"
    )
    refused(FileNotFoundError, "no folder here", base_model_name_or_path="google/t5")
    refused(ValueError, r"must give \(16, 3\).*got \(16, 4\)", r=3)
    path.write_text(json.dumps(config))
    tensors = tmp_path / "a" / ours.TENSORS
    data = tensors.read_bytes()
    tensors.write_bytes(data[:-9])
    with pytest.raises(ValueError, match="cut off or changed"):
        checkpoints.load(tmp_path / "a")
    tensors.unlink()
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match="Pickles"):
        checkpoints.load(tmp_path / "a")


def test_more_than_an_adapter_has_no_place_in_its_folder(tmp_path):
    config = models.T5Config(32, 16, 2, 8, 24, 1, 1)
    own = {"decoder": {"logits_dense": {"kernel": np.zeros((16, 32))}}}
    with pytest.raises(ValueError, match="trained beside the adapter"):
        ours.write(tmp_path / "x", adapters.LoRA(), own, models.T5(config), "base")
    assert not (tmp_path / "x").exists()
