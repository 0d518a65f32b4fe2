"""What a page says of preferences that were judged by an ensemble of reward models."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign.evaluation import intervals
from jaxalign.evaluation.strength import BANDS, CUTS, Strengths, auroc, deciles
from jaxalign.report import style
from jaxalign.report.bars import Plot, figure
from jaxalign.report.charts import number

_SHOWN = 20  # suspicious pairs
_COLOURS = (4, 1, 0, 2)  # of bands
_MAX_CHARACTERS = 3000


def body(
    rows: Sequence[Mapping[str, Any]],
    differences: np.ndarray,
    found: Strengths,
    *,
    held_out: bool | None,
    truth: np.ndarray | None = None,
) -> str:
    """The sections of the page.

    Args:
      rows: with ``prompt``, ``chosen``, ``rejected`` and ``action``.
      differences: ``[N, M]`` of the models.
      found: the strengths of those.
      held_out: whether each pair was scored by models that had not seen it; None: it
        is not known.
      truth: 1 where the label is known to be wrong, 0 where it is right, else NaN.
    """
    parts = [
        _summary(rows, differences, found, held_out, truth),
        "<h2>Strengths</h2>",
        _bands(rows, differences, found),
        f'<div class="grid">{_histogram(found)}{_deviations(found)}'
        f"{_deciles(differences, found, truth)}</div>",
        "<h2>Length and place</h2>",
        _length_note(rows, found),
        f'<div class="grid">{_lengths(rows, found)}{_places(found)}</div>',
        "<h2>The most suspicious pairs</h2>",
        _suspicious(rows, found),
    ]
    return "".join(parts)


def _summary(rows, differences, found, held_out, truth) -> str:
    count, models = differences.shape
    negative = intervals.wilson_interval(int((found.mean < 0).sum()), count)
    how = {
        True: "Each pair was scored by models that had not seen it.",
        False: "The models were trained on the pairs that they score (the paper's "
        "way): what they have memorised looks right.",
        None: "The scores came with the data.",
    }[held_out]
    lines = [
        f"{count:,} pairs, {models} models. {how}",
        f"{negative.mean:.1%} of the labels have a negative strength (95% interval "
        f"{negative.low:.1%} to {negative.high:.1%}): the models would have chosen the "
        "other response.",
    ]
    if truth is not None and not np.isnan(found_by := told_apart(found, truth)):
        wrong, known = int(np.nansum(truth)), int(np.isfinite(truth).sum())
        lines.append(
            f"{wrong:,} of {known:,} labels are known to be wrong; a low strength "
            f"finds them with an AUROC of {found_by:.3f}."
        )
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def told_apart(found: Strengths, truth: np.ndarray) -> float:
    """AUROC of low strengths for labels that are known to be wrong."""
    known = np.isfinite(truth)
    return auroc(-found.mean[known], truth[known] > 0)


def _bands(rows, differences, found) -> str:
    right = (differences > 0).mean(axis=1)
    out = []
    for i, name in enumerate(BANDS):
        inside = found.band == i
        done: dict[str, int] = {}
        for row, here in zip(rows, inside, strict=True):
            if here:
                done[row["action"]] = done.get(row["action"], 0) + 1
        told = ", ".join(f"{html.escape(k)} {v:,}" for k, v in sorted(done.items()))
        size = int(inside.sum())
        numbers = (
            f"{found.mean[inside].mean():.3f}</td><td class=num>"
            f"{found.deviation[inside].mean():.3f}</td><td class=num>"
            f"{right[inside].mean():.1%}"
            if size
            else "-</td><td class=num>-</td><td class=num>-"
        )
        out.append(
            f'<tr><th><span class="key c{_COLOURS[i]}"></span>{name}</th>'
            f"<td class=num>{size:,}</td><td class=num>{numbers}</td><td>{told}</td>"
            "</tr>"
        )
    head = "<th>band</th><th>pairs</th><th>strength</th><th>deviation</th>"
    head += "<th>models that agree</th><th>what is done</th>"
    return style.table(head, out)


def _histogram(found: Strengths) -> str:
    low, high = np.quantile(found.mean, (0.001, 0.999))
    edges = np.linspace(low, high, 41)
    inside = np.clip(found.mean, low, high)
    counts = [
        np.histogram(inside[found.band == i], edges)[0] for i in range(len(BANDS))
    ]
    total = np.sum(counts, axis=0)
    plot = Plot(
        (low, high), (0, float(total.max())), x_label="strength", title="strengths"
    )
    base = np.zeros(len(total))
    for i, heights in enumerate(counts):
        notes = [
            f"{number(a)} to {number(b)}: {n} {BANDS[i]}"
            for a, b, n in zip(edges, edges[1:], heights, strict=False)
        ]
        plot.bars(edges, heights, [_COLOURS[i]] * len(heights), notes, base)
        base = base + heights
    return figure(plot, "Pairs by strength, coloured by band")


def _deviations(found: Strengths) -> str:
    parts = 20
    spread = deciles(found.deviation, found.percentile, parts)
    centres = (np.arange(parts) + 0.5) / parts
    plot = Plot(
        (0, 1), (0, float(np.nanmax(spread))), x_label="percentile of the strength",
        title="deviation between models",
    )  # fmt: skip
    plot.line(centres, spread, 0)
    return figure(
        plot,
        "Deviation between the models",
        "The paper finds a U: models agree least on the weakest and the strongest.",
    )


def _deciles(differences, found, truth) -> str:
    right = deciles((differences > 0).mean(axis=1), found.percentile)
    plot = Plot((0, 10), (0, 1), x_label="tenth by strength", title="accuracy")
    edges = np.arange(11)
    colours = [_COLOURS[int(np.searchsorted(CUTS, (i + 0.5) / 10))] for i in range(10)]
    notes = [f"tenth {i + 1}: {value:.1%} agree" for i, value in enumerate(right)]
    plot.bars(edges, right, colours, notes).level(0.5)
    caption = "Models that agree with the label, by tenth"
    if truth is not None:
        known = np.isfinite(truth)
        correct = deciles(truth[known] == 0, found.percentile[known])
        plot.line(edges[:-1] + 0.5, correct, 9)
        caption += "; line: labels that are right"
    return figure(plot, caption)


def _gaps(rows) -> np.ndarray:
    return np.array([len(r["chosen"]) - len(r["rejected"]) for r in rows], np.float64)


def _length_note(rows, found) -> str:
    gap = _gaps(rows)
    longer = gap[gap != 0] > 0
    if not longer.size:
        return "<p>All pairs are equally long.</p>"
    share = intervals.wilson_interval(int(longer.sum()), len(longer))
    told = f"The longer response was chosen in {share.mean:.1%} of pairs "
    told += f"(95% interval {share.low:.1%} to {share.high:.1%})."
    if np.ptp(gap) and np.ptp(found.mean):
        told += (
            " Strength and the difference of lengths correlate by "
            f"{np.corrcoef(gap, found.mean)[0, 1]:.2f}."
        )
    return f"<p>{html.escape(told)}</p>"


def _lengths(rows, found) -> str:
    gap = _gaps(rows)
    if not np.ptp(gap):
        return ""
    edges = np.unique(np.quantile(gap, np.linspace(0, 1, 11)))
    of = np.clip(np.searchsorted(edges, gap, side="right") - 1, 0, len(edges) - 2)
    means = [found.mean[of == i].mean() for i in np.unique(of)]
    centres = [gap[of == i].mean() for i in np.unique(of)]
    low, high = min(0.0, *means), max(0.0, *means)
    plot = Plot(
        (min(centres), max(centres)), (low, high),
        x_label="characters, chosen minus rejected", title="strength by length",
    )  # fmt: skip
    plot.line(centres, means, 1)
    return figure(plot, "Mean strength by the difference of lengths")


def _places(found: Strengths) -> str:
    parts = min(20, len(found.mean))
    pieces = np.array_split(found.mean, parts)
    means = [piece.mean() for piece in pieces]
    low, high = min(0.0, *means), max(0.0, *means)
    plot = Plot(
        (0, 1), (low, high), x_label="place in the file", title="strength by place"
    )
    plot.line((np.arange(parts) + 0.5) / parts, means, 2)
    return figure(
        plot,
        "Mean strength along the file",
        "A step is a batch of labels from another hand.",
    )


def _suspicious(rows, found) -> str:
    order = np.argsort(found.mean, kind="stable")[:_SHOWN]
    out = [
        f'<p class="note">The {len(order)} pairs of the lowest strength, of '
        f"{len(rows):,}.</p>"
    ]
    for i in order:
        row = rows[i]
        facts = (
            f"row {i + 1} · strength {number(float(found.mean[i]))} ± "
            f"{number(float(found.deviation[i]))} · {row['action']}"
        )
        sides = "".join(
            f'<div class="response c{colour}"><div class="who"><b>{side}</b></div>'
            f"{_text(row[side])}</div>"
            for side, colour in (("chosen", 2), ("rejected", 4))
        )
        out.append(
            f'<article><div class="prompt"><h4>{html.escape(facts)}</h4>'
            f'{_text(row["prompt"])}</div><div class="responses">{sides}</div>'
            "</article>"
        )
    return "".join(out)


def _text(text: str) -> str:
    cut = " <em>…</em>" if len(text) > _MAX_CHARACTERS else ""
    shown = text[:_MAX_CHARACTERS].encode("utf-8", "replace").decode("utf-8")
    return f'<div class="text" dir="auto">{html.escape(shown)}{cut}</div>'
