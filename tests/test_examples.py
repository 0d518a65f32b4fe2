"""Every script in examples/ runs as it stands, on the tiny network that it makes."""

from __future__ import annotations

import pathlib
import runpy
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "examples"
# What others import: no examples by themselves.
PARTS = {"tiny", "short_answers"}
LINES = 80


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working folder of somebody who has nothing yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("CHECKPOINT", "PAIRS", "THUMBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", [str(FOLDER), *(p for p in sys.path if p)])
    yield tmp_path
    sys.modules.pop("tiny", None)
    if "seqio" in sys.modules:
        import seqio

        if "example_sums" in seqio.TaskRegistry.names():
            seqio.TaskRegistry.remove("example_sums")


def aligned(found, folder):
    assert found["after"] > found["before"] and found["after"] > 0.9
    assert (folder / "runs/examples/dpo_hf/config.json").is_file()


def liked(found, folder):
    assert found["gains"]["Hi {}!"] > found["gains"]["Go away."]


def judged(found, folder):
    assert found["after"] > found["before"]


def summed(found, folder):
    ids = found["VOCABULARY"].encode("3 plus 4")
    policy = found["policy"]
    assert policy.network.vocabulary.encode("3 plus 4") == list(ids)
    assert policy.network.meta["step"] == 30


def planned(found, folder):
    assert 10 * 2**30 < found["needed"] < found["limit"] == 80 * 2**30
    assert found["plan"]["candidates"][0]["fits"]
    assert found["after"] > found["before"]
    assert (folder / "runs/examples/lora_peft/adapter_config.json").is_file()


# What an example has to have shown, beside ending well.
SHOWN = {
    "align_with_dpo": aligned,
    "dro_v_on_thumbs": liked,
    "lora_on_xl": planned,
    "reward_from_python": judged,
    "seqio_task": summed,
}


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_an_example_shows_what_it_says(name, folder):
    found = runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    SHOWN[name](found, folder)


def test_every_example_is_run_is_short_and_is_listed():
    scripts = {path.stem for path in FOLDER.glob("*.py")}
    assert scripts == set(SHOWN) | PARTS
    index = (FOLDER / "README.md").read_text()
    for name in scripts:
        assert f"[{name}.py]({name}.py)" in index
        assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= LINES
