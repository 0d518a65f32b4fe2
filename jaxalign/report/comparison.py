"""The page of a comparison: reward against KL, and who beats whom."""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.files import write_atomically
from jaxalign.report import style


def write(path: Path, results: Mapping[str, Any], *, steps: int, split: str) -> None:
    """Writes one self-contained HTML page of what `pipelines.compare.collect` returns.

    Raises:
      ImportError: without matplotlib, saying how to get it.
    """
    table, wins = results["objectives"], results["win_rates"]
    seeds = len(table["sft"]["reward"])
    parts = [
        "<h1>Objectives compared</h1>",
        f'<p class="sub">The embedded village, {seeds} seed{"s" * (seeds != 1)}, '
        f"{steps} steps of equally many responses each, {html.escape(split)} prompts, "
        "one sample each at temperature 1. Rewards are the village's own.</p>",
        "<h2>Reward against KL</h2>",
        "<p>KL is the mean log-ratio of a policy's samples to the supervised policy, "
        "in nats per response. Up and to the left is better. Large marks are means "
        "over seeds, small ones the seeds.</p>",
        _frontier(table),
        "<h2>Results</h2>",
        _table(table, wins),
        "<h2>Win rates</h2>",
        "<p>How often the row's objective beats the column's on the same prompt, in "
        "percent, ties counted half. Rows are sorted by reward.</p>",
        _matrix(table, wins),
    ]
    css = "figure img{max-width:100%;height:auto;background:#fff}"
    write_atomically(path, style.page("Objectives compared", "".join(parts), css))


def pyplot() -> Any:
    """Matplotlib's pyplot, drawing to files."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError(
            "The comparison's page is drawn with matplotlib, which is not installed: "
            "pip install 'jaxalign[plots]'. The numbers are in comparison.json."
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _figure(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight")
    pyplot().close(figure)
    # As an image, so that the page's style does not reach into it.
    data = base64.b64encode(text.getvalue().encode()).decode()
    return f'<figure><img alt="" src="data:image/svg+xml;base64,{data}"></figure>'


def _by_reward(table: Mapping[str, Any]) -> list[str]:
    return sorted(table, key=lambda name: -np.mean(table[name]["reward"]))


def _frontier(table: Mapping[str, Any]) -> str:
    figure, axes = pyplot().subplots(figsize=(13, 7))
    colours = pyplot().get_cmap("tab20")
    means = {}
    for i, name in enumerate(_by_reward(table)):
        row, colour = table[name], colours(i % 20)
        axes.plot(row["kl"], row["reward"], ".", color=colour, alpha=0.5, markersize=4)
        means[name] = np.mean(row["kl"]), np.mean(row["reward"])
        axes.plot(*means[name], "o", color=colour, markersize=7)
    # A policy that fell apart is far off; a logarithm keeps the others apart, and what
    # lies far below the supervised policy is named instead of drawn.
    floor = 0.9 * np.mean(table["sft"]["reward"])
    below = [name for name in table if np.mean(table[name]["reward"]) < floor]
    if below:
        axes.set_ylim(bottom=floor)
        axes.set_title(f"below the frame: {', '.join(below)}", fontsize=8)
    axes.set_xscale("symlog", linthresh=1.0)
    shown = [np.mean(row["kl"]) for n, row in table.items() if n not in below]
    axes.set_xlim(-0.05, 1.5 * max(shown) + 0.1)
    axes.set_xlabel("KL to the supervised policy, nats per response")
    axes.set_ylabel("true reward")
    axes.grid(alpha=0.3)
    _label(axes, {name: xy for name, xy in means.items() if name not in below})
    return _figure(figure)


def _label(axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Names the points, each where it covers neither a point nor another name."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    axes.figure.canvas.draw()
    renderer = axes.figure.canvas.get_renderer()
    pixels = axes.transData.transform(list(points.values()))
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in pixels]
    turns = np.linspace(0.0, 2 * np.pi, 16, endpoint=False)
    for name, xy in points.items():
        best, least, place = None, math.inf, None
        for radius, turn in itertools.product((8, 16, 28, 44, 64), turns):
            offset = radius * np.cos(turn), radius * np.sin(turn)
            text = axes.annotate(
                name,
                xy,
                offset,
                textcoords="offset points",
                fontsize=8,
                ha="left" if offset[0] >= -1e-6 else "right",
                va="center",
                arrowprops={"arrowstyle": "-", "lw": 0.5, "alpha": 0.5},
            )
            # The text alone: its line may cross what it likes.
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)
            both = filter(None, (Bbox.intersection(box, other) for other in taken))
            covered = sum(shared.width * shared.height for shared in both)
            if covered < least:
                text, best, least, place = best, text, covered, box
            if text:
                text.remove()
            if least == 0.0:
                break
        taken.append(place)


def _matrix(table: Mapping[str, Any], wins: Mapping[str, Any]) -> str:
    names = _by_reward(table)
    rates = np.array([[100 * wins[a].get(b, np.nan) for b in names] for a in names])
    size = 0.36 * len(names) + 1.5
    figure, axes = pyplot().subplots(figsize=(size, size))
    axes.imshow(rates, cmap="RdBu", vmin=0, vmax=100)
    for i, j in np.argwhere(np.isfinite(rates)):
        colour = "white" if abs(rates[i, j] - 50) > 35 else "black"
        place = {"ha": "center", "va": "center", "fontsize": 6}
        axes.text(j, i, f"{rates[i, j]:.0f}", color=colour, **place)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    return _figure(figure)


def _table(table: Mapping[str, Any], wins: Mapping[str, Any]) -> str:
    rows = []
    for name in _by_reward(table):
        cells = [html.escape(name)]
        for column, digits in (("reward", 3), ("kl", 2), ("tokens", 1)):
            values = table[name][column]
            text = f"{np.mean(values):.{digits}f}"
            if len(values) > 1:
                text += f" ± {np.std(values, ddof=1):.{digits}f}"
            cells.append(text)
        cells.insert(2, f"{wins[name]['sft']:.1%}" if name != "sft" else "–")
        rows.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    heads = ("objective", "true reward", "win rate vs SFT", "KL", "tokens")
    head = "".join(f"<th>{h}</th>" for h in heads)
    return style.table(head, rows)
