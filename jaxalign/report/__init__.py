"""One self-contained HTML page about one or several runs.

The page needs no network and no plotting library: curves are small SVGs, the style
follows the reader's light or dark setting, and numbers appear under the pointer.
"""

from __future__ import annotations

import datetime
import html
import os
from collections.abc import Sequence
from pathlib import Path

from jaxalign import remote
from jaxalign.files import write_atomically
from jaxalign.report import curves, profile, results, samples, sections, style
from jaxalign.report import runs as run_files

__all__ = ["write_report"]


def write_report(run_dirs: Sequence[str | Path], output: str | Path | None = None):
    """Writes the report of the runs: settings, curves, calibration, samples, results.

    What a run lacks is named on the page; nothing but a missing directory is an error.
    ``results.json`` is taken from the folders given, from their runs and from the
    output's folder.

    Args:
      run_dirs: run directories, here or in a bucket, or folders of runs; ten runs have
        their own colour.
      output: the HTML file, which is returned; by default ``report.html`` in the
        directory given, or in the folder that holds them all.

    Raises:
      ValueError: without a run directory; without `output` for several of which some
        are in a bucket.
      FileNotFoundError: for a directory that does not exist, with the nearest.

    >>> write_report([])
    Traceback (most recent call last):
        ...
    ValueError: write_report: expected at least one run directory, got none.
    """
    if not run_dirs:
        raise ValueError("write_report: expected at least one run directory, got none.")
    if output is None and any(map(remote.is_remote, run_dirs)):
        if len(run_dirs) > 1:
            raise ValueError(
                "Some of these runs are in a bucket: say where the page of all goes, "
                "--output=FILE.html."
            )
        output = f"{os.fspath(run_dirs[0]).rstrip('/')}/report.html"
    given = [run_files.local(path) for path in run_dirs]
    paths = run_files.find(given)
    if output is None:
        common = os.path.commonpath([path.resolve() for path in given])
        output = Path(common) / "report.html"
    runs = run_files.load(paths)
    tables = run_files.results([*given, *paths, Path(output).parent])
    title = given[0].resolve().name if len(given) == 1 else f"{len(runs)} runs"
    with remote.writing(output) as file:
        write_atomically(file, _page(title, runs, tables))
    return output if remote.is_remote(output) else Path(output)


def _page(title: str, runs: list[run_files.Run], tables: list) -> str:
    now = datetime.datetime.now().astimezone()
    legend = "".join(map(sections.chip, runs))
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="sub">jaxalign report, {now:%-d %B %Y, %H:%M %Z}</p>',
        sections.headers(runs),
        _missing(runs),
    ]
    if tables:
        parts.append("<h2>Results</h2>")
        parts += [results.results_table(path, rows, runs) for path, rows in tables]
    parts.append(
        f'<h2>Curves</h2><div class="legend">{legend}<span class="how">solid: training '
        "· dashed: evaluation · faint: unsmoothed</span></div>"
    )
    parts.append(curves.curves(runs))
    last = curves.last_values(runs)
    if last:
        parts += ["<h2>Last values</h2>", last]
    where = profile.section(runs)
    if where:
        parts += ["<h2>Where a step's time goes</h2>", where]
    parts += ["<h2>Samples</h2>", samples.samples(runs)]
    parts += ["<h2>Settings</h2>", sections.runs_table(runs), sections.configs(runs)]
    return style.page(title, "".join(parts), script=True)


def _missing(runs: list[run_files.Run]) -> str:
    lines = "".join(
        f"<li><b>{html.escape(run.name)}</b>: "
        f"{html.escape('; '.join(dict.fromkeys(run.missing)))}</li>"
        for run in runs
        if run.missing
    )
    return lines and f'<div class="warn">Not all is here:<ul>{lines}</ul></div>'
