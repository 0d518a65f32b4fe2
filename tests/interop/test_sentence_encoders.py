"""Sentence-T5 and GTR: encoders whose mean state is a text's embedding."""

from __future__ import annotations

import json

import foreign_folders
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from jaxalign.interop import huggingface

KINDS = ("Transformer", "Pooling", "Dense", "Normalize")


def _write(folder, kinds=KINDS):
    """A folder as Sentence-Transformers lays it out; returns encoder and projection."""
    size = foreign_folders.write_tokenizer("pieces", folder)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=size + 28, dropout_rate=0.0, **foreign_folders.SIZES
    )
    theirs = transformers.T5EncoderModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.5)
    theirs.save_pretrained(folder)
    dense = np.random.default_rng(0).normal(size=(12, 20)).astype("f4")
    package, modules = "sentence_transformers.models", []
    for i, kind in enumerate(kinds):
        path = f"{i}_{kind}" if i else ""
        modules.append(
            {"idx": i, "name": str(i), "path": path, "type": f"{package}.{kind}"}
        )
        (folder / path).mkdir(exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(modules))
    pooling = {"word_embedding_dimension": 20, "pooling_mode_mean_tokens": True}
    pooling |= {"pooling_mode_cls_token": False, "pooling_mode_max_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if "Dense" in kinds:
        settings = {"in_features": 20, "out_features": 12, "bias": False}
        settings["activation_function"] = "torch.nn.modules.linear.Identity"
        (folder / "2_Dense" / "config.json").write_text(json.dumps(settings))
        safetensors.numpy.save_file(
            {"linear.weight": dense}, folder / "2_Dense" / "model.safetensors"
        )
    return theirs, dense


@pytest.mark.parametrize("kinds", [KINDS, KINDS[:2]], ids=["gtr", "plain"])
def test_embeddings_equal_pytorchs_and_are_written_back(kinds, tmp_path):
    theirs, dense = _write(tmp_path / "in", kinds)
    rng = np.random.default_rng(1)
    mask = np.arange(9) < np.array([9, 4])[:, None]
    tokens = (rng.integers(3, 100, (2, 9)) * mask).astype("i4")
    with torch.no_grad():
        states = theirs(torch.tensor(tokens), attention_mask=torch.tensor(mask))
    states = states.last_hidden_state.numpy() * mask[..., None]
    want = states.sum(1) / mask.sum(1, keepdims=True)
    if "Dense" in kinds:
        want = want @ dense.T
        want /= np.linalg.norm(want, axis=-1, keepdims=True)
    # The second row in one with the third, as packing lays them.
    batch = {
        "encoder_input_tokens": np.stack(
            [tokens[0], np.concatenate([tokens[1, :4], tokens[1, :4], [0]])]
        ),
        "encoder_segment_ids": np.array([[1] * 9, [1] * 4 + [2] * 4 + [0]], "i4"),
        "prompt_mask": np.array([[1, 0], [1, 1]], "f4"),
    }
    foreign = huggingface.open_folder(tmp_path / "in")
    model, params = foreign.model(), huggingface.read(tmp_path / "in")
    got = model.apply({"params": params}, batch)
    np.testing.assert_allclose(got[:, 0], want, atol=1e-5)
    np.testing.assert_allclose(got[1, 1], want[1], atol=1e-5)
    assert not np.any(got[0, 1])

    huggingface.write(tmp_path / "out", params, model, foreign.vocabulary)
    for path in (tmp_path / "in").rglob("*.safetensors"):
        want = safetensors.numpy.load_file(path)
        again = tmp_path / "out" / path.relative_to(tmp_path / "in")
        assert list(again.parent.glob("config.json"))
        found = safetensors.numpy.load_file(again)
        assert {k: v.tobytes() for k, v in found.items()} == {
            k: v.tobytes() for k, v in want.items()
        }
    again = huggingface.open_folder(tmp_path / "out")
    assert (again.shape, again.options) == (foreign.shape, foreign.options)
    assert again.vocabulary == foreign.vocabulary
    modules = json.loads((tmp_path / "out" / "modules.json").read_text())
    assert modules == json.loads((tmp_path / "in" / "modules.json").read_text())


def test_other_encoders_are_refused(tmp_path):
    folder = tmp_path / "in"
    _write(folder)
    modules = json.loads((folder / "modules.json").read_text())

    def refused(name, changes, match):
        path = folder / name
        before = path.read_text()
        content = json.loads(before)
        if isinstance(content, list):
            content[2] |= changes
        else:
            content |= changes
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=match):
            huggingface.open_folder(folder)
        path.write_text(before)

    assert modules[2]["path"] == "2_Dense"
    refused("modules.json", {"path": "../2_Dense"}, "name of a file below")
    refused("modules.json", {"type": "x.LayerNorm"}, r"got \['Transformer', .*LayerN")
    pooling = {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}
    refused("1_Pooling/config.json", pooling, "pooling_mode_max_tokens")
    gelu = {"activation_function": "torch.nn.modules.activation.GELU"}
    refused("2_Dense/config.json", gelu, "without bias or activation, got GELU")
    wide = {"linear.weight": np.zeros((12, 21), "f4")}
    safetensors.numpy.save_file(wide, folder / "2_Dense" / "model.safetensors")
    refused("2_Dense/config.json", {}, r"shape \[features, 20\], got \(12, 21\)")
