"""Documents name what there is."""

from __future__ import annotations

import pathlib
import re
import shlex

import numpy as np
import pytest

from jaxalign import cli, configs, objectives
from jaxalign.cli import flags

ROOT = pathlib.Path(__file__).parents[1]


def test_every_objective_has_a_gin_file_and_a_row_in_the_table():
    text = (ROOT / "docs" / "objectives.md").read_text()
    of_class = {}
    for path in (ROOT / "gin_configs" / "runs").glob("*.gin"):
        found = re.search(r"^OBJECTIVE = @objectives\.(\w+)", path.read_text(), re.M)
        if found:
            of_class[found[1]] = path.stem
    assert set(of_class) == set(objectives.OBJECTIVES)
    for name in set(of_class) - {"SFT"}:
        gin_file = of_class[name]
        assert f"| [`{gin_file}`](objectives/{gin_file}.md)" in text, name


@pytest.mark.parametrize("path", sorted((ROOT / "docs/objectives").glob("*.md")))
def test_a_page_of_an_objective_shows_its_settings_as_they_are(path):
    gin = (ROOT / "gin_configs" / "runs" / f"{path.stem}.gin").read_text()
    settings = dict(re.findall(r"^([A-Z_]+) = (.+?)(?:\s+#.*)?$", gin, re.M))
    assert settings.pop("OBJECTIVE").startswith("@objectives.")
    text = path.read_text()
    assert dict(re.findall(r"^\| `([A-Z_]+)` \| `(.+?)` \|", text, re.M)) == settings
    assert f"--gin_file=runs/{path.stem}.gin" in text
    tests = re.findall(r"`(tests/[\w/.]+)`", text)
    assert tests or "equivalences" in text
    for name in tests:
        assert (ROOT / name).exists(), name


DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def test_links_and_gin_files_in_documents_exist():
    for page in DOCUMENTS:
        text = page.read_text()
        for target in re.findall(r"\]\(((?!http)[^)]+)\)", text):
            name, _, anchor = target.partition("#")
            linked = page.parent / name if name else page
            assert linked.exists(), (page.name, target)
            assert not anchor or anchor in anchors(linked), (page.name, target)
        for name in re.findall(r"(?<!t5x/configs/)\bruns/(\w+)\.gin\b", text):
            path = ROOT / "gin_configs" / "runs" / f"{name}.gin"
            assert path.exists(), (page.name, name)


def anchors(page):
    """A page's headings as links spell them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


@pytest.mark.parametrize("page", ["architecture", "rules", "runs"])
def test_files_that_a_page_names_exist(page):
    """Modules and folders in backticks, of the checkout or of the package."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    names = re.findall(r"`((?:\w+/)+|(?:\w+/)*\w+\.(?:py|gin))`", text)
    names += re.findall(r"\((\w+/\w+\.py)\)", text)
    assert names
    for name in names:
        assert any((top / name).exists() for top in TOPS), (page, name)


TOPS = (ROOT, ROOT / "jaxalign", ROOT / "gin_configs")


def test_the_plan_of_the_house_fits_on_two_pages():
    lines = (ROOT / "docs/architecture.md").read_text().splitlines()
    assert len(lines) <= 115 and max(map(len, lines)) <= 100


OURS = ("adapters/", "models/", "runs/")
COMMAND = re.compile(r"(?:^(?:# )?|`)\s*(jaxalign \w+ [^`\n]*--\w+=[^`\n]*)", re.M)
PAGES = ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "gin_configs/runs/*.gin")


def commands():
    for page in (path for pattern in PAGES for path in ROOT.glob(pattern)):
        text = re.sub(r"\\\n\s*", "", page.read_text())
        for found in COMMAND.findall(text):
            yield pytest.param(found, id=f"{page.name}: {found[:50]}")


@pytest.mark.parametrize("command", [*commands()])
def test_command_lines_in_documents_are_understood(command):
    verb, *argv = shlex.split(re.sub(r"\[.*?\]", "", command), comments=True)[1:]
    gin = configs.parse_flags([word for word in argv if "..." not in word])
    groups = cli.parameters(cli.known_verbs()[verb])
    known = {n: p for group in groups.values() for n, p in group.items()}
    # A sentence may name a flag or two of a command.
    flags.parse(gin.rest, {n: p._replace(default=None) for n, p in known.items()})
    if gin.gin_files and all(name.startswith(OURS) for name in gin[0]):
        configs.check(gin.gin_files, gin.gin_bindings)


@pytest.mark.parametrize("page", ["decoding", "steering"])
def test_python_in_documents_runs(page, capsys):
    import jax

    from jaxalign import models, vocabularies

    vocabulary = vocabularies.ByteVocabulary(extra_ids=125)
    model = models.T5(models.T5Config(384, 16, 2, 8, 32, 1, 1))
    tokens = np.array([*vocabulary.encode("hello"), 1])
    namespace = {
        "vocabulary": vocabulary,
        "model": model,
        "params": models.init_params(model, jax.random.key(0)),
        "tokens": tokens,
        "prompts": tokens[None],
        "encoder_input_tokens": tokens[None],
        "texts": ["a cat", "a cap", "no"],
    }
    text = (ROOT / "docs" / f"{page}.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), namespace)
    if page == "steering":
        found = namespace["found"]
        lengths = np.asarray(found.lengths)[np.asarray(found.ended)]
        assert ((3 <= lengths) & (lengths <= 10)).all() and lengths.size


def test_rows_and_settings_in_the_page_of_data_are_read(tmp_path):
    """Every row it shows is a row of the schema of the command beneath it."""
    import json

    from jaxalign.data import chat_template, records, too_long

    text = (ROOT / "docs/data.md").read_text()
    shown = re.findall(r'^    (\{"(?:[^\n]|\n     )*\})$', text, re.M)
    rows = [json.loads(line) for line in shown]
    assert len(rows) == 8
    for row in rows:
        schema = "preference" if "chosen" in row else "supervised"
        schema = "trajectory" if {"label", "reward"} & set(row) else schema
        (found,) = records.examples([("data.md", 1, row)], schema)
        assert isinstance(found, records.Example), found
    for name in chat_template.TEMPLATES:
        assert f"`'{name}'`" in text
    cells = re.findall(r"^\| `TRUNCATE` (?:.*\n\| )*", text, re.M)
    values = re.findall(r"`([^`]*)`", "".join(cells).split("`ON_TOO_LONG`")[0])
    for value in set(values) - {"TRUNCATE", "None"}:
        too_long.check(eval(value), "truncate")
    assert len(values) >= 5
    for value in too_long.ON_TOO_LONG:
        assert f"`'{value}'` |" in text
