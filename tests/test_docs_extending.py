"""docs/extending.md: its files, commands and Python do what the page says."""

from __future__ import annotations

import json
import pathlib
import re
import shlex
import sys

import pytest

from jaxalign import cli, models
from jaxalign.objectives.base import Step
from jaxalign.training import run_directory

TEXT = (pathlib.Path(__file__).parents[1] / "docs/extending.md").read_text()
SECTIONS = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
# A file is named in the line above its block; other blocks of Python are run, and so
# are indented commands.
FILE = re.compile(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```", re.M | re.S)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
COMMAND = re.compile(r"^    (jaxalign .*(?:\n {8}.*)*)", re.M)
# The network that a run has where none is named, as small as one can be, and what else
# makes a run a matter of seconds. The working folder comes before the package.
SMALL = """
from __gin__ import dynamic_registration
from jaxalign import models
from jaxalign import vocabularies
from jaxalign.training import sampling

include 'models/t5_1_1_base.gin'

models.T5Config:
  emb_dim = 16
  num_heads = 1
  head_dim = 8
  mlp_dim = 16
  num_encoder_layers = 1
  num_decoder_layers = 1
  vocab_size = 384
VOCABULARY = @vocabularies.ByteVocabulary()
vocabularies.ByteVocabulary.extra_ids = 125

TASK_FEATURE_LENGTHS = {'inputs': 16, 'targets': 8}
BATCH_SIZE = 8
sampling.Sampler.max_new_tokens = 2
sampling.Sampler.num_prompts = 2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All files of the page, in the working folder of a user who has nothing yet."""
    folder = tmp_path_factory.mktemp("extending")
    files = dict(FILE.findall(TEXT))
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "models").mkdir()
    (folder / "models" / "t5_1_1_tiny.gin").write_text(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder / "home"))
        patch.setattr(sys, "path", [p for p in sys.path if p])
        yield folder
    for name in files:
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.fixture(autouse=True)
def registries():
    """What the examples register reaches no other test."""
    yield
    from jaxalign.prepare import tasks

    tasks._TASKS.pop("quiz", None)
    if "seqio" in sys.modules:
        import seqio

        if "sums" in seqio.TaskRegistry.names():
            seqio.TaskRegistry.remove("sums")


def manifest(folder, name):
    return run_directory.read_manifest(folder / "runs" / name)


def trained_with_its_margin(folder):
    found = manifest(folder, "hinge")["identity"]["objective"]
    assert (found[""], found["margin"]) == ("my_objectives.SquaredHinge", 0.5)
    the_same_with_and_without_the_family()


def the_same_with_and_without_the_family():
    import jax
    import my_bare
    import my_objectives
    import objectives_cases as cases

    model = models.T5(cases.CONFIG)
    bare = my_bare.BareHinge(model)
    other = my_objectives.SquaredHinge(model, length_normalize=False)
    params = bare.init_params(jax.random.key(0))
    batch = cases.make_batch(cases.make_rows(4), prompts_per_row=2)
    found, expected = (o.loss(params, Step(batch)) for o in (bare, other))
    assert float(found.sums["pairs"]) == pytest.approx(float(expected.sums["pairs"]))
    assert found.sums["pairs"] > 0


def trained_with_its_share(folder):
    found = manifest(folder, "masked")["identity"]["augment"]
    assert found.startswith("masked(share=0.3) of ")


def kept_all_stages(folder):
    stages = manifest(folder, "sums")["stages"]
    assert {stage["status"] for stage in stages.values()} == {"finished"}
    demos = (folder / "runs/sums/demos.jsonl").read_text().splitlines()
    assert json.loads(demos[23]) == {"prompt": "2 plus 3", "completion": "5"}


# What a section has to have done, beside ending well.
DONE = {
    "An objective": trained_with_its_margin,
    "An augmentation": trained_with_its_share,
    "A study": kept_all_stages,
}


@pytest.mark.parametrize(
    "title, text",
    [
        pytest.param(*section, id=section[0], marks=[pytest.mark.slow] * (i > 1))
        for i, section in enumerate(SECTIONS)
    ],
)
def test_a_section_does_what_it_says(title, text, folder, capsys):
    for command in COMMAND.findall(text):
        _, verb, *flags = shlex.split(command.replace("\\\n", ""))
        flags = [re.sub(r"^--steps=\d+$", "--steps=2", flag) for flag in flags]
        status = cli.main([verb, *flags])
        assert status == 0, capsys.readouterr().err
    rest = FILE.sub("", text)
    for block in PYTHON.findall(rest):
        exec(compile(block, f"extending.md, {title}", "exec"), {})
    assert COMMAND.search(text) or PYTHON.search(rest), "nothing was run"
    if title in DONE:
        DONE[title](folder)
