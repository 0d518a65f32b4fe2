"""Small SVG charts as text: curves, point ranges, calibration.

Charts carry no colours of their own: a series names one of ten CSS classes ``c0 ..
c9``, so that a page can be light or dark. Sizes are in CSS pixels of a chart shown at
its natural width; text shrinks with it.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

WIDTH, HEIGHT = 400, 220
_RANGE_WIDTH = 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 10, 26
_CHARACTER = 6.2  # of the axes' text, at most on average: 11 pixels high

# Points drawn for one curve: about what its width in pixels can show.
_BUCKETS = 180
# From here on a curve gets a smoothed line over its faint points.
_SMOOTH_FROM = 60


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve."""

    label: str  # for the readout, plain text
    colour: int  # 0-9
    steps: np.ndarray  # x, ascending
    values: np.ndarray  # y; non-finite ones are gaps, marked on the axis
    dashed: bool = False  # drawn dashed with its points, as evaluation is


def number(value: float) -> str:
    """Formats for reading: ``12.3k``, ``0.001``, ``2e-05``.

    >>> [number(x) for x in (0.0, 12345.0, 0.001, 0.00002, -1.5, float("nan"))]
    ['0', '12.35k', '0.001', '2e-05', '-1.5', 'NaN']
    """
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    for limit, size, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover ``[low, high]``, about `count` of them.

    >>> ticks(0.0, 0.93)
    [0.0, 0.25, 0.5, 0.75]
    """
    raw = (high - low) / (count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thin(steps: np.ndarray, values: np.ndarray):
    """Keeps the extremes of each of `_BUCKETS` stretches, and their order."""
    if len(steps) <= 2 * _BUCKETS:
        return steps, values
    edges = np.linspace(0, len(steps), _BUCKETS + 1).astype(int)
    keep: list[int] = []
    for start, stop in zip(edges, edges[1:], strict=False):
        part = values[start:stop]
        if np.isfinite(part).any():
            both = {int(np.nanargmin(part)), int(np.nanargmax(part))}
            keep += [start + i for i in sorted(both)]
        else:
            keep.append(start)
    return steps[keep], values[keep]


def smooth(steps: np.ndarray, values: np.ndarray):
    """A centred moving mean over a fortieth of the series."""
    half = max(len(values) // 80, 1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    # The window shrinks at both ends, evenly, so that the line starts on its point.
    reach = np.minimum(half, np.minimum(index, index[::-1]))
    mean = (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)
    if len(steps) > 2 * _BUCKETS:
        pick = np.unique(np.linspace(0, len(steps) - 1, _BUCKETS).astype(int))
        return steps[pick], mean[pick]
    return steps, mean


def _ends(values: Sequence[np.ndarray]) -> tuple[float, float]:
    every = np.concatenate(values)
    return float(every.min()), float(every.max())


def _limits(series: Sequence[Series], unit_interval: bool) -> tuple[float, float, bool]:
    """The y range, and whether rare outliers fall outside of it."""
    if unit_interval:
        return 0.0, 1.0, False
    finite = [s.values[np.isfinite(s.values)] for s in series]
    low, high = _ends(finite)
    clipped = False
    if all(len(v) >= 20 for v in finite):
        # A running median drops lone spikes and keeps what lasts, steep starts too.
        fives = (sliding_window_view(v, 5) for v in finite)
        floor, ceiling = _ends([np.median(window, axis=1) for window in fives])
        span = ceiling - floor
        if span > 0 and high > ceiling + 2 * span:
            high, clipped = ceiling + 0.5 * span, True
        if span > 0 and low < floor - 2 * span:
            low, clipped = floor - 0.5 * span, True
    if high - low <= 1e-12 * max(abs(high), abs(low)):
        pad = abs(high) * 0.1 or 1.0
        return low - pad, high + pad, clipped
    if 0 < low < 0.35 * high:
        low = 0.0
    pad = 0.05 * (high - low)
    return (low if low == 0 else low - pad), high + pad, clipped


def _tag(name: str, kind: str, content: str = "", /, **attributes: Any) -> str:
    """An SVG element of a class; numbers to a tenth of a pixel."""
    written = ""
    for key, value in attributes.items():
        text = f"{value:.1f}" if isinstance(value, float) else value
        written += f' {key.replace("_", "-")}="{text}"'
    return f'<{name} class="{kind}"{written}>{content}</{name}>'


def _svg(
    body: Iterable[str], height: int, width: int, kind: str = "", **attributes: Any
) -> str:
    size = f"0 0 {width} {height}"
    return _tag("svg", kind, "".join(body), viewBox=size, **attributes)


@dataclasses.dataclass(frozen=True)
class _Frame:
    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: np.ndarray | float):
        inner = WIDTH - _LEFT - _RIGHT
        return _LEFT + (value - self.x0) / (self.x1 - self.x0) * inner

    def y(self, value: np.ndarray | float):
        inner = HEIGHT - _TOP - _BOTTOM
        share = (np.clip(value, self.y0, self.y1) - self.y0) / (self.y1 - self.y0)
        return HEIGHT - _BOTTOM - share * inner

    def grid(self, x_label: str) -> list[str]:
        right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
        out = []
        for tick in ticks(self.y0, self.y1):
            y = self.y(tick)
            kind = "zero" if tick == 0 and self.y0 < 0 else "grid"
            out.append(_tag("line", kind, x1=_LEFT, x2=right, y1=y, y2=y))
            out.append(_tag("text", "y", number(tick), x=_LEFT - 6, y=y + 3.5))
        for tick in ticks(self.x0, self.x1):
            x = self.x(tick)
            reach = 0.5 * _CHARACTER * len(number(tick))
            if x + reach > right - _CHARACTER * (len(x_label) + 1):
                continue  # the axis' name stands there
            out.append(_tag("line", "tick", x1=x, x2=x, y1=bottom, y2=bottom + 4))
            out.append(_tag("text", "x", number(tick), x=x, y=bottom + 16))
        out.append(_tag("line", "axis", x1=_LEFT, x2=right, y1=bottom, y2=bottom))
        out.append(_tag("text", "name", html.escape(x_label), x=right, y=bottom + 16))
        return out


def _path(frame: _Frame, steps: np.ndarray, values: np.ndarray) -> str:
    """Path data; a new stretch after every gap."""
    parts, pen = [], "M"
    for x, y, ok in zip(
        frame.x(steps), frame.y(values), np.isfinite(values), strict=True
    ):
        if not ok:
            pen = "M"
            continue
        parts.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
    return "".join(parts)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    unit_interval: bool = False,
    smoothing: bool = True,
) -> tuple[str, list[str]]:
    """Curves over steps, at least one with a finite value; notes for their caption.

    Long noisy curves become a moving mean over faint points, if `smoothing`.
    """
    drawn = [s for s in series if np.isfinite(s.values).any()]
    y0, y1, clipped = _limits(drawn, unit_interval)
    x0 = float(min(s.steps[0] for s in series))
    x1 = float(max(s.steps[-1] for s in series))
    if x0 < 0.1 * x1:
        x0 = 0.0
    frame = _Frame(x0, x1 if x1 > x0 else x0 + 1.0, y0, y1)
    notes = []
    if clipped:
        every = np.concatenate([s.values for s in drawn])
        extreme = max(every[np.isfinite(every)], key=abs)
        notes.append(f"axis clipped; extreme {number(extreme)}")
    raw, body = [], []
    for s in drawn:
        steps, values = thin(s.steps, s.values)
        main = steps, values
        if smoothing and not s.dashed and len(s.steps) >= _SMOOTH_FROM:
            raw.append(_tag("path", f"raw c{s.colour}", d=_path(frame, steps, values)))
            finite = np.isfinite(s.values)
            main = smooth(s.steps[finite], s.values[finite])
        kind = "eval" if s.dashed else "line"
        label, path = html.escape(s.label), _path(frame, *main)
        body.append(_tag("path", f"{kind} c{s.colour}", data_label=label, d=path))
        if len(main[0]) == 1 or s.dashed and len(main[0]) <= 60:
            body += [
                _tag("circle", f"dot c{s.colour}", cx=frame.x(x), cy=frame.y(y), r=2.4)
                for x, y in zip(*main, strict=True)
                if np.isfinite(y)
            ]
    for s in series:
        bad = s.steps[~np.isfinite(s.values)]
        if len(bad):
            notes.append(f"{s.label}: not finite from step {int(bad[0])}")
            x, y = frame.x(float(bad[0])), HEIGHT - _BOTTOM
            body.append(_tag("text", f"bad c{s.colour}", "✕", x=x, y=y))
    svg = _svg(
        # Faint points below every line, whoever's they are.
        [*frame.grid("step"), *raw, *body],
        HEIGHT,
        WIDTH,
        role="img",
        kind=f"curves{' many' * (len(raw) > 4)}",
        aria_label=html.escape(title),
        data_scale=f"{frame.x0:.8g},{frame.x1:.8g},{frame.y0:.8g},{frame.y1:.8g}",
        data_plot=f"{_LEFT},{WIDTH - _RIGHT},{_TOP},{HEIGHT - _BOTTOM}",
    )
    return svg, notes


def calibration_chart(
    groups: Sequence[tuple[str, int, Sequence[tuple[float, float, float]]]],
) -> str:
    """A circle a bin: groups are ``(label, colour, [(value, target, count)])``."""
    low, high = _ends([np.array(b[:2]) for _, _, bins in groups for b in bins])
    pad = 0.08 * (high - low) or 1.0
    frame = _Frame(low - pad, high + pad, low - pad, high + pad)
    top = max(count for _, _, bins in groups for *_, count in bins)
    ends = np.array([low - pad, high + pad])
    body = frame.grid("predicted value")
    body.append(_tag("path", "ideal", d=_path(frame, ends, ends)))
    for label, colour, bins in groups:
        order = sorted(bins)
        xs, ys = (np.array([b[i] for b in order]) for i in (0, 1))
        body.append(_tag("path", f"line c{colour}", d=_path(frame, xs, ys)))
        for value, target, count in order:
            text = (
                f"<title>{html.escape(label)}: value {number(value)}, mean target "
                f"{number(target)}, {int(count)} responses</title>"
            )
            x, y, r = frame.x(value), frame.y(target), 2 + 5 * math.sqrt(count / top)
            body.append(_tag("circle", f"dot c{colour}", text, cx=x, cy=y, r=r))
    return _svg(body, HEIGHT, WIDTH, role="img", aria_label="value calibration")


def _on_axis(value: float, limits: tuple[float, float]) -> float:
    """Where a number stands on the common axis of `point_range` and `range_axis`."""
    return 8 + (value - limits[0]) / (limits[1] - limits[0]) * (_RANGE_WIDTH - 16)


def point_range(
    mean: float,
    interval: tuple[float, float] | None,
    limits: tuple[float, float],
    *,
    colour: int,
    baseline: float | None = None,
) -> str:
    """A mean with its interval as a bar, on the common axis `limits`."""
    body = [_tag("line", "grid", x1=8, x2=_RANGE_WIDTH - 8, y1=12, y2=12)]
    label = number(mean)
    if baseline is not None:
        at = _on_axis(baseline, limits)
        body.append(_tag("line", "ideal", x1=at, x2=at, y1=0, y2=24))
    if interval is not None:
        low, high = (_on_axis(end, limits) for end in interval)
        size = {"width": max(high - low, 1.5), "height": 8}
        body.append(_tag("rect", f"bar c{colour}", x=low, y=8, rx=2, **size))
        label += f", 95% interval {number(interval[0])} to {number(interval[1])}"
    at = _on_axis(mean, limits)
    body.append(_tag("circle", f"dot c{colour}", cx=at, cy=12, r=4))
    return _svg(body, 24, _RANGE_WIDTH, kind="range", role="img", aria_label=label)


def range_axis(limits: tuple[float, float]) -> str:
    """The axis below a column of `point_range`."""
    body = [_tag("line", "axis", x1=8, x2=_RANGE_WIDTH - 8, y1=0.5, y2=0.5)]
    for tick in ticks(*limits, count=4):
        x = _on_axis(tick, limits)
        body.append(_tag("line", "tick", x1=x, x2=x, y1=0, y2=4))
        body.append(_tag("text", "x", number(tick), x=x, y=15))
    return _svg(body, 18, _RANGE_WIDTH, kind="range", aria_hidden="true")
