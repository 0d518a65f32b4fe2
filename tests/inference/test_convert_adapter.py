"""Runs' adapters as folders of PEFT, which peft itself loads beside their base."""

from __future__ import annotations

import dataclasses

import foreign_folders
import numpy as np
import pytest
import tiny_run

peft = pytest.importorskip("peft", reason="needs peft, of the extra 'test'")
torch = pytest.importorskip("torch", reason="needs torch, of the extra 'test'")
transformers = pytest.importorskip("transformers", reason="of the extra 'test'")

from jaxalign import models  # noqa: E402
from jaxalign.cli import main  # noqa: E402
from jaxalign.inference.convert import convert  # noqa: E402
from jaxalign.models import adapters  # noqa: E402
from jaxalign.training import checkpoints  # noqa: E402
from jaxalign.training import train as loop  # noqa: E402

# peft reads a property of transformers that is to be renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

KINDS = {
    "LoRA": adapters.LoRA(rank=3, targets="attention/|mlp/"),
    "IA3": adapters.IA3(),
    "SoftPrompt": adapters.SoftPrompt(length=3),
}
INPUTS = np.array([[5, 6, 7, 8, 1], [9, 4, 1, 0, 0]])
TARGETS = np.array([[0, 11, 12, 13], [0, 7, 8, 0]])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    foreign_folders.write("byt5", folder / "base")
    tiny_run.write_data(folder / "data.jsonl")
    return folder


def job(folder, name, adapter, scan_layers=False, **changes):
    model = checkpoints.load(folder / "base").model
    config = dataclasses.replace(model.config, scan_layers=scan_layers)
    start = {"initial_checkpoint_path": str(folder / "base")}
    settings = {"model": models.T5(config), "adapter": adapter, "train_steps": 2}
    settings |= {"eval_period": 2} | start | changes
    data, cache = folder / "data.jsonl", folder / "cache"
    return tiny_run.make_run(folder / name, data, cache, "SFT", **settings)


def trained(folder, name, adapter, **changes):
    if not (folder / name).exists():
        loop.train(job(folder, name, adapter, **changes))
    return folder / name


def logits_of(folder):
    """Of what a path means to us."""
    found = checkpoints.load(folder)
    batch = {
        "encoder_input_tokens": INPUTS.astype(np.int32),
        "encoder_segment_ids": (INPUTS != 0).astype(np.int32),
        "decoder_input_tokens": TARGETS[:, None].astype(np.int32),
        "decoder_segment_ids": np.ones((2, 1, 4), np.int32),
        "prompt_mask": np.ones((2, 1), np.float32),
        "response_prompt": np.zeros((2, 1), np.int32),
    }
    return found.model.apply({"params": found.params}, batch)[:, 0]


def their_logits(base, folder=None):
    model = transformers.T5ForConditionalGeneration.from_pretrained(base)
    if folder is not None:
        model = peft.PeftModel.from_pretrained(model, folder)
    inputs = torch.tensor(INPUTS)
    with torch.no_grad():
        return model.eval()(
            input_ids=inputs,
            attention_mask=(inputs != 0).long(),
            decoder_input_ids=torch.tensor(TARGETS),
        ).logits.numpy()


@pytest.mark.parametrize("kind", sorted(adapters.KINDS))
def test_peft_loads_the_adapter_of_a_run(kind, work, tmp_path):
    run = trained(work, kind, KINDS[kind], scan_layers=kind == "LoRA")
    told = convert(str(run), str(tmp_path / "out"), format="peft", verify=True)
    assert f"(peft, beside {work / 'base'})" in told and "largest difference" in told
    wanted = logits_of(run)
    found = their_logits(work / "base", tmp_path / "out")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert abs(found - their_logits(work / "base")).max() > 1e-3
    again = logits_of(tmp_path / "out")
    np.testing.assert_allclose(again, wanted, rtol=0, atol=1e-4)
    if kind == "SoftPrompt":
        start = {"initial_checkpoint_path": str(tmp_path / "out")}
        for rules in (None, [("policy/decoder/.*", None)]):
            with pytest.raises(ValueError, match="with a soft prompt, which cannot be"):
                loop.train(job(work, "next", None, assignment=rules, **start))


def test_what_peft_has_no_place_for_is_refused(work, tmp_path, capsys):
    run, out = str(trained(work, "IA3", KINDS["IA3"])), tmp_path / "out"

    def refused(error, message, src=run, format="peft", **flags):
        with pytest.raises(error, match=message):
            convert(src, str(out), format=format, **flags)
        assert not out.exists()

    foreign_folders.write("t5_1_1", tmp_path / "other")
    base, other = str(work / "base"), str(tmp_path / "other")
    refused(ValueError, "is no run that trained an adapter", src=base)
    refused(ValueError, "is not the network that the adapter was", base=other)
    refused(ValueError, "no Hugging Face folder, which peft loads", base=run)
    refused(ValueError, "--verify reads the base", base="google/x", verify=True)
    refused(ValueError, "takes neither --dtype nor", dtype="bfloat16")
    refused(ValueError, "--base is for --format=peft", format="hf", base=base)
    sft = trained(work, "sft", None)
    refused(ValueError, "network 'policy' of .*sft has no adapter", src=str(sft))
    on_run = {"initial_checkpoint_path": str(sft)}
    second = str(trained(work, "second", KINDS["IA3"], **on_run))
    refused(ValueError, "sft FOLDER --format=hf makes one; give it as", src=second)
    # With its base beside it, it is written, by the command line as well.
    convert(str(sft), str(tmp_path / "sft_hf"), format="hf")
    argv = ["convert", second, str(out), "--format=peft"]
    assert main([*argv, f"--base={tmp_path / 'sft_hf'}"]) == 0
    assert "(peft, beside" in capsys.readouterr().out
    found = their_logits(tmp_path / "sft_hf", out)
    np.testing.assert_allclose(found, logits_of(second), rtol=0, atol=1e-4)
    # A name on the hub is taken at its word.
    told = convert(second, str(tmp_path / "hub"), format="peft", base="google/x")
    assert "google/x is no folder here and was not looked at" in told
