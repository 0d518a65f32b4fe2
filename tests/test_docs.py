"""Documents name what there is."""

from __future__ import annotations

import pathlib
import re

from jaxalign import objectives

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
        assert f"| `{of_class[name]}`" in text, name


def test_links_and_gin_files_in_documents_exist():
    for page in (ROOT / "docs").glob("*.md"):
        text = page.read_text()
        for target in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
            assert (page.parent / target).exists(), (page.name, target)
        for name in re.findall(r"\bruns/(\w+)\.gin\b", text):
            path = ROOT / "gin_configs" / "runs" / f"{name}.gin"
            assert path.exists(), (page.name, name)
