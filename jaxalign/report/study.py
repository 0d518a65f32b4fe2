"""The page of a study: what it found, every stage with its inputs, its runs' curves."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxalign.files import write_atomically
from jaxalign.report import curves, runs, sections, style


def write(
    folder: Path, title: str, stages: Mapping[str, Mapping[str, Any]], body: str = ""
) -> Path:
    """Writes ``study.html``: `body`, the manifest's `stages`, their runs' curves."""
    found = [folder / name for name in stages if (folder / name).is_dir()]
    trained = runs.load(found)
    parts = [f"<h1>{html.escape(title)}</h1>", body, "<h2>Stages</h2>", _table(stages)]
    if trained:
        legend = "".join(map(sections.chip, trained))
        parts += [
            f'<h2>Curves</h2><div class="legend">{legend}</div>',
            curves.curves(trained),
            "<h2>Settings</h2>",
            sections.runs_table(trained),
        ]
    path = folder / "study.html"
    write_atomically(path, style.page(title, "".join(parts), script=True))
    return path


def _table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, entry in stages.items():
        inputs = "<br>".join(
            f"<b>{html.escape(k)}</b> {html.escape(_short(v))}"
            for k, v in entry["key"].items()
        )
        took = f"{entry['seconds']:.1f} s" if "seconds" in entry else entry["status"]
        rows.append(
            f"<tr><th>{html.escape(name)}</th><td>{took}</td><td><details><summary>"
            f"{len(entry['key'])} inputs</summary>{inputs}</details></td></tr>"
        )
    return style.table("<th>stage</th><th>time</th><th>depends on</th>", rows)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
