"""The site's pages: laid out without sphinx, and built by it without a warning."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

from jaxalign import objectives

ROOT = pathlib.Path(__file__).parents[1]


def load(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location("jaxalign_docs_stage", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stage = load(ROOT / "docs/site/stage.py")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "source"
    return folder, stage.stage(folder)


def test_every_objective_has_a_page_with_its_class_and_its_papers(source):
    _, texts = source
    pages = stage.objectives()
    assert set(pages.values()) == set(objectives.OBJECTIVES)
    for name, class_name in pages.items():
        text = texts[f"objectives/{name}.md"]
        assert f".. autoclass:: jaxalign.objectives.{class_name}\n" in text
        assert f"--gin_file=runs/{name}.gin" in text
    assert (
        "[DRO (Richemond et al. 2024)](../papers/dro.md)"
        in texts["objectives/dro_v.md"]
    )


def test_an_objective_that_nobody_wrote_a_page_of_has_one(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    for path in stage.RUNS.glob("*.gin"):
        (tmp_path / "runs" / path.name).write_text(path.read_text())
    (tmp_path / "runs/mine.gin").write_text(
        "# A loss of mine on {'prompt', 'completion'} rows.\n"
        "# It has one number.\n"
        "from __gin__ import dynamic_registration\n\n"
        "include 'runs/train.gin'\n\n"
        "OBJECTIVE = @objectives.DPO\n"
        "MINE = 0.5  # of each response | or two\n"
    )
    monkeypatch.setattr(stage, "RUNS", tmp_path / "runs")
    text = stage.stage(tmp_path / "source")["objectives/mine.md"]
    assert text.startswith(
        "# DPO\n\nA loss of mine on {'prompt', 'completion'} rows. It has one number.\n"
    )
    assert "| `MINE` | `0.5` | of each response \\| or two |" in text
    assert "--gin_file=runs/mine.gin" in text and "autoclass" in text


def test_settings_of_every_run_are_those_of_train_gin(source):
    _, texts = source
    shown = dict(
        re.findall(r"^\| `([A-Z_]+)` \| `(.+?)` \|", texts["settings.md"], re.M)
    )
    assert shown["BATCH_SIZE"] == "32" and shown["PACKING"] == "2"
    # What docstrings say of the parameters that take them, and of plain flags.
    assert "| `0.05` | of the prompts, held out where" in texts["settings.md"]
    assert "| `1e-3` | the schedule's peak |" in texts["settings.md"]
    assert (
        "| `EVAL_PERIOD` | `200` | steps between evaluations. |" in texts["settings.md"]
    )
    gin = (ROOT / "gin_configs/runs/train.gin").read_text()
    assert set(shown) == set(re.findall(r"^([A-Z][A-Z_]*) = ", gin, re.M))


def test_links_lead_to_pages_of_the_site(source):
    folder, texts = source
    count = 0
    for page, text in texts.items():
        for target in re.findall(
            r"\]\(([^)\s]+)\)", re.sub(r"(?s)```.*?```", "", text)
        ):
            if re.match(r"[a-z]+:|#", target):
                continue
            name = target.partition("#")[0]
            assert ((folder / page).parent / name).is_file(), (page, target)
            count += 1
    assert count > 100


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[faults.md](faults.md#names)",
            "[What you may see, and what it means](faults.md#names)",
        ),
        ("[../README.md](../README.md)", "[Overview](overview.md)"),
        ("[a](../README.md#your-own-data)", "[a](overview.md#your-own-data)"),
        ("[a](runs.md), [b](https://x.org)", "[a](runs.md), [b](https://x.org)"),
        ("[`losses`](../jaxalign/losses)", "[`losses`](api/losses.md)"),
        ("[s](../jaxalign/training/symptoms.py)", "[s](api/training.md)"),
        ("[runs](../gin_configs/runs)", "runs"),
        ("`x[0](y)` and\n```\n[a](b)\n```\n", "`x[0](y)` and\n```\n[a](b)\n```\n"),
        ("![a](images/quickstart.png)", "![a](images/quickstart.png)"),
    ],
)
def test_links_are_led(text, expected):
    assert stage.led(text, "docs/data.md", stage.pages()) == expected


def test_every_page_is_in_the_sidebar_once(source):
    _, texts = source
    trees = texts["index.md"].split("```{toctree}", 1)[1]
    listed = re.findall(r"^(?:\w+ <)?([\w/]+)>?$", trees, re.M)
    top = {p.removesuffix(".md") for p in texts if "/" not in p} - {"index"}
    assert sorted(listed) == sorted(top | {"api/index"})


def test_public_names_of_each_room_are_shown(source):
    _, texts = source
    for room in ("losses", "models", "judges", "decoding", "data"):
        assert (
            f".. automodule:: jaxalign.{room}\n   :members:" in texts[f"api/{room}.md"]
        )
    assert "jaxalign.inference.policy" in texts["api/inference.md"]


@pytest.mark.slow
def test_the_site_is_built_without_warnings(source, tmp_path):
    folder, texts = source
    command = ["-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [sys.executable, *command, "-c", ROOT / "docs/site", folder, tmp_path / "html"],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    for page in texts:
        assert (tmp_path / "html" / page).with_suffix(".html").is_file()
