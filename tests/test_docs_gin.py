"""Gin files in documents parse and bind; papers' pages say where numbers are from."""

from __future__ import annotations

import pathlib
import re
import shlex

import pytest

from jaxalign import cli, configs, objectives
from jaxalign.cli import flags

ROOT = pathlib.Path(__file__).parents[1]
PAPERS = sorted((ROOT / "docs/papers").glob("*.md"))
FILE = re.compile(r"^`([\w.]+)`:\n\n```gin\n(.*?)^```", re.M | re.S)
COMMAND = re.compile(r"^(?:    )?(jaxalign .*(?:\n .*)*)", re.M)
MACRO = re.compile(r"^([A-Z_]+) = (.+?)(?:  #.*)?$", re.M)


@pytest.mark.parametrize("page", PAPERS, ids=lambda page: page.stem)
def test_the_settings_of_a_paper_make_a_run(page, tmp_path, monkeypatch):
    text = page.read_text()
    ((name, gin_text),) = FILE.findall(text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(gin_text)
    own = dict(MACRO.findall(gin_text))
    included = re.findall(r"^include '(.+)'", gin_text, re.M)
    if "runs/steer.gin" not in included:  # a verb's own macros are its flags
        known = configs.macros([*included, "models/t5_1_1_tiny.gin"])
        assert set(own) <= known, f"nothing reads {set(own) - known}"
    commands = COMMAND.findall(re.sub(r"\\\n\s*", "", text))
    asked = [parsed(command) for command in commands]
    verb, gin = next(both for both in asked if name in both[1].gin_files)
    if verb == "train":
        check_run(gin, own)


def parsed(command: str) -> tuple[str, configs.GinFlags]:
    """Verb and gin flags of a command; every flag of it is known and of its type."""
    _, verb, *argv = shlex.split(command)
    gin = configs.parse_flags(argv)
    known_verb = cli.known_verbs()[verb]
    groups = cli.parameters(known_verb)
    known = {n: p for group in groups.values() for n, p in group.items()}
    found = flags.parse(
        gin.rest, {n: p._replace(default=None) for n, p in known.items()}
    )
    assert all(name in known for name in found)
    defaults = ""
    if known_verb.macros:
        signature = cli.signatures.read(known_verb.function)
        defaults = cli._defaults(known_verb, signature.parameters)
    configs.check(gin.gin_files, gin.gin_bindings, defaults=defaults)
    return verb, gin


def check_run(gin: configs.GinFlags, macros: dict[str, str]) -> None:
    """The file binds: a run is made of it, and has the numbers that the page says."""
    from jaxalign.training import run as runs

    network = ["models/t5_1_1_tiny.gin"]
    configs.parse([*gin.gin_files, *network], [*gin.gin_bindings, "DATA = 'x.jsonl'"])
    run = runs.from_gin()
    objective = run.objective(model=run.model)
    assert isinstance(objective, objectives.Objective)
    steps = {"TRAIN_STEPS": run.train_steps, "BATCH_SIZE": run.dataset.batch_size}
    for name, value in steps.items():
        assert str(value) == macros.get(name, str(value))
    for name in ("beta", "tau", "gamma"):
        if name.upper() in macros:
            assert getattr(objective, name) == float(macros[name.upper()])


PAGES = [
    path
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if path not in PAPERS and path.name != "extending.md"  # which has its own test
]
BLOCKS = [
    pytest.param(block, id=f"{page.name}: {block.splitlines()[0][:40]}")
    for page in [*PAGES, ROOT / "README.md"]
    for block in re.findall(r"^```gin\n(.*?)^```", page.read_text(), re.M | re.S)
]


@pytest.mark.parametrize("block", BLOCKS)
def test_gin_in_other_documents_parses_and_sets_what_is_read(
    block, tmp_path, monkeypatch
):
    """Each block as a file, over a run of DPO where it names none itself."""
    monkeypatch.chdir(tmp_path)
    names = re.findall(r"^include '(.+)'", block, re.M)
    if any(name.startswith("t5x/") for name in names):
        pytest.importorskip("t5x", reason="the block includes a file of T5X")
    if not names:
        lines = block.splitlines(keepends=True)
        last = max((i for i, x in enumerate(lines, 1) if "import " in x), default=0)
        lines.insert(last, "include 'runs/dpo.gin'\n")
        block, names = "".join(lines), ["runs/dpo.gin"]
    pathlib.Path("block.gin").write_text(block)
    known = configs.macros([*names, "models/t5_1_1_tiny.gin"])
    read = set(re.findall(r"%(\w+)", block))
    assert set(dict(MACRO.findall(block))) <= known | read
    configs.parse(["block.gin"], ["DATA = 'x.jsonl'"])


def test_every_objective_with_a_paper_is_on_its_page():
    """What the index says a gin file is of has a page that names its objective."""
    index = (ROOT / "docs/paper_index.md").read_text()
    pages = re.findall(r"\(papers/(\w+\.md)\)", index)
    assert sorted(pages) == [page.name for page in PAPERS]
    of_runs = set(re.findall(r"`runs/(\w+)\.gin`", index))
    text = "".join(page.read_text() for page in PAPERS)
    for name in of_runs - {"steer"}:
        assert f"(../objectives/{name}.md)" in text, name


def test_each_page_says_where_its_numbers_are_from():
    for page in PAPERS:
        text = page.read_text()
        sources = re.search(r"^\| setting \| from \|\n(.*?)\n\n", text, re.M | re.S)[1]
        rows = [line for line in sources.splitlines() if "---" not in line]
        kinds = r"\| \*(paper|code|notes|library)\*[^|]*\|$"
        assert rows and all(re.search(kinds, row) for row in rows), page.name
        numbers = set(re.findall(r"arxiv\.org/abs/(\d{4}\.\d{5})", text))
        assert numbers, page.name
        index = (ROOT / "docs/paper_index.md").read_text()
        (line,) = [
            row for row in index.splitlines() if f"({'papers/' + page.name})" in row
        ]
        assert any(number in line for number in numbers), page.name
