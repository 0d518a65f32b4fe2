"""The table of ``results.json``: a row a policy, with its interval drawn."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

from jaxalign.report import charts, style
from jaxalign.report.charts import number
from jaxalign.report.runs import Run

esc = html.escape

_OWN = {"true_reward", "ci95", "win_rate_vs_sft", "win_rate_ci95"}  # columns drawn


def results_table(path: Path, rows: dict[str, dict[str, Any]], runs: list[Run]) -> str:
    """The summary of ``results.json``, with a point range per row."""
    colours = {run.path.name: run.colour for run in runs}
    taken = set(colours.values())
    spare = [c for c in range(10) if c not in taken] or list(range(10))
    means = [_numeric(row.get("true_reward")) for row in rows.values()]
    limits = _limits(rows, means)
    columns = dict.fromkeys(k for row in rows.values() for k in row)
    extra = [k for k in columns if k not in _OWN]
    has_wins = "win_rate_vs_sft" in columns
    head = '<th>run</th><th class="num">true reward</th>'
    head += "<th>mean and 95% interval</th>" if limits else ""
    names = ["win rate vs SFT"] * has_wins + [esc(k.replace("_", " ")) for k in extra]
    head += "".join(f'<th class="num">{name}</th>' for name in names)
    body = []
    for i, ((name, row), mean) in enumerate(zip(rows.items(), means, strict=True)):
        colour = colours.get(name, spare[i % len(spare)])
        interval = _interval(row.get("ci95"))
        cells = f'<th scope="row"><i class="key c{colour}"></i>{esc(name)}</th>'
        cells += f'<td class="num">{_estimate(mean, interval, "{:.3f}")}</td>'
        if limits:
            picture = "—"
            if mean is not None:
                picture = charts.point_range(
                    mean, interval, limits, colour=colour, baseline=means[0]
                )
            cells += f"<td>{picture}</td>"
        wins = row.get("win_rate_vs_sft"), _interval(row.get("win_rate_ci95"))
        values = [_estimate(*wins, "{:.1f}", 100, "%")] * has_wins
        values += [_plain(row.get(k)) for k in extra]
        cells += "".join(f'<td class="num">{value}</td>' for value in values)
        body.append(f"<tr>{cells}</tr>")
    if limits:
        axis = f"<td></td><td></td><td>{charts.range_axis(limits)}</td>"
        after = "<td></td>" * len(names)
        body.append(f'<tr class="axis-row">{axis}{after}</tr>')
    return (
        f'<p class="note">From <code>{esc(path.parent.name)}/{path.name}</code>. The '
        f"dashed line is the mean of {esc(next(iter(rows)))}.</p>"
        + style.table(head, body, "results")
    )


def _limits(
    rows: dict[str, dict[str, Any]], means: list[float | None]
) -> tuple[float, float] | None:
    """The common axis of all means and intervals; None where no row has a mean."""
    ends = [mean for mean in means if mean is not None]
    if not ends:
        return None
    for row in rows.values():
        ends += _interval(row.get("ci95")) or ()
    pad = 0.06 * (max(ends) - min(ends)) or 0.5
    return min(ends) - pad, max(ends) + pad


def _numeric(value: Any) -> float | None:
    """A finite number; None for anything else."""
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    return value if fits and math.isfinite(value) else None


def _interval(value: Any) -> tuple[float, float] | None:
    if isinstance(value, list) and len(value) == 2 and None not in map(_numeric, value):
        return value[0], value[1]
    return None


def _estimate(
    value: Any,
    interval: tuple[float, float] | None,
    spelt: str,
    times: int = 1,
    unit: str = "",
) -> str:
    """A number with its interval."""
    mean = _numeric(value)
    if mean is None:
        return "—"
    text = spelt.format(times * mean) + unit
    if interval:
        low, high = (spelt.format(times * end) for end in interval)
        text += f" <small>[{low}, {high}]</small>"
    return text


def _plain(value: Any) -> str:
    if _numeric(value) is not None:
        return number(value)
    if _interval(value):
        return f"[{number(value[0])}, {number(value[1])}]"
    return "—" if value is None else esc(str(value))
