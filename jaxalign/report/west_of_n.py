"""What a page says of reward models that taught each other."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign.report import style
from jaxalign.report.bars import Plot, figure
from jaxalign.report.charts import number, point_range, range_axis

Row = Mapping[str, Any]

_SHOWN = 8  # pairs, the most and the least sure
_MAX_CHARACTERS = 600


def line(row: Row) -> str:
    """A model in one line, for the terminal."""
    name = f"round {row['round']}" if row["round"] else "base"
    accuracy = row["accuracy"]
    low, high = accuracy["ci95"]
    told = (
        f"{name}: {accuracy['mean']:.1%} of {row['pairs']} held-out pairs right "
        f"({low:.1%} to {high:.1%}), log-loss {row['log_loss']['mean']:.3f}"
    )
    if "became" in row:
        told += "; " + ", ".join(f"{k} {v:,}" for k, v in row["became"].items())
    return f"{told}: {row['model']}"


def body(
    table: Sequence[Row],
    pairs: Sequence[Row],
    pools: Sequence[Row],
    people: Sequence[Row],
) -> str:
    """The sections of the page.

    Args:
      table: a row a model, as in ``rounds.jsonl``.
      pairs: of the last round, those that were learnt from.
      pools: of the last round, all.
      people: the human pairs, to compare lengths with.
    """
    return "".join(
        [
            _models(table),
            "<h2>The last round's pairs</h2>",
            _lengths(pairs, people),
            f'<div class="grid">{_confidence(pairs)}{_likelihood(pairs)}'
            f"{_scores(pools)}</div>",
            _examples(pairs),
        ]
    )


def _models(table: Sequence[Row]) -> str:
    limits = (0.0, 1.0)
    rows = []
    for row in table:
        accuracy, loss = row["accuracy"], row["log_loss"]
        low, high = accuracy["ci95"]
        drawn = point_range(
            accuracy["mean"],
            (low, high),
            limits,
            colour=row["round"] % 10,
            baseline=0.5,
        )
        became = ", ".join(f"{k} {v:,}" for k, v in row.get("became", {}).items())
        name = f"round {row['round']}" if row["round"] else "base"
        rows.append(
            f"<tr><th>{name}</th><td>{drawn}</td><td class=num>{accuracy['mean']:.1%} "
            f"<small>({low:.1%} to {high:.1%})</small></td>"
            f"<td class=num>{loss['mean']:.3f}</td><td class=num>{row['ece']:.3f}</td>"
            f"<td>{html.escape(became)}</td></tr>"
        )
    rows.append(f"<tr><td></td><td>{range_axis(limits)}</td></tr>")
    head = "<th>model</th><th></th><th>held-out accuracy</th><th>log-loss</th>"
    head += "<th>ECE</th><th>what became of the pools</th>"
    note = (
        f"<p>{table[0]['pairs']:,} pairs of people are held out; no prompt of theirs "
        "was learnt from or sampled for. On pairs that a model chose itself its "
        "accuracy would say nothing.</p>"
    )
    return note + style.table(head, rows)


def _lengths(pairs: Sequence[Row], people: Sequence[Row]) -> str:
    (longer, gap), (theirs, their_gap) = map(_longer, (pairs, people))
    told = (
        f"{len(pairs):,} pairs. The longer response is the better one in {longer:.1%}, "
        f"of people's pairs in {theirs:.1%}; the better one has {gap:+.1f} characters "
        f"on average, in people's {their_gap:+.1f}. What lies between is what the "
        "reward model may exploit."
    )
    return f"<p>{html.escape(told)}</p>"


def _longer(pairs: Sequence[Row]) -> tuple[float, float]:
    """How often the chosen response is the longer one, and by how much on average."""
    gaps = [len(p["chosen"]) - len(p["rejected"]) for p in pairs]
    share = np.mean([(g > 0) + 0.5 * (g == 0) for g in gaps])
    return float(share), float(np.mean(gaps))


def _histogram(values: Sequence[float], caption: str, label: str, colour: int) -> str:
    low, high = float(np.min(values)), float(np.max(values))
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(values, 30, (low, high))
    plot = Plot((low, high), (0, float(counts.max())), x_label=label, title=caption)
    notes = [
        f"{number(a)} to {number(b)}: {n}"
        for a, b, n in zip(edges, edges[1:], counts, strict=False)
    ]
    plot.bars(edges, counts, [colour] * len(counts), notes)
    return figure(plot, caption)


def _confidence(pairs: Sequence[Row]) -> str:
    sure = [p["p_conf"] for p in pairs]
    return _histogram(sure, "How sure the labels are", "probability of the label", 0)


def _likelihood(pairs: Sequence[Row]) -> str:
    least = [min(p["logp_chosen"], p["logp_rejected"]) for p in pairs]
    label = "log-probability of the less likely response"
    return _histogram(least, "How usual the responses are", label, 2)


def _scores(pools: Sequence[Row]) -> str:
    """Whether longer responses of a pool score higher."""
    found = []
    for pool in pools:
        scores = pool.get("scores", ())
        lengths = [len(text) for text in pool["responses"]]
        if len(scores) > 2 and np.ptp(scores) > 0 and np.ptp(lengths) > 0:
            found.append(float(np.corrcoef(scores, lengths)[0, 1]))
    if not found:
        return ""
    caption = "Scores and lengths within a pool"
    return _histogram(found, caption, "correlation, a pool each", 1)


def _examples(pairs: Sequence[Row]) -> str:
    order = sorted(range(len(pairs)), key=lambda i: -pairs[i]["p_conf"])
    half = _SHOWN // 2
    shown = order if len(order) <= _SHOWN else [*order[:half], *order[-half:]]
    out = [f'<p class="note">The most and the least sure of {len(pairs):,} pairs.</p>']
    for i in shown:
        pair = pairs[i]
        sides = "".join(
            f'<div class="response c{colour}"><div class="who"><b>{side}</b></div>'
            f"{_text(pair[side])}</div>"
            for side, colour in (("chosen", 2), ("rejected", 4))
        )
        out.append(
            f'<article><div class="prompt"><h4>sure by {pair["p_conf"]:.3f}, of '
            f"{pair['n']} samples</h4>{_text(pair['prompt'])}</div>"
            f'<div class="responses">{sides}</div></article>'
        )
    return "".join(out)


def _text(text: str) -> str:
    shown = text[:_MAX_CHARACTERS].encode("utf-8", "replace").decode("utf-8")
    cut = " <em>…</em>" if len(text) > _MAX_CHARACTERS else ""
    return f'<div class="text" dir="auto">{html.escape(shown)}{cut}</div>'
