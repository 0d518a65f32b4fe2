"""The page of `jaxalign eval` about reward models: how far to trust their verdicts."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.report import style
from jaxalign.report.bars import Plot, figure
from jaxalign.report.charts import number, point_range, range_axis

Result = Mapping[str, Any]

_COLOURS = 10
_REST = 8  # the colour of what is no model


def page(result: Result) -> str:
    """The whole page; `result` is what `jaxalign.inference.reward_evaluation` says."""
    head = f"<h1>Reward models</h1><p>{html.escape(str(result.get('data', '')))}</p>"
    return style.page("Reward models", head + body(result))


def body(result: Result) -> str:
    """The sections of the page."""
    models = result["models"]
    parts = [
        f"<p>{result['pairs']:,} pairs. A tie is half right. Intervals are of 95%: "
        "Wilson's of accuracies, Student's of log-loss, over prompts.</p>",
        _summary(models),
        *_groups(models),
        "<h2>Calibration</h2>",
        '<p class="note">On the diagonal, the response that a model prefers is the '
        "labelled one as often as it is sure of it. A scale below 1 would mend a model "
        "that is too sure.</p>",
        f'<div class="grid">{_reliability(models)}{_tenths(models)}</div>',
        _best_of(result.get("best_of_n")),
        "<h2>What it should not care about</h2>",
        _length(models),
        _formats(models),
        _position(models),
        _agreement(result["agreement"]),
    ]
    return "".join(parts)


def _name(models: Sequence[str], name: str) -> str:
    """A model's name with its colour."""
    colour = list(models).index(name) % _COLOURS
    return f'<span class="key c{colour}"></span>{html.escape(name)}'


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else number(round(value, 6))


def _interval(one: Mapping[str, Any] | None, percent: bool = True) -> str:
    """``71.2% (68.0% to 74.1%)``."""
    if one is None or one["mean"] is None:
        return "-"
    spell = _percent if percent else _number
    low, high = one["ci95"]
    if low is None:
        return spell(one["mean"])
    return f"{spell(one['mean'])} <small>({spell(low)} to {spell(high)})</small>"


def _row(*cells: str) -> str:
    first, *rest = cells
    return (
        f"<tr><th>{first}</th>{''.join(f'<td class=num>{c}</td>' for c in rest)}</tr>"
    )


def _head(*names: str) -> str:
    return "".join(f"<th>{html.escape(name)}</th>" for name in names)


def _summary(models: Result) -> str:
    rows = []
    for name, one in models.items():
        left = f"{one['no_verdict']:,}" if one["no_verdict"] else "0"
        rows.append(
            _row(
                _name(models, name),
                _interval(one["accuracy"]),
                _interval(one["log_loss"], percent=False),
                _number(one["ece"]),
                _number(one["best_scale"]),
                f"{one['ties']:,}",
                left,
                _interval(one["length"]["baseline"]),
            )
        )
    head = _head(
        *("model", "accuracy", "log-loss (coin: 0.693)", "ECE", "best scale"),
        *("ties", "no verdict", "the longer one is chosen"),
    )
    return style.table(head, rows)


def _groups(models: Result) -> list[str]:
    fields = dict.fromkeys(f for one in models.values() for f in one["groups"])
    return [part for field in fields for part in _group(models, field)]


def _group(models: Result, field: str) -> list[str]:
    rows = []
    limits = (0.0, 1.0)
    for name, one in models.items():
        group = one["groups"].get(field, {"values": {}, "mean": None})
        for value, told in group["values"].items():
            accuracy = told["accuracy"]
            colour = list(models).index(name) % _COLOURS
            drawn = point_range(
                accuracy["mean"],
                tuple(accuracy["ci95"]),
                limits,
                colour=colour,
                baseline=0.5,
            )
            rows.append(
                f"<tr><th>{html.escape(value)}</th><td>{_name(models, name)}</td>"
                f"<td>{drawn}</td><td class=num>{_interval(accuracy)}</td>"
                f"<td class=num>{_interval(told['log_loss'], percent=False)}</td>"
                f"<td class=num>{told['pairs']:,}</td></tr>"
            )
        rows.append(
            f"<tr><th>mean of the values</th><td>{_name(models, name)}</td><td></td>"
            f"<td class=num>{_percent(group['mean'])}</td><td></td><td></td></tr>"
        )
    rows.append(f"<tr><td></td><td></td><td>{range_axis(limits)}</td></tr>")
    head = _head(field, "model", "", "accuracy", "log-loss", "pairs")
    return [f"<h2>By {html.escape(field)}</h2>", style.table(head, rows)]


def _reliability(models: Result) -> str:
    plot = Plot((0.5, 1.0), (0.0, 1.0), x_label="how sure", title="reliability")
    plot.line([0.5, 1.0], [0.5, 1.0], _REST, dots=False)
    for i, one in enumerate(models.values()):
        bins = one["reliability"]
        plot.line(bins["confidence"], bins["accuracy"], i % _COLOURS)
    return figure(plot, "How often right, by how sure")


def _tenths(models: Result) -> str:
    found = {
        i: one["strength_tenths"]
        for i, one in enumerate(models.values())
        if "strength_tenths" in one
    }
    if not found:
        return ""
    plot = Plot((0, 10), (0.0, 1.0), x_label="tenth by strength", title="by strength")
    plot.level(0.5)
    for i, tenths in found.items():
        heights = [float("nan") if v is None else v for v in tenths]
        plot.line([k + 0.5 for k in range(10)], heights, i % _COLOURS)
    return figure(
        plot,
        "Accuracy by the strength of the preference",
        "Strengths are those of `jaxalign preference_strength`.",
    )


def _best_of(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    models = found["models"]
    names = [name for name in models if name != "gold"]
    curves = [c for one in models.values() for c in one.values() if isinstance(c, dict)]
    low = min(0.0, *(v for c in curves for v in c["mean"]))
    high = max(v for c in curves for v in c["mean"])
    widest = max(curves[0]["kl"])
    out = [
        "<h2>Best of n</h2>",
        f'<p class="note">{found["pools"]:,} pools; {found["left_out"]:,} without a '
        "verdict on each response are left out. The mean over all subsets of n; the "
        "divergence is log n - (n - 1)/n. Scores are in deviations.</p>",
        '<div class="grid">',
    ]
    kinds = [("own", "What each model believes it gains")]
    if "gold" in models:
        kinds.append(("gold", "What the gold judge says that it gains"))
    for kind, caption in kinds:
        plot = Plot((0.0, widest), (low, high), x_label="KL, nats", title=caption)
        for i, name in enumerate(names):
            plot.line(
                models[name][kind]["kl"], models[name][kind]["mean"], i % _COLOURS
            )
        if "gold" in models:
            own = models["gold"]["own"]
            plot.line(own["kl"], own["mean"], _REST, dots=False)
        note = "Grey: choosing by the gold judge itself." * ("gold" in models)
        out.append(figure(plot, caption, note))
    out.append("</div>")
    if "gold" in models:
        rows = [
            _row(
                _name(names, name),
                f"{models[name]['peak']}",
                *(
                    _number(models[name]["gold"]["mean"][i])
                    + f" <small>({_number(models[name]['gold']['low'][i])} to "
                    f"{_number(models[name]['gold']['high'][i])})</small>"
                    for i in (
                        0,
                        models[name]["gold"]["n"].index(models[name]["peak"]),
                        -1,
                    )
                ),
            )
            for name in names
        ]
        last = curves[0]["n"][-1]
        head = _head(
            "model", "n of the most gold", "gold at 1", "at its peak", f"at {last}"
        )
        out.append(style.table(head, rows))
    return "".join(out)


def _length(models: Result) -> str:
    rows = [
        _row(
            _name(models, name),
            _interval(one["length"]["prefers_longer"]),
            _number(one["length"]["spearman"]),
            *(
                _interval(one["length"].get(side, {}).get("accuracy"))
                for side in ("longer", "shorter")
            ),
        )
        for name, one in models.items()
    ]
    head = _head(
        *("length", "prefers the longer one", "rank correlation with length"),
        *("right where the longer one is chosen", "where the shorter one is"),
    )
    return style.table(head, rows)


def _formats(models: Result) -> str:
    changes = dict.fromkeys(f for one in models.values() for f in one["formats"])
    rows = []
    for change in changes:
        for name, one in models.items():
            told = one["formats"][change]
            rate = None
            if told["flipped"] is not None:
                rate = {"mean": told["flipped"], "ci95": told["ci95"]}
            rows.append(
                f"<tr><th>{html.escape(change)}</th><td>{_name(models, name)}</td>"
                f"<td class=num>{_number(told['shift'])}</td>"
                f"<td class=num>{_interval(rate)}</td>"
                f"<td class=num>{told['pairs']:,}</td></tr>"
            )
    head = _head(
        *("rejected response changed", "model", "shift, in deviations"),
        *("right verdicts turned", "of"),
    )
    return style.table(head, rows)


def _position(models: Result) -> str:
    rows = [
        _row(_name(models, name), _interval(one["position"], percent=False))
        for name, one in models.items()
        if one["position"] is not None
    ]
    if not rows:
        return (
            '<p class="note">Models that score one response at a time have no bias for '
            "the place of a response.</p>"
        )
    return style.table(_head("place", "favours what stands first by"), rows)


def _agreement(pairs: Sequence[Mapping[str, Any]]) -> str:
    if not pairs:
        return ""
    rows = [
        _row(
            " and ".join(map(html.escape, one["models"])),
            _percent(one["same"]),
            _number(one["kappa"]),
            _number(one["spearman"]),
            f"{one['pairs']:,}",
        )
        for one in pairs
    ]
    head = _head("models", "same verdict", "kappa", "rank correlation", "pairs")
    return f"<h2>Agreement</h2>{style.table(head, rows)}"
