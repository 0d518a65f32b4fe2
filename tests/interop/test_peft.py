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
