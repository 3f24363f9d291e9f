"""Line and bar charts as inline SVG: no script, no network, colours from the page's CSS variables.

A noisy curve is drawn twice: as it is, faint, and smoothed, strong. Every drawn point and bar tells its value on hover.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Point = tuple[float, float]
WIDTH, HEIGHT = 380, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
MAX_POINTS = 160
SMOOTH_FROM = 24  # shorter curves are drawn as they are
COLOURS = 4  # --series-1 ... in the page's CSS


BAR_WIDTH, BAR_LABEL, BAR_HEIGHT, BAR_GAP = 1180, 150, 13, 12


@dataclass(frozen=True)
class Bar:
    """One bar: its value, the ends of its interval (None where there is none), and whether to draw it faintly."""

    value: float
    low: float | None = None
    high: float | None = None
    faint: bool = False


@dataclass(frozen=True)
class BarGroup:
    """Bars that stand together, one a run in the order of the runs; None where a run has no value."""

    name: str
    bars: Sequence[Bar | None]


@dataclass(frozen=True)
class Curve:
    """One line of a chart: its name in the legend and its (step, value) points in order of step."""

    name: str
    points: Sequence[Point]


def line_chart(curves: Sequence[Curve], label: str) -> Markup:
    """An SVG of `curves` over steps. Values that are not finite are left out.

    Args:
        label: read out by screen readers.

    Raises:
        ValueError: nothing to draw.
    """
    drawn = [Curve(curve.name, thinned(finite(curve.points))) for curve in curves]
    places = [point for curve in drawn for point in curve.points]
    if not places:
        raise ValueError(f"chart {label!r}: no finite value")
    x_ticks = ticks(min(x for x, _ in places), max(x for x, _ in places), 4, whole=True)
    y_ticks = ticks(min(y for _, y in places), max(y for _, y in places), 4)
    x_low, x_high = min(x for x, _ in places), max(x for x, _ in places)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at(point: Point) -> tuple[float, float]:
        across = (point[0] - x_low) / ((x_high - x_low) or 1)
        up = (point[1] - y_low) / ((y_high - y_low) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">',
        *(_horizontal(at((x_low, tick))[1], number(tick)) for tick in y_ticks),
        *(_below(at((tick, y_low))[0], number(tick)) for tick in x_ticks if x_low <= tick <= x_high),
    ]
    for index, curve in enumerate(drawn):
        parts.append(_line(curve, index % COLOURS + 1, at))
    return Markup("".join(parts) + "</svg>")


def bar_chart(groups: Sequence[BarGroup], names: Sequence[str], label: str) -> Markup:
    """An SVG of horizontal bars with whiskers for their intervals, on one axis that begins at 0 (or below).

    Args:
        names: of the runs, shown on hover.
        label: read out by screen readers.

    Raises:
        ValueError: nothing to draw.
    """
    bars = [bar for group in groups for bar in group.bars if bar is not None]
    if not bars:
        raise ValueError(f"chart {label!r}: no value")
    ends = [end for bar in bars for end in (bar.value, bar.low, bar.high) if end is not None]
    marks = ticks(min(0.0, *ends), max(0.0, *ends), 5)
    height = 24 + sum(len(group.bars) * BAR_HEIGHT + BAR_GAP for group in groups)

    def across(value: float) -> float:
        share = (value - marks[0]) / (marks[-1] - marks[0])
        return BAR_LABEL + share * (BAR_WIDTH - BAR_LABEL - 16)

    parts = [
        f'<svg class="chart" viewBox="0 0 {BAR_WIDTH} {height}" role="img" aria-label="{escape(label)}">'
    ]
    for mark in marks:
        x = across(mark)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 20}"/>')
        parts.append(
            f'<text class="axis" x="{x:.1f}" y="{height - 6}" text-anchor="middle">{number(mark)}</text>'
        )
    top = BAR_GAP / 2
    for group in groups:
        middle = top + len(group.bars) * BAR_HEIGHT / 2 + 4
        parts.append(
            f'<text class="axis" x="{BAR_LABEL - 8}" y="{middle:.1f}" text-anchor="end">{escape(group.name)}</text>'
        )
        for index, (bar, name) in enumerate(zip(group.bars, names, strict=True)):
            if bar is not None:
                parts.append(_bar(bar, f"{group.name}, {name}", index, top + index * BAR_HEIGHT, across))
        top += len(group.bars) * BAR_HEIGHT + BAR_GAP
    return Markup("".join(parts) + "</svg>")


def _bar(bar: Bar, name: str, index: int, top: float, across: Callable[[float], float]) -> str:
    start, end = sorted((across(0.0), across(bar.value)))
    said = f"{name}: {number(bar.value)}"
    whisker = ""
    if bar.low is not None and bar.high is not None:
        said += f" [{number(bar.low)}, {number(bar.high)}]"
        y, low, high = top + BAR_HEIGHT / 2 - 1, across(bar.low), across(bar.high)
        whisker = (
            f'<path class="whisker" d="M{low:.1f} {y - 3:.1f}V{y + 3:.1f}M{low:.1f} {y:.1f}H{high:.1f}'
            f'M{high:.1f} {y - 3:.1f}V{y + 3:.1f}"/>'
        )
    look = ' opacity="0.3"' if bar.faint else ""
    place = f'x="{start:.1f}" y="{top:.1f}" width="{max(1.0, end - start):.1f}" height="{BAR_HEIGHT - 2}"'
    colour = f'style="fill:var(--series-{index % COLOURS + 1})"'
    return f'<g{look}><title>{escape(said)}</title><rect {place} rx="2" {colour}/>{whisker}</g>'


def finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MAX_POINTS` points: the means of equal runs of neighbours."""
    if len(points) <= MAX_POINTS:
        return list(points)
    bounds = [round(i * len(points) / MAX_POINTS) for i in range(MAX_POINTS + 1)]
    runs = [points[a:b] for a, b in itertools.pairwise(bounds)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Means over a centred window, an eighth of the curve wide and cut off at its ends."""
    reach = max(2, len(points) // 16)
    out: list[Point] = []
    for place, (x, _) in enumerate(points):
        window = points[max(0, place - reach) : place + reach + 1]
        out.append((x, sum(y for _, y in window) / len(window)))
    return out


def ticks(low: float, high: float, about: int, *, whole: bool = False) -> list[float]:
    """Round numbers, about `about` of them, from at most `low` to at least `high`."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        margin = abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """A short form for axes and tables: 0.125, 12.5, 1,250, 3.2e-06."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _horizontal(y: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="axis" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>'
    )


def _below(x: float, text: str) -> str:
    return f'<text class="axis" x="{x:.1f}" y="{HEIGHT - 7}" text-anchor="middle">{text}</text>'


def _line(curve: Curve, colour: int, place: Callable[[Point], tuple[float, float]]) -> str:
    spots = [place(point) for point in curve.points]
    noisy = len(curve.points) >= SMOOTH_FROM
    strong = [place(point) for point in smoothed(curve.points)] if noisy else spots
    style = f'style="stroke:var(--series-{colour})"'
    raw = f'<path class="raw" {style} d="{_path(spots)}"/>' if noisy else ""
    hover = "".join(
        f'<circle class="hover" style="fill:var(--series-{colour})" cx="{x:.1f}" cy="{y:.1f}" r="4">'
        f"<title>{escape(curve.name)} · step {number(step)}: {number(value)}</title></circle>"
        for (x, y), (step, value) in zip(spots, curve.points, strict=True)
    )
    dot = ""
    if len(spots) == 1:
        x, y = spots[0]
        dot = f'<circle style="fill:var(--series-{colour})" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
    return f'{raw}<path class="line" {style} d="{_path(strong)}"/>{dot}{hover}'


def _path(spots: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
