"""Bars and dots over a numbered axis, as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np

from jaxalign.report.charts import number, ticks

_WIDTH, _HEIGHT = 400, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 10, 30


class Plot:
    """One frame with a grid, to which bars and lines are added.

    Args:
      xs: limits of the horizontal axis.
      ys: limits of the vertical one.
      x_label: below the axis.
      title: for who cannot see it.
    """

    def __init__(
        self,
        xs: tuple[float, float],
        ys: tuple[float, float],
        *,
        x_label: str,
        title: str,
    ):
        (self._x0, self._x1), (self._y0, self._y1) = map(_wide, (xs, ys))
        self._title, self._body = title, []
        bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        for tick in ticks(self._y0, self._y1):
            y = self._y(tick)
            kind = "zero" if tick == 0 and self._y0 < 0 else "grid"
            self._body += [
                f'<line class="{kind}" x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}"/>',
                f'<text class="y" x="{_LEFT - 6}" y="{y + 3.5}">{number(tick)}</text>',
            ]
        for tick in ticks(self._x0, self._x1):
            x = self._x(tick)
            self._body.append(
                f'<text class="x" x="{x}" y="{bottom + 14}">{number(tick)}</text>'
            )
        middle = (_LEFT + right) / 2
        self._body.append(
            f'<text class="x" x="{middle}" y="{_HEIGHT - 3}">{html.escape(x_label)}'
            "</text>"
        )

    def _x(self, value: float) -> float:
        share = (value - self._x0) / (self._x1 - self._x0)
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def _y(self, value: float) -> float:
        share = (value - self._y0) / (self._y1 - self._y0)
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)

    def bars(
        self,
        edges: Sequence[float],
        heights: Sequence[float],
        colours: Sequence[int],
        notes: Sequence[str],
        base: Sequence[float] | None = None,
    ) -> Plot:
        """A bar between each two edges; `notes` are shown under the pointer."""
        base = [max(self._y0, 0.0)] * len(heights) if base is None else base
        for i, (height, colour, note) in enumerate(
            zip(heights, colours, notes, strict=True)
        ):
            if not math.isfinite(height):
                continue
            ends = sorted((self._y(base[i]), self._y(base[i] + height)))
            left, right = self._x(edges[i]), self._x(edges[i + 1])
            place = f'x="{left + 0.5:.1f}" y="{ends[0]}"'
            size = f'width="{max(right - left - 1, 0.5):.1f}"'
            size += f' height="{ends[1] - ends[0]:.1f}"'
            self._body.append(
                f'<rect class="bar c{colour}" {place} {size}>'
                f"<title>{html.escape(note)}</title></rect>"
            )
        return self

    def line(
        self, xs: Sequence[float], ys: Sequence[float], colour: int, dots: bool = True
    ) -> Plot:
        """Points in order; what is not finite is left out."""
        points = [
            (self._x(x), self._y(y))
            for x, y in zip(xs, ys, strict=True)
            if math.isfinite(y)
        ]
        path = " L".join(f"{x} {y}" for x, y in points)
        if points:
            self._body.append(f'<path class="line c{colour}" d="M{path}"/>')
        if dots:
            self._body += [
                f'<circle class="dot c{colour}" cx="{x}" cy="{y}" r="2.4"/>'
                for x, y in points
            ]
        return self

    def level(self, value: float) -> Plot:
        """A dashed horizontal line."""
        y = self._y(value)
        self._body.append(
            f'<line class="ideal" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" '
            f'y2="{y}"/>'
        )
        return self

    def svg(self) -> str:
        label = html.escape(self._title, quote=True)
        return (
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
            f"{''.join(self._body)}</svg>"
        )


def figure(plot: Plot, caption: str, note: str = "") -> str:
    """A plot with its caption."""
    small = f"<p>{html.escape(note)}</p>" if note else ""
    return (
        f"<figure><figcaption>{html.escape(caption)}</figcaption>{plot.svg()}{small}"
        "</figure>"
    )


def _wide(limits: tuple[float, float]) -> tuple[float, float]:
    low, high = map(float, np.asarray(limits, np.float64))
    return (low, high) if high > low else (low - 0.5, high + 0.5)
