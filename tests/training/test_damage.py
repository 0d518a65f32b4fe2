"""Damage to a checkpoint's files: the one before and a word, or a refusal."""

from __future__ import annotations

import dataclasses
import errno
import json
import random
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from jaxalign import cli, models
from jaxalign import vocabularies as vocabs
from jaxalign.training import checkpoints, damage, run_directory, starts
from jaxalign.training import train as loop
from jaxalign.training.checkpoint_writer import Checkpoints, CheckpointWriteError
from jaxalign.training.step import TrainState

MODEL = models.T5(tiny_run.CONFIG)
META = {
    "format": 3,
    "main": "policy",
    "networks": {"policy": models.stored(MODEL), "value": models.stored(MODEL)},
    "vocabulary": vocabs.ByteVocabulary(extra_ids=125).to_json(),
}


def make_state(step: int) -> TrainState:
    """A state as a run has it, of random numbers; nothing is compiled."""
    shapes = models.shapes(MODEL)
    draw = np.random.default_rng(step)

    def arrays():
        return jax.tree.map(
            lambda s: jnp.array(draw.standard_normal(s.shape), s.dtype), shapes
        )

    return TrainState(
        step=jnp.array(step),
        params={"policy": arrays(), "value": arrays()},
        opt_state={"mu": arrays(), "count": jnp.array(step)},
        finite=jnp.array(True),
    )


def like() -> TrainState:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        make_state(0),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run directory with the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("damage") / "run"
    with Checkpoints(folder) as found:
        for step in (2, 4):
            found.save(make_state(step), {**META, "step": step})
        found.close()
    return folder


@pytest.fixture
def run(saved, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(saved, tmp_path / "run")


def restore(run: Path) -> TrainState | None:
    found = Checkpoints(run)
    restored = found.restore(like())
    found.close()
    return restored and restored[0]


def same(a, b) -> bool:
    return checkpoints.params_fingerprint(a) == checkpoints.params_fingerprint(b)


def files(checkpoint: Path) -> list[str]:
    found = (p for p in checkpoint.rglob("*") if p.is_file())
    return sorted(p.relative_to(checkpoint).as_posix() for p in found)


def test_what_is_saved_is_restored_with_its_fingerprints(saved):
    state = make_state(4)
    restored, meta = Checkpoints(saved).restore(like())
    assert same(restored.params, state.params)
    assert same(restored.opt_state, state.opt_state)
    assert int(restored.step) == meta["step"] == 4
    assert meta["params_fingerprint"] == checkpoints.params_fingerprint(state.params)
    for name, params in state.params.items():
        found = checkpoints.load(saved, name)
        assert found.fingerprint == checkpoints.params_fingerprint(params)


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if not content:
        content = bytearray(b"?")
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(max(len(content), 1))])


def delete(path: Path, draw: random.Random) -> None:
    path.unlink()


def check_damaged(run: Path, name: str, caplog) -> None:
    """A file of step 4 is damaged: what all who read it do."""
    item = name.split("/")[0]
    step = run / "checkpoints" / "4"
    if item in ("policy", "meta"):
        with pytest.raises(damage.DamagedCheckpointError, match="damaged") as refused:
            checkpoints.load(run)
        assert str(step / name) in str(refused.value)
        assert "\n" not in str(refused.value)
        before = checkpoints.newest(run)
        assert same(before.params, make_state(2).params["policy"])
        with pytest.raises(damage.DamagedCheckpointError):
            checkpoints.newest(step)
    else:
        assert same(checkpoints.load(run).params, make_state(4).params["policy"])
    state = restore(run)
    if item in ("policy", "value", "state", "meta"):
        assert same(state.params, make_state(2).params)
        assert same(state.opt_state, make_state(2).opt_state)
        assert "going back to step 2" in caplog.text and name in caplog.text
        aside = step.with_name("4.damaged")
        assert aside.is_dir() and not step.exists()
    else:  # Orbax's notes about the whole are not read
        assert same(state.params, make_state(4).params)


# One file of each kind; the slow test takes them all.
KINDS = (
    "meta/metadata",
    "policy/_METADATA",
    "policy/ocdbt*/d/*",
    "state/manifest*",
    "value/ocdbt*/d/*",
)


@pytest.mark.parametrize("way", [flip, cut, delete])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_told_and_never_used(run, caplog, way, kind):
    step = run / "checkpoints" / "4"
    path = max(step.glob(kind), key=lambda p: p.stat().st_size)
    way(path, random.Random(0))
    check_damaged(run, path.relative_to(step).as_posix(), caplog)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_damage_to_any_file_is_told_and_never_used(saved, tmp_path, caplog, seed):
    draw = random.Random(seed)
    for name in files(saved / "checkpoints" / "4"):
        for way in (flip, cut, delete):
            run = shutil.copytree(saved, tmp_path / "run")
            path = run / "checkpoints" / "4" / name
            before = path.read_bytes()
            way(path, draw)
            if not path.exists() or path.read_bytes() != before:
                check_damaged(run, name, caplog)
            shutil.rmtree(run)
            caplog.clear()


def without_lists(run: Path) -> None:
    """As checkpoints were written before their files were listed."""
    for path in (run / "checkpoints").glob("*/meta/metadata"):
        meta = json.loads(path.read_text())
        path.write_text(
            json.dumps({k: meta[k] for k in meta if k not in damage.NEW_KEYS})
        )


def test_older_checkpoints_are_loaded_and_compared_by_their_parameters(run, caplog):
    without_lists(run)
    assert same(restore(run).params, make_state(4).params)
    step = run / "checkpoints" / "4"
    arrays = max(
        (step / "policy").glob("ocdbt*/d/*"), key=lambda path: path.stat().st_size
    )
    flip(arrays, random.Random(1))
    with pytest.raises(damage.DamagedCheckpointError, match="fingerprint|damaged"):
        checkpoints.load(run)
    assert same(restore(run).params, make_state(2).params)
    assert "going back to step 2" in caplog.text


@pytest.mark.parametrize("listed", [True, False])
def test_other_settings_are_no_damage(run, listed):
    if not listed:
        without_lists(run)
    other = dataclasses.replace(like(), opt_state={"nu": like().opt_state["mu"]})
    found = Checkpoints(run)
    with pytest.raises(ValueError, match="does not fit this model and optimizer"):
        found.restore(other)
    assert found.steps() == [2, 4] and found.set_aside == []


def test_a_read_that_fails_is_repeated_and_proves_nothing(run, monkeypatch):
    monkeypatch.setattr(damage, "_PAUSES", (0.0, 0.0))
    read, failures = damage.fingerprints.file_sha256, [OSError(errno.EIO, "no")] * 2

    def failing(path):
        if failures:
            raise failures.pop()
        return read(path)

    monkeypatch.setattr(damage.fingerprints, "file_sha256", failing)
    assert same(restore(run).params, make_state(4).params)
    arrays = checkpoints.read_item

    def stale(*arguments):
        if failures:
            raise failures.pop()
        return arrays(*arguments)

    monkeypatch.setattr(checkpoints, "read_item", stale)
    failures.append(OSError(errno.ESTALE, "Stale file handle"))
    assert same(restore(run).params, make_state(4).params)
    failures.extend([OSError(errno.EIO, "no")] * 99)
    with pytest.raises(OSError, match="no"):
        restore(run)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["2", "4"]


def test_where_none_is_intact_nothing_is_renamed(run):
    for step in ("2", "4"):
        (run / "checkpoints" / step / "meta" / "metadata").write_text("{")
    with pytest.raises(damage.DamagedCheckpointError, match="No checkpoint in .* is"):
        restore(run)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["2", "4"]
    with pytest.raises(damage.DamagedCheckpointError, match="meta/metadata is damaged"):
        checkpoints.newest(run)


def test_a_set_aside_checkpoint_is_never_written_over(run):
    (run / "checkpoints" / "4.damaged").mkdir()
    (run / "checkpoints" / "4" / "meta" / "metadata").write_text("{}")
    found = Checkpoints(run)
    found.restore(like())
    found.save(make_state(4), {**META, "step": 4})
    found.close()
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["2", "4", "4.damaged", "4.damaged-2"]
    assert same(restore(run).params, make_state(4).params)


def test_saving_goes_on_beside_training(tmp_path, monkeypatch):
    """`save` returns before anything is written; the state may be donated then."""
    found = Checkpoints(tmp_path)
    waits, told = [], []
    begin = found._manager.save
    monkeypatch.setattr(
        found._manager, "save", lambda *a, **k: (waits.pop()(), begin(*a, **k))
    )
    gate = threading.Event()
    waits.append(gate.wait)
    state = make_state(1)
    expected = checkpoints.params_fingerprint(state.params)
    overwrite = jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)
    found.save(state, {**META, "step": 1}, then=told.append)
    overwrite(state)
    assert not told and found.steps() == []
    gate.set()
    found.settle()
    assert [meta["params_fingerprint"] for meta in told] == [expected]
    restored, _ = Checkpoints(tmp_path).restore(like())
    assert checkpoints.params_fingerprint(restored.params) == expected


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "make room"),
        (ValueError("INTERNAL: [OS error 122: EDQUOT quota exceeded]"), "make room"),
        (PermissionError(errno.EACCES, "Permission denied"), "mend that"),
    ],
)
def test_a_failed_save_is_told_by_the_next_call(run, monkeypatch, error, advice):
    found = Checkpoints(run)

    def failing(*args, **kwargs):
        raise error

    monkeypatch.setattr(found._manager, "save", failing)
    found.save(make_state(6), {**META, "step": 6})
    with pytest.raises(CheckpointWriteError) as told:
        found.settle()
    said = str(told.value)
    assert "The checkpoint of step 6" in said and str(error) in said
    assert f"That of step 4 is intact: {advice}, then start" in said
    # An error of the loop may be its consequence: the cause is told.
    found.save(make_state(6), {**META, "step": 6})
    with pytest.raises(CheckpointWriteError), found:
        raise OSError("metrics cannot be written either")


def test_a_damaged_manifest_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text('{"step": 4')
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        run_directory.read_manifest(tmp_path)


@pytest.mark.parametrize("verb", ["score", "generate", "steer", "eval"])
def test_verbs_refuse_a_damaged_checkpoint_in_one_line(run, capsys, verb):
    step = run / "checkpoints" / "4"
    arrays = max((step / "policy").glob("ocdbt*/d/*"), key=lambda p: p.stat().st_size)
    flip(arrays, random.Random(1))
    prompts = run / "prompts.jsonl"
    prompts.write_text('{"prompt": "a", "completion": "b"}\n')
    data = "--data" if verb in ("score", "eval") else "--prompts"
    asked = [f"--checkpoint={step}", f"{data}={prompts}", f"--output={run / 'out'}"]
    more = ["--metrics=exact_match"] if verb == "eval" else []
    assert cli.main([verb, *asked, *more]) == 2
    said = capsys.readouterr().err
    said = next(x for x in said.splitlines() if x.startswith("DamagedCheckpointError:"))
    assert str(arrays) in said and "fingerprint" in said
    assert not (run / "out").exists()


def test_a_damaged_start_or_reference_is_refused(run, tmp_path):
    data = tiny_run.write_data(tmp_path / "data.jsonl")
    job = tiny_run.make_run(tmp_path / "next", data, tmp_path)
    ready = loop.setup(job)
    starts.load_network(str(run), "policy", ready)
    arrays = max(
        (run / "checkpoints" / "4" / "policy").glob("ocdbt*/d/*"),
        key=lambda path: path.stat().st_size,
    )
    flip(arrays, random.Random(1))
    with pytest.raises(damage.DamagedCheckpointError, match="fingerprint"):
        starts.load_network(str(run), "policy", ready)
    with pytest.raises(damage.DamagedCheckpointError, match="fingerprint"):
        checkpoints.verify(run)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"reward_stats": [1.0]}, r"reward_stats is \[1.0\], expected mean and"),
        ({"networks": None}, "it lacks 'networks'"),
        ({"main": 3}, "it lacks 'main'"),
        ({"format": 2, "networks": None}, "it lacks 'networks'"),
    ],
)
def test_an_older_meta_that_lacks_something_is_named(run, change, problem):
    without_lists(run)
    path = run / "checkpoints" / "4" / "meta" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(damage.DamagedCheckpointError, match=problem) as refused:
        checkpoints.load(run)
    assert str(path) in str(refused.value)
    assert checkpoints.newest(run).meta["step"] == 2
