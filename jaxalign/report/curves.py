"""Curves of every metric, in groups, and a table of the last values."""

from __future__ import annotations

import html
import re

import numpy as np

from jaxalign.report import charts, style
from jaxalign.report.charts import number
from jaxalign.report.runs import Run
from jaxalign.report.sections import key

esc = html.escape


_REWARDS = ("accuracies", "chosen", "rejected", "mean")
# Titles with their notes, and full matches of names without train/ or eval/. A metric
# goes to the first group that matches it; the order within one is the patterns'.
_GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Loss": (
        "What was minimised.",
        ("loss", "objective", "loss/.*", "nll.*", ".*perplexity", "accuracy.*"),
    ),
    "Rewards": (
        "Implied rewards β·log(π/π_ref), as in TRL; margins are chosen minus rejected.",
        ("rewards/margins.*", *(f"rewards/{x}" for x in _REWARDS)),
    ),
    "Distance from the reference policy": (
        "Log-ratios log(π/π_ref) of the data's responses, in nats: negative where the "
        "policy finds them less likely. Chosen ones may fall while margins grow.",
        ("log_ratios/mean", "log_ratios.*", "reference_point.*", "logps.*"),
    ),
    "Value network": (
        "In units of the (standardised) reward.",
        ("value/correlation", "value/mean", "value/std", "value/.*"),
    ),
    "Optimisation and speed": (
        "Gradient norms are taken before clipping.",
        ("learning_rate.*", "grad_norm.*", "tokens_per_second", "steps_per_second"),
    ),
}

_NATS = ("log_ratios/mean", "log_ratios/chosen", "log_ratios/rejected")
_NATS += ("reference_point", "reference_point/unclamped")
_NATS += ("logps", "logps/chosen", "logps/rejected")
_UNITS = dict.fromkeys(_NATS, "nats") | {
    "log_ratios/token": "nats per token",
    "tokens_per_second": "tokens/s",
    "steps_per_second": "steps/s",
    "rewards/accuracies": "share of pairs",
    "accuracy": "share of tokens",
}


def split_name(name: str) -> tuple[str, str]:
    """``"eval/loss"`` to ``("eval", "loss")``; without a prefix it is training's."""
    split, _, rest = name.partition("/")
    return (split, rest) if split in ("train", "eval") and rest else ("train", name)


def curves(runs: list[Run]) -> str:
    """Every metric of every run, one chart a metric, in groups."""
    names = sorted({split_name(n)[1] for run in runs for n in run.metrics} - {"time"})
    out = ""
    for title, (note, patterns) in _GROUPS.items():
        panels = []
        for pattern in patterns:
            members = [name for name in names if re.fullmatch(pattern, name)]
            panels += [_panel(runs, name) for name in members]
            names = [name for name in names if name not in members]
        if title == "Value network":
            panels.append(_calibration(runs))
        if grid := "".join(panels):
            out += f"<h3>{title}</h3><p class='note'>{note}</p>"
            out += f'<div class="grid">{grid}</div>'
    panels = [p for p in (_panel(runs, name) for name in names) if p]
    if panels:
        out += f"<details class='more'><summary>{len(panels)} more metrics</summary>"
        out += f'<div class="grid">{"".join(panels)}</div></details>'
    return out or "<p>No run has recorded a metric yet.</p>"


def _panel(runs: list[Run], name: str) -> str:
    series: list[charts.Series] = []
    having: dict[str, None] = {}
    for run in runs:
        for full, points in run.metrics.items():
            split, base = split_name(full)
            if base == name and len(points[0]):
                having[run.name], dashed = None, split == "eval"
                label = run.name + " (eval)" * dashed
                series.append(charts.Series(label, run.colour, *points, dashed))
    unit = f" <small>{esc(_UNITS[name])}</small>" if name in _UNITS else ""
    title = f"<figcaption><b>{esc(name)}</b>{unit}"
    if not any(np.isfinite(s.values).any() for s in series):
        if not series:
            return ""
        return f"<figure>{title}</figcaption><p>never finite</p></figure>"
    svg, notes = charts.line_chart(
        series,
        title=name,
        unit_interval="accurac" in name,
        smoothing=not name.startswith("learning_rate"),
    )
    if len(having) < len(runs):
        notes.insert(0, "only " + ", ".join(having))
    note = f'<p class="caption">{esc("; ".join(notes))}</p>' if notes else ""
    return f"<figure>{title}</figcaption>{svg}{note}</figure>"


def _calibration(runs: list[Run]) -> str:
    groups = [(r.name, r.colour, r.calibration) for r in runs if r.calibration]
    if not groups:
        return ""
    note = (
        "What the value is trained on, the reward less τ times the log-ratio, in bins "
        "of the predicted value; dashed: calibrated."
    )
    if len(groups) < len(runs):
        note += " Only " + ", ".join(name for name, *_ in groups) + "."
    return (
        "<figure><figcaption><b>value calibration</b> "
        "<small>mean of r − τ log(π/π_ref)</small>"
        f"</figcaption>{charts.calibration_chart(groups)}"
        f'<p class="caption">{esc(note)}</p></figure>'
    )


_LAST = (
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins"),
    *("rewards/accuracies", "log_ratios/mean", "value/mean", "value/std"),
    *("value/correlation", "grad_norm", "tokens_per_second"),
)


def last_values(runs: list[Run]) -> str:
    """The last value of the main metrics, training and evaluation apart."""
    rows = []
    for name in _LAST:
        for split in ("train", "eval"):
            values = [_last(run, split, name) for run in runs]
            if any(v is not None for v in values):
                cells = "".join(
                    f'<td class="num">{"—" if v is None else number(v)}</td>'
                    for v in values
                )
                head = f'<th scope="row">{name} <small>{split}</small></th>'
                rows.append(f"<tr>{head}{cells}</tr>")
    if not rows:
        return ""
    head = "".join(f'<th scope="col" class="num">{key(run)}</th>' for run in runs)
    return (
        '<p class="note">Training values are the last tenth\'s mean, evaluation values '
        "the last evaluation's.</p>" + style.table(f"<th></th>{head}", rows)
    )


def _last(run: Run, split: str, name: str) -> float | None:
    for full, (_, values) in run.metrics.items():
        if split_name(full) == (split, name) and len(values):
            if split == "eval":
                return float(values[-1])
            return float(np.mean(values[-max(len(values) // 10, 1) :]))
    return None
