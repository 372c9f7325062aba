"""The kinds of plot a report is made of; each takes plain values and returns an inline SVG.

Rows (`forest`, `dots`, `bars`) have their label and number on a line of their own above the marks, so that long labels
fit a phone. Ids of marks: `interval`, `dot`, `bar`, `line`; tests count them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import Formatter, MaxNLocator
from numpy.typing import NDArray

from montessori_ray.report.colours import STAND_INS
from montessori_ray.report.svg import axes, inline_svg
from montessori_ray.report.words import Scale, number, ticks, xml_text

NO_SCALE = Scale()

ROW_HEIGHT = 40
"""Units of one row: its words, and its marks below them."""

LABEL_LENGTH = 52
"""Characters of a row's label that leave room for its note."""

MAX_DOTS = 200
"""Dots in a row; of more values, as many quantiles are shown."""

MAX_POINTS = 250
"""Points of a curve; a longer one is shown as means of neighbours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A row of `forest`: an estimate and its interval."""

    label: str
    mean: float
    low: float
    high: float
    note: str = ""
    """Said at the right of the row; where nothing is given the numbers, in the unit of the axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """A row of `dots`: single values, their mean and its interval."""

    label: str
    values: Sequence[float]
    mean: float
    low: float
    high: float
    note: str = ""
    role: str = "neutral"
    """Name of its colour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A row of `bars`."""

    label: str
    value: float
    note: str
    role: str = "neutral"


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A line of `curves`."""

    label: str
    points: Sequence[tuple[float, float]]
    role: str


def forest(
    name: str,
    title: str,
    rows: Sequence[Interval],
    *,
    xlabel: str,
    scale: Scale | None = None,
) -> Markup:
    """Differences with their intervals, one below the other; coloured where these exclude zero; lower helps.

    Args:
        name: unique on the page.
        title: what is shown, for screen readers.
        rows: from top to bottom.
        xlabel: quantity and unit.
        scale: of the axis and of the rows' notes; None takes one that fits the intervals.
    """
    scale = scale or Scale.of(*(end for row in rows for end in (row.low, row.high)))
    with axes(_rows_height(len(rows))) as drawn:
        for position, row in enumerate(rows):
            role = _role_of(row)
            drawn.plot([row.low, row.high], [-position] * 2, color=STAND_INS[role], lw=2.2, gid=f"interval-{position}")
            drawn.plot(
                [row.mean], [-position], "o", ms=7.5, mew=2, mec=STAND_INS[role],
                mfc=STAND_INS["surface" if role == "neutral" else role], gid=f"dot-{position}",
            )  # fmt: skip
        _zero_line(drawn, len(rows))
        said = [row.note or f"{scale.number(row.mean)} ({scale.span(row.low, row.high)})" for row in rows]
        _finish_rows(drawn, [row.label for row in rows], said, scale, xlabel)
        described = "; ".join(f"{row.label}: {note}" for row, note in zip(rows, said, strict=True))
        return inline_svg(drawn, name, title, described, {"dot": [f"{row.label}: {row.mean:.4g}" for row in rows]})


def dots(
    name: str, title: str, rows: Sequence[Values], *, xlabel: str, scale: Scale = NO_SCALE, zero: bool = True
) -> Markup:
    """Single values as dots, and over them their mean with its interval, in units of `scale`; see `MAX_DOTS`."""
    shown = [quantiles(row.values, MAX_DOTS) for row in rows]
    with axes(_rows_height(len(rows))) as drawn:
        for position, (row, values) in enumerate(zip(rows, shown, strict=True)):
            heights = -position - 0.16 + 0.2 * _spread(len(values))
            colour = STAND_INS[row.role]
            drawn.scatter(values, heights, s=20, color=colour, alpha=0.55, lw=0, gid=f"dot-{position}")
            drawn.plot(
                [row.low, row.high], [-position - 0.06] * 2, color=STAND_INS["ink"], lw=2, gid=f"interval-{position}"
            )
            drawn.plot([row.mean], [-position - 0.06], "D", ms=6, color=STAND_INS["ink"], mec=STAND_INS["surface"])
        if zero:
            _zero_line(drawn, len(rows))
        _finish_rows(drawn, [row.label for row in rows], [row.note for row in rows], scale, xlabel)
        described = "; ".join(f"{row.label}: mean {number(row.mean)}, {row.note}" for row in rows)
        tips = {f"dot-{position}": [f"{value:.3g}" for value in values] for position, values in enumerate(shown)}
        return inline_svg(drawn, name, title, described, tips)


def bars(name: str, title: str, rows: Sequence[Bar], *, xlabel: str) -> Markup:
    """Amounts of different things, in the given order; the axis starts at zero."""
    with axes(_rows_height(len(rows), axis=False)) as drawn:
        for position, row in enumerate(rows):
            drawn.barh(-position, row.value, 0.3, color=STAND_INS[row.role])[0].set_gid(f"bar-{position}")
        drawn.set_xlim(0, max((row.value for row in rows), default=0) or 1)
        _finish_rows(drawn, [row.label for row in rows], [row.note for row in rows], Scale(), "")
        drawn.spines["bottom"].set_visible(False)
        drawn.set_xticks([])
        described = f"{xlabel}. " + "; ".join(f"{row.label}: {row.note}" for row in rows)
        return inline_svg(drawn, name, title, described, {"bar": [f"{row.label}: {row.note}" for row in rows]})


def histogram(
    name: str, title: str, edges: Sequence[float], counts: Sequence[int], *, xlabel: str, ylabel: str,
    extremes: tuple[float, float], scale: Scale = NO_SCALE, noise: float = 0.0, error: float = 0.0,
) -> Markup:  # fmt: skip
    """Counts in bins of which each has one sign: helpful below zero, harmful above.

    Args:
        name: unique on the page.
        title: what is shown, for screen readers.
        edges: one more than counts; zero is one of them or outside.
        counts: values in each bin.
        xlabel: quantity and unit.
        ylabel: what is counted.
        extremes: the lowest and the highest value; the outermost bins hold what lies beyond them too.
        scale: the unit of the axis.
        noise: half the width of the band round zero in which a value is below the noise of its measurement: bars are
            pale there.
        error: half the width of a band behind the bars: one standard error of a value.
    """
    with axes(235) as drawn:
        if error:
            drawn.axvspan(-error, error, color=STAND_INS["noise"], lw=0, gid="band-error")
        for position, (start, end, count) in enumerate(zip(edges[:-1], edges[1:], counts, strict=True)):
            role = "helpful" if (start + end) / 2 < 0 else "harmful"
            bar = drawn.bar(
                start, count, end - start, align="edge", color=STAND_INS[role], ec=STAND_INS["surface"], lw=0.8
            )
            bar[0].set_gid(f"bar-{position}")
        if noise:
            drawn.axvspan(-noise, noise, color=STAND_INS["surface"], alpha=0.55, lw=0, zorder=2, gid="band-noise")
        drawn.axvline(0, color=STAND_INS["muted"], lw=1)
        _finish_axes(drawn, scale.label(xlabel), ylabel, xscale=scale)
        drawn.yaxis.set_major_locator(_locator(5, integer=True))
        reach = [min(edges[0], extremes[0]), *edges[1:-1], max(edges[-1], extremes[1])]
        tips = [
            f"{number(start)} to {number(end)}: {count}"
            for start, end, count in zip(reach[:-1], reach[1:], counts, strict=True)
        ]
        helpful = sum(count for end, count in zip(edges[1:], counts, strict=True) if end <= 0)
        described = (
            f"{sum(counts)} values from {number(extremes[0])} to {number(extremes[1])}, {helpful} of them below zero."
        )
        return inline_svg(drawn, name, title, described, {"bar": tips})


def curves(name: str, title: str, lines: Sequence[Curve], *, xlabel: str, ylabel: str) -> Markup:
    """Values over steps; a long or ragged line is drawn pale, with its running mean over it."""
    described = []
    tips: dict[str, list[str]] = {}
    with axes(215) as drawn:
        for position, line in enumerate(lines):
            steps, values = thinned(line.points, MAX_POINTS)
            colour = STAND_INS[line.role]
            smooth = running_mean(values)
            ragged = len(values) >= 10
            drawn.plot(steps, values, color=colour, lw=1, alpha=0.35 if ragged else 1, gid=f"line-{position}")
            if ragged:
                drawn.plot(steps, smooth, color=colour, lw=2.2)
            size = 9 if len(values) <= 60 else 30
            drawn.scatter(
                steps, values, s=size, color=colour, lw=0, alpha=0.6 if size == 9 else 0, gid=f"dot-{position}"
            )
            tips[f"dot-{position}"] = [
                f"{line.label}, step {step:g}: {value:.4g}" for step, value in zip(steps, values, strict=True)
            ]
            described.append(f"{line.label}: {number(values[0])} at step {steps[0]:g}, {number(values[-1])} at the end")
        _finish_axes(drawn, xlabel, ylabel)
        drawn.xaxis.set_major_locator(_locator(6, integer=True))
        return inline_svg(drawn, name, title, "; ".join(described), tips)


def scatter(
    name: str,
    title: str,
    points: Sequence[tuple[str, float, float]],
    *,
    xlabel: str,
    ylabel: str,
    scale: Scale = NO_SCALE,
    noise: float = 0.0,
) -> Markup:
    """Two measurements of the same things against each other, the line where they agree, and their noise around it."""
    values = np.array([[first, second] for _, first, second in points])
    low, high = float(values.min()), float(values.max())
    pad = 0.08 * ((high - low) or 1.0)
    ends = np.array([low - pad, high + pad])
    with axes(300) as drawn:
        if noise:
            drawn.fill_between(ends, ends - noise, ends + noise, color=STAND_INS["noise"], lw=0)
        drawn.plot(ends, ends, color=STAND_INS["muted"], lw=1)
        drawn.axhline(0, color=STAND_INS["line"], lw=0.8, ls=(0, (4, 3)))
        drawn.axvline(0, color=STAND_INS["line"], lw=0.8, ls=(0, (4, 3)))
        drawn.scatter(values[:, 0], values[:, 1], s=34, color=STAND_INS["helpful"], alpha=0.75, lw=0, gid="dot-0")
        _finish_axes(drawn, scale.label(xlabel), scale.label(ylabel), xscale=scale, yscale=scale)
        drawn.set_xlim(*ends)
        drawn.set_ylim(*ends)
        tips = [f"{label}: {number(first)}, {number(second)}" for label, first, second in points]
        described = f"{len(points)} points between {number(low)} and {number(high)}; on the line both agree."
        return inline_svg(drawn, name, title, described, {"dot-0": tips})


# -- values ---------------------------------------------------------------------------------------------------------


def quantiles(values: Sequence[float], most: int) -> list[float]:
    """The values in order, or, of more than `most`, that many of their quantiles."""
    if len(values) <= most:
        return sorted(values)
    found: list[float] = np.quantile(values, np.linspace(0, 1, most)).tolist()
    return found


def thinned(points: Sequence[tuple[float, float]], most: int) -> tuple[list[float], list[float]]:
    """Steps and values of a curve; of more than `most` points, means of as many runs of neighbours."""
    table: NDArray[np.float64] = np.array(points, dtype=np.float64)
    if len(table) > most:
        table = np.array([run.mean(axis=0) for run in np.array_split(table, most)])
    return table[:, 0].tolist(), table[:, 1].tolist()


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean of each value and its neighbours on both sides, a tenth of the curve in all, fewer at its ends."""
    reach = max(1, len(values) // 20)
    return [float(np.mean(values[max(0, centre - reach) : centre + reach + 1])) for centre in range(len(values))]


def _spread(amount: int) -> NDArray[np.float64]:
    """Heights in 0..1 that keep neighbours apart: multiples of the golden ratio, whole parts dropped."""
    return np.asarray((np.arange(amount) * 0.6180339887) % 1)


# -- axes -----------------------------------------------------------------------------------------------------------


def _role_of(row: Interval) -> str:
    if row.low <= 0 <= row.high:
        return "neutral"
    return "helpful" if row.mean < 0 else "harmful"


def _rows_height(amount: int, axis: bool = True) -> float:
    return ROW_HEIGHT * max(amount, 1) + (46 if axis else 6)


def shortened(label: str) -> str:
    """A row's label with its middle left out where it would reach into the note at the other end."""
    if len(label) <= LABEL_LENGTH:
        return label
    half = (LABEL_LENGTH - 1) // 2
    return f"{label[:half]}…{label[-half:]}"


def _zero_line(drawn: Axes, amount: int) -> None:
    """A line at zero behind the marks of every row, broken where words stand."""
    bottoms = -np.arange(amount) - 0.38
    drawn.vlines([0.0] * amount, bottoms, bottoms + 0.56, color=STAND_INS["muted"], lw=1, zorder=0.5)


def _finish_rows(drawn: Axes, labels: Sequence[str], notes: Sequence[str], scale: Scale, xlabel: str) -> None:
    """Words above the marks of each row, and the axis below the last one."""
    across: Any = drawn.get_yaxis_transform()
    words = [(xml_text(shortened(label)), xml_text(note)) for label, note in zip(labels, notes, strict=True)]
    for position, (label, note) in enumerate(words):
        drawn.text(0, -position + 0.26, label, transform=across, va="baseline", color=STAND_INS["ink"])
        drawn.text(1, -position + 0.26, note, transform=across, va="baseline", ha="right", color=STAND_INS["muted"])
    drawn.set_ylim(-len(labels) + 0.62, 0.62)
    drawn.set_yticks([])
    drawn.spines["left"].set_visible(False)
    drawn.set_xlabel(scale.label(xlabel))
    drawn.xaxis.set_major_formatter(_Ticks(scale))
    drawn.xaxis.set_major_locator(_locator(6))


def _finish_axes(drawn: Axes, xlabel: str, ylabel: str, xscale: Scale = NO_SCALE, yscale: Scale = NO_SCALE) -> None:
    """Labels, ticks and pale lines across."""
    drawn.set_xlabel(xlabel)
    drawn.set_ylabel(ylabel)
    drawn.grid(axis="y")
    drawn.tick_params(axis="y", length=0)
    drawn.spines["left"].set_visible(False)
    drawn.xaxis.set_major_locator(_locator(6))
    drawn.yaxis.set_major_locator(_locator(5))
    for axis, scale in ((drawn.xaxis, xscale), (drawn.yaxis, yscale)):
        axis.set_major_formatter(_Ticks(scale))


def _locator(most: int, integer: bool = False) -> MaxNLocator:
    return MaxNLocator(most, integer=integer, steps=[1, 2, 2.5, 5, 10])


class _Ticks(Formatter):
    """Tick labels in the units of a scale."""

    def __init__(self, scale: Scale) -> None:
        self._scale = scale

    def __call__(self, value: float, position: int | None = None) -> str:
        return ticks([value / self._scale.factor])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        return ticks([value / self._scale.factor for value in values])
