"""Stages that know what they depend on, killed in each of them."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
from pathlib import Path

import little_study
import pytest
import tiny_run

from jaxalign.pipelines.study import Study
from jaxalign.training import run_directory


def test_a_study_killed_in_every_stage_ends_as_one_that_was_not(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", little_study.__file__, str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ended"] == [-signal.SIGKILL] * len(little_study.MOMENTS)
    assert [line.split(": ")[1] for line in found["told"][:3]] == ["kept"] * 3
    verdicts = (tmp_path / "verdicts.jsonl").read_text()
    assert found["before"].count("\n") == 4
    assert verdicts.startswith(found["before"])  # no verdict was asked for again
    assert [int(float(line)) for line in verdicts.split()] == list(range(6))
    total = sum(map(float, verdicts.split()))
    assert json.loads((tmp_path / "total.json").read_text()) == total
    page = (tmp_path / "study.html").read_text()
    assert "deep/last.txt" in page and "Four stages." in page


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    little_study.run(str(folder), say=None)
    return folder


def one(folder: Path, name: str, function, **inputs) -> Path:
    with Study(folder, say=None) as study:
        return study.file(name, function, **inputs)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_another_setting_is_refused_and_named(finished):
    before = everything(finished)
    with pytest.raises(
        ValueError, match=r"number=6 .now number=7.*--redo=numbers\.txt"
    ):
        little_study.run(str(finished), 7, say=None)
    assert everything(finished) == before


def test_another_function_is_refused(finished):
    def write(output, number):
        output.write_text("other")

    with pytest.raises(ValueError, match="function's (source|values)="):
        one(finished, "numbers.txt", write, number=6)


def test_what_a_function_holds_and_how_its_arguments_are_called_count(tmp_path):
    def save(output, source, suffix=""):
        output.write_text(source("a") + suffix)

    def made(suffix):
        return lambda text: text + suffix

    def run(name, function, **settings):
        partial = functools.partial(save, **settings)
        return one(tmp_path, name, partial, source=function)

    assert run("a", made("b"), suffix="c").read_text() == "abc"
    assert run("a", made("b"), suffix="c").read_text() == "abc"
    with pytest.raises(ValueError, match="source: function's values="):
        run("a", made("d"), suffix="c")
    with pytest.raises(ValueError, match="partial's arguments="):
        run("a", made("b"), suffix="d")


def test_what_has_a_fingerprint_counts_by_it(tmp_path):
    class Teacher:
        def __init__(self, fingerprint):
            self.fingerprint = fingerprint

    def save(output, teacher):
        output.write_text("text")

    one(tmp_path, "a", save, teacher=Teacher("x"))
    one(tmp_path, "a", save, teacher=Teacher("x"))
    with pytest.raises(ValueError, match="teacher: function's fingerprint="):
        one(tmp_path, "a", save, teacher=Teacher("y"))


def test_an_output_that_was_edited_is_refused(tmp_path):
    little_study.run(str(tmp_path), say=None)
    (tmp_path / "total.json").write_text("7")
    with pytest.raises(ValueError, match="no longer what the stage 'total.json' made"):
        little_study.run(str(tmp_path), say=None)


def test_redo_makes_a_stage_again_and_what_follows(tmp_path):
    little_study.run(str(tmp_path), say=None)
    old = (tmp_path / "deep" / "last.txt").read_text()
    told: list[str] = []
    little_study.run(str(tmp_path), redo=("verdicts.jsonl",), say=told.append)
    assert told[0] == "[1] numbers.txt: kept"
    assert [line.split(": ")[1] for line in told[1::2]] == ["begins"] * 3
    assert (tmp_path / "deep" / "last.txt").read_text() != old
    # Another setting may come with it.
    little_study.run(str(tmp_path), 3, redo=("numbers.txt",), say=None)
    assert (tmp_path / "verdicts.jsonl").read_text().count("\n") == 3


def test_redo_of_an_unknown_stage_names_the_nearest(finished):
    with pytest.raises(ValueError, match="Did you mean 'verdicts.jsonl'"):
        little_study.run(str(finished), redo=("verdict",), say=None)


def test_a_stage_that_failed_may_be_given_other_inputs(tmp_path):
    def fails(output, number):
        if number == 1:
            raise RuntimeError("no")
        output.write_text(str(number))

    with pytest.raises(RuntimeError):
        one(tmp_path, "a.txt", fails, number=1)
    assert one(tmp_path, "a.txt", fails, number=2).read_text() == "2"


def test_training_is_a_stage(tmp_path):
    data = tiny_run.write_data(tmp_path / "data.jsonl")
    settings = {
        "DATA": data,
        "CACHE_DIR": str(tmp_path / "cache"),
        "TASK_FEATURE_LENGTHS": {"inputs": 12, "targets": 12},
        "TRAIN_STEPS": 2,
        "BATCH_SIZE": 8,
    }
    gin = tmp_path / "net.gin"
    gin.write_text(
        "models.T5Config.emb_dim = 16\nmodels.T5Config.num_heads = 2\n"
        "models.T5Config.mlp_dim = 32\nmodels.T5Config.num_encoder_layers = 1\n"
        "models.T5Config.num_decoder_layers = 1\nrun.Run.sampler = None\n"
    )

    def train(**changes):
        told: list[str] = []
        with Study(tmp_path / "study", say=told.append) as study:
            files = ["runs/sft.gin", str(gin)]
            path = study.train("sft", files, **settings, **changes)
            study.page("One run")
        return path, told

    path, told = train()
    assert told[0] == "[1] sft: begins"
    assert told[1].startswith("$ jaxalign train --gin_file=runs/sft.gin --gin_file=")
    assert run_directory.read_manifest(path)["status"] == "finished"
    assert train() == (path, ["[1] sft: kept"])
    settings["TRAIN_STEPS"] = 3
    with pytest.raises(ValueError, match="TRAIN_STEPS=2 .now TRAIN_STEPS=3"):
        train()
    settings["TRAIN_STEPS"] = 2
    with open(data, "a") as file:  # a file counts by its content
        file.write(data.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="DATA="):
        train()
