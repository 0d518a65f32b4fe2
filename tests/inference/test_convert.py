"""Conversions: every format to every other, whole or not at all; what is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import foreign_folders
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

import jaxalign
from jaxalign import models
from jaxalign.cli import main
from jaxalign.inference import convert as converting
from jaxalign.inference.convert import convert
from jaxalign.inference.verify import VerificationError
from jaxalign.interop import leaves, t5x, tensor_files
from jaxalign.interop.folders import flat
from jaxalign.training import checkpoints, damage, leafwise, new_run
from jaxalign.vocabularies import ByteVocabulary, SentencePieceVocabulary

# T5X's networks have these as constants.
BUCKETS = dict(relative_attention_num_buckets=32, relative_attention_max_distance=128)
SMALL = models.T5Config(384, 8, 2, 4, 12, 2, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A T5 1.1 as transformers writes it."""
    path = tmp_path_factory.mktemp("convert") / "hf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreign_folders, "SIZES", foreign_folders.SIZES | BUCKETS)
        foreign_folders.write("t5_1_1", path)
    return path


@pytest.fixture(scope="module")
def run(folder):
    """The same as a jaxalign run."""
    path = folder.parent / "run"
    convert(str(folder), str(path), format="jaxalign")
    return path


def _tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def _assert_same(got, want):
    assert set(got) == set(want)
    for name, value in want.items():
        assert got[name].tobytes() == value.tobytes(), name


def _listed(path):
    return sorted(p.name for p in path.iterdir())


# --- What is converted --------------------------------------------------------


def test_every_format_becomes_every_other(folder, run, tmp_path):
    made = {"hf": folder, "jaxalign": run, "t5x": tmp_path / "t5x"}
    convert(str(run), str(made["t5x"]), format="t5x")
    for source, target in (("t5x", "jaxalign"), ("t5x", "hf"), ("jaxalign", "hf"),
                           ("hf", "t5x")):  # fmt: skip
        path = tmp_path / f"{source}-{target}"
        told = convert(str(made[source]), str(path), format=target)
        assert f"({source}, policy: 2 + 2 layers" in told and f"({target}" in told
        made[path.name] = path
    want = leafwise.opened(folder)
    fingerprint = leaves.fingerprint(want.leaves)
    for path in made.values():
        found = leafwise.opened(path)
        assert leaves.fingerprint(found.leaves) == fingerprint
        assert found.vocabulary == want.vocabulary
        assert found.model.config.architecture() == want.model.config.architecture()
        assert checkpoints.fingerprint(path) == fingerprint
    for name in ("t5x-hf", "jaxalign-hf"):
        _assert_same(_tensors(made[name]), _tensors(folder))
        generation = json.loads((made[name] / "generation_config.json").read_text())
        assert generation == dict(
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0
        )
    # As a run is loaded, by Orbax: it compares the fingerprint, too.
    network = checkpoints.load(run)
    for name, leaf in flat(network.params).items():
        np.testing.assert_array_equal(leaf.read(), want.leaves[name].read())


def test_bfloat16_is_verified_against_rounded_parameters(folder, run, tmp_path):
    out = tmp_path / "half"
    told = convert(str(run), str(out), format="jaxalign", dtype="bfloat16", verify=True)
    assert "largest difference" in told and "by rounding to bfloat16" in told
    found = leafwise.opened(out)
    for name, leaf in leafwise.opened(folder).leaves.items():
        assert found.leaves[name].dtype == "bfloat16"
        np.testing.assert_array_equal(
            found.leaves[name].read(), leaf.read().astype("bfloat16")
        )


def test_greedy_text_of_an_exported_run_is_that_of_transformers(run, tmp_path):
    import transformers

    out = tmp_path / "out"
    assert main(["convert", str(run), str(out), "--format=hf", "--verify"]) == 0
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    texts = ["The quick brown fox jumps over", "sums 48/2 = 24 and 16-3"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    generated = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=12,
        do_sample=False,
    )
    want = tokenizer.batch_decode(generated, skip_special_tokens=True)
    policy = jaxalign.load(str(run))
    got = policy.generate(texts, temperature=0.0, max_new_tokens=12)
    assert [texts[0] for texts in got] == want and len(set(want)) > 1
    policy.save(tmp_path / "again", format="jaxalign")
    assert checkpoints.fingerprint(tmp_path / "again") == policy.network.fingerprint
    with pytest.raises(ValueError, match=r"format must be one of .*'jaxalign'"):
        policy.save(tmp_path / "x", format="jax")


def _two_networks(run_dir):
    """A run as Orbax writes it: a policy with its layers stacked, and a value."""
    policy = models.T5(models.T5Config(**{**vars(SMALL), "scan_layers": True}))
    value = models.ScalarModel(SMALL)
    nets = {"policy": policy, "value": value}
    params = {
        name: models.init_params(net, jax.random.key(len(name)))
        for name, net in nets.items()
    }
    checkpoint = run_dir / "checkpoints" / "7"
    checkpoint.mkdir(parents=True)
    for name, tree in params.items():
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(checkpoint / name, tree)
    vocabulary = ByteVocabulary()
    about = {
        name: {
            **models.stored(net),
            "fingerprint": leaves.fingerprint(flat(params[name])),
        }
        for name, net in nets.items()
    }
    meta = {
        "format": 3,
        "step": 7,
        "main": "policy",
        "networks": about,
        "vocabulary": vocabulary.to_json(),
        "vocabulary_fingerprint": vocabulary.fingerprint,
        "objective": "DROV",
        "batch_size": 16,
        "data_fingerprint": "d" * 64,
        "parents": {"initial": "a" * 64, "reference": None},
    }
    damage.write_meta(checkpoint, meta)
    line = {"step": 7, "train/loss": 0.125}
    (run_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return params


def test_one_of_several_networks_and_layers_that_are_stacked(tmp_path):
    params = _two_networks(tmp_path / "run")
    source = str(tmp_path / "run")
    convert(source, str(tmp_path / "hf"), format="hf")
    found = leafwise.opened(tmp_path / "hf")
    apart = flat(models.unstack_layers(params["policy"]))
    assert set(found.leaves) == set(apart)
    for name, leaf in apart.items():
        np.testing.assert_array_equal(found.leaves[name].read(), leaf.read())
    card = (tmp_path / "hf" / "README.md").read_text()
    for said in ("DROV", "`" + "a" * 64 + "`", "d" * 64, "AutoModelForSeq2SeqLM"):
        assert said in card, said
    for row in ("| Steps | 7 |", "| loss | 0.125 |", "| Batch size | 16 |"):
        assert row in card
    assert "Seed" not in card and "reference" not in card  # nothing is known of them
    # In its own format it keeps the layout, and so its fingerprint.
    convert(source, str(tmp_path / "own"), format="jaxalign")
    own = checkpoints.load(tmp_path / "own")
    assert own.fingerprint == checkpoints.fingerprint(source)
    assert own.meta["parents"] == {"initial": "a" * 64, "reference": None}
    convert(
        source, str(tmp_path / "v"), format="jaxalign", network="value", verify=True
    )
    value = checkpoints.load(tmp_path / "v", "value")
    jax.tree.map(np.testing.assert_array_equal, value.params, params["value"])
    for kind, said in (
        ("hf", "no Hugging Face arch"),
        ("t5x", "hold encoder-decoders"),
    ):
        with pytest.raises(ValueError, match=said):
            convert(source, str(tmp_path / "x"), format=kind, network="value")
    with pytest.raises(ValueError, match=r"holds no network 'polcy'.* 'policy'"):
        convert(source, str(tmp_path / "x"), format="hf", network="polcy")
    assert _listed(tmp_path) == ["hf", "own", "run", "v"]


@pytest.mark.parametrize("name", ["format1", "format2"])
def test_checkpoints_of_earlier_code(name, tmp_path):
    archive = (
        Path(__file__).parents[1] / f"training/checkpoints_of_before/{name}.tar.gz"
    )
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    source = tmp_path / name / "run"
    convert(str(source), str(tmp_path / "new"), format="jaxalign")
    assert checkpoints.fingerprint(tmp_path / "new") == checkpoints.fingerprint(source)


def test_a_converted_run_is_not_gone_on_with(tmp_path):
    import tiny_run

    data = tiny_run.write_data(tmp_path / "data.jsonl")
    model = models.T5(tiny_run.CONFIG)
    params = models.init_params(model, jax.random.key(0))
    new_run.write(tmp_path / "run", params, model, ByteVocabulary(125))
    before = sorted(str(p) for p in (tmp_path / "run").rglob("*"))
    run = tiny_run.make_run(tmp_path / "run", data, tmp_path / "cache", "SFT")
    with pytest.raises(ValueError, match=r"another run.*objective: saved 'none: conv"):
        tiny_run.loop.train(run)
    assert sorted(str(p) for p in (tmp_path / "run").rglob("*")) == before


# --- Vocabularies -------------------------------------------------------------


def test_a_t5x_checkpoint_without_a_vocabulary_is_told_which(folder, tmp_path):
    found = leafwise.opened(folder)
    t5x.save(tmp_path / "t5x", found.leaves, shape=found.model.config)
    gin = tmp_path / "t5x" / "checkpoint_0" / "config.gin"
    named = "seqio.SentencePieceVocabulary.sentencepiece_model_file = 'gs://x/y.model'"
    gin.write_text(gin.read_text() + f"import seqio\n{named}\n")
    source, out = str(tmp_path / "t5x"), tmp_path / "out"
    for kind in ("hf", "jaxalign"):
        with pytest.raises(ValueError, match=r"names gs://x/y.*give --vocabulary=PATH"):
            convert(source, str(out), format=kind)
    with pytest.raises(ValueError, match=r"bytes: the tokenizer has 384 ids, .* 228"):
        convert(source, str(out), format="hf", vocabulary="bytes")
    with pytest.raises(FileNotFoundError, match="no.model"):
        convert(source, str(out), format="hf", vocabulary=str(tmp_path / "no.model"))
    assert _listed(tmp_path) == ["t5x"]
    for i, given in enumerate((folder / "spiece.model", folder)):
        made = tmp_path / f"run{i}"
        convert(source, str(made), format="jaxalign", vocabulary=str(given))
        assert checkpoints.vocabulary(made) == found.vocabulary
    convert(source, str(out), format="hf", vocabulary=str(tmp_path / "run0"))
    assert isinstance(leafwise.opened(out).vocabulary, SentencePieceVocabulary)


# --- Whole or not at all ------------------------------------------------------

_KILLED = """
import os, signal, sys
from jaxalign.inference.convert import convert
from jaxalign.interop import leaves
read, count = leaves.Leaf.read, 0
def counted(leaf, index=None):
    global count
    count += 1
    if count == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(leaf, index)
leaves.Leaf.read = counted
convert(sys.argv[1], sys.argv[2], format=sys.argv[3])
"""


@pytest.mark.parametrize("kind", converting.FORMATS)
def test_a_kill_leaves_nothing_that_looks_whole(kind, folder, tmp_path, caplog):
    out = tmp_path / "out"
    argv = [str(folder), str(out), kind]
    done = subprocess.run([sys.executable, "-c", _KILLED, *argv], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = _listed(tmp_path)
    assert left.startswith(".out.") and left.endswith(".partial")
    with pytest.raises(FileNotFoundError):
        leafwise.opened(out)
    inner = next((p for p in (tmp_path / left).rglob("*") if p.is_file()), None)
    assert inner is not None  # it had begun
    convert(str(folder), str(out), format=kind)
    assert "remove what a kill left" in caplog.text
    assert leafwise.opened(out).format == kind


def test_what_does_not_compute_the_same_is_not_kept(run, tmp_path, monkeypatch):
    def mixed_up(params):
        found = flat(params)
        layer = "decoder/layers_0/self_attention"
        query, key = f"{layer}/query/kernel", f"{layer}/key/kernel"
        return found | {query: found[key], key: found[query]}

    monkeypatch.setattr(new_run, "flat", mixed_up)
    with pytest.raises(VerificationError, match=r"largest difference .* not kept"):
        convert(str(run), str(tmp_path / "out"), format="jaxalign", verify=True)
    assert _listed(tmp_path) == []


class _Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def _cut_off(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _without(folder):
    state = _tensors(folder)
    del state["encoder.block.1.layer.0.SelfAttention.k.weight"]
    safetensors.numpy.save_file(state, folder / "model.safetensors")


def _reshaped(folder):
    state = _tensors(folder)
    name = "decoder.block.0.layer.2.DenseReluDense.wo.weight"
    state[name] = state[name][:, :-1].copy()
    safetensors.numpy.save_file(state, folder / "model.safetensors")


def _other_config(folder):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"d_model": 24}))


def _other_tokenizer(folder):
    foreign_folders.write_tokenizer("bytes", folder)
    (folder / "spiece.model").unlink()


def _leads_out(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"shared.weight": "../outside.safetensors"}}
    (folder / tensor_files.INDEX).write_text(json.dumps(index))


def _pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))


def _pickled_as_tensors(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(_Bomb()))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_cut_off, r"model\.safetensors has .* it was cut off or changed"),
        (_without, r"lacks 'encoder\.block\.1.*k\.weight'"),
        (_reshaped, r"mlp/wo/kernel must have shape \(28, 20\), but .* \(27, 20\)"),
        (_other_config, r"must have shape \(228, 24\).*config\.json belong"),
        (_other_tokenizer, "tokenizer has 384 ids, the embedding 228 rows"),
        (_leads_out, r"name of a file below .*'\.\./outside\.safetensors'"),
        (_pickled, "pytorch_model.bin. Pickles can run code"),
        (_pickled_as_tensors, r"model\.safetensors is not a safetensors file"),
    ],
)
def test_bad_sources_are_told_and_nothing_is_written(
    spoil, told, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(folder, tmp_path / "copy")
    spoil(copy)
    before = _listed(tmp_path)
    for kind in converting.FORMATS:
        with pytest.raises((ValueError, FileNotFoundError), match=told):
            convert(str(copy), str(tmp_path / "out"), format=kind)
    assert main(["convert", str(copy), str(tmp_path / "out"), "--format=hf"]) == 2
    assert len(capsys.readouterr().err.splitlines()) >= 1
    assert _listed(tmp_path) == before  # nor "exploded"


@pytest.mark.parametrize("kind", converting.FORMATS)
def test_bad_destinations(kind, folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("full", "file"):
        with pytest.raises(FileExistsError, match=f"{name} is there already"):
            convert(str(folder), str(tmp_path / name), format=kind)
    with pytest.raises(OSError, match="file/out cannot be written"):
        convert(str(folder), str(tmp_path / "file" / "out"), format=kind)
    assert (tmp_path / "full" / "mine").read_text() == "kept"
    assert _listed(tmp_path) == ["file", "full"]
    (tmp_path / "empty").mkdir()
    convert(str(folder), str(tmp_path / "empty"), format=kind)
    assert leafwise.opened(tmp_path / "empty").format == kind


def test_a_damaged_run_is_told_before_anything_is_written(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    data = max((copy / "checkpoints").rglob("d/*"), key=os.path.getsize)
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)
    with pytest.raises(damage.DamagedCheckpointError, match=data.name):
        convert(str(copy), str(tmp_path / "out"), format="hf")
    assert _listed(tmp_path) == ["copy"]


def test_t5x_is_not_given_what_it_would_compute_otherwise(run, tmp_path):
    found = leafwise.opened(run)
    other = models.T5(
        models.T5Config(
            **{**vars(found.model.config), "relative_attention_max_distance": 64}
        )
    )
    new_run.write(tmp_path / "run", found.leaves, other, found.vocabulary)
    with pytest.raises(ValueError, match=r"attention_max_distance=128.* one has 64"):
        convert(str(tmp_path / "run"), str(tmp_path / "out"), format="t5x")
    assert _listed(tmp_path) == ["run"]


# --- Buckets ------------------------------------------------------------------


@pytest.mark.parametrize("family", ["t5_1_1", "codet5"])
def test_to_and_from_a_bucket(family, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXALIGN_REMOTE_DIR", str(tmp_path / "copies"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreign_folders, "SIZES", foreign_folders.SIZES | BUCKETS)
        foreign_folders.write(family, tmp_path / "in")
    bucket = f"memory://convert-{family}"
    want = leafwise.opened(tmp_path / "in")
    source = str(tmp_path / "in")
    for kind in ("jaxalign", "t5x", "hf"):
        convert(source, f"{bucket}/{kind}", format=kind)
        source = f"{bucket}/{kind}"
        found = leafwise.opened(source)
        assert found.format == kind and found.vocabulary == want.vocabulary
        _same = leaves.fingerprint(found.leaves) == leaves.fingerprint(want.leaves)
        assert _same
    with pytest.raises(FileExistsError, match="hf is not empty"):
        convert(source, f"{bucket}/hf", format="hf")
    assert Path(tmp_path / "copies").is_dir()
