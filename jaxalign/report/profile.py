"""Where a step's time goes, as one bar a run; of runs that traced some steps."""

from __future__ import annotations

import html
from collections.abc import Sequence

from jaxalign.report import style
from jaxalign.report.runs import Run

# A part has one colour, whatever its place.
_COLOURS = {"encoder": 0, "decoder": 2, "vocabulary": 1, "optimizer": 3}
_COLOURS |= {"reference": 5, "embedding": 7}
_OTHER = 8


def section(runs: Sequence[Run]) -> str:
    """The bars and their table; empty where no run has a profile."""
    return "".join(_run(run) for run in runs if run.profile.get("shares"))


def _run(run: Run) -> str:
    profile = run.profile
    first, last = profile["steps"]
    seconds = profile["seconds_per_step"]
    bar, rows = [], []
    for part, share in profile["shares"].items():
        colour = _COLOURS.get(part, _OTHER)
        name = html.escape(part)
        bar.append(
            f'<i class="c{colour}" style="flex:{share:.4f}" '
            f'title="{name} {share:.1%}"></i>'
        )
        rows.append(
            f'<tr><th scope="row"><i class="key c{colour}"></i>{name}</th>'
            f'<td class="num">{share:.1%}</td>'
            f'<td class="num">{1e3 * share * seconds:.1f} ms</td></tr>'
        )
    waiting = profile["input_seconds_per_step"]
    return (
        f'<h3>{html.escape(run.name)}</h3><p class="note">Steps {first} to {last}: '
        f"{1e3 * seconds:.1f} ms each, as traced. Shares are of the busy time; "
        f"waiting for the next batch took {1e3 * waiting:.1f} ms of the loop's.</p>"
        f'<div class="parts">{"".join(bar)}</div>' + style.table("", rows)
    )
