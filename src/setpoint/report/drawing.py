"""A drawing: a figure as data, and as SVG between HTML labels, which needs no script and no library.

It stretches with the page while its letters and lines keep their size: the SVG's coordinates run from 0 to 1000 both
ways, and labels stand outside of it at shares of its width and height.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from setpoint.report.numbers import digits

GREY, BLUE, ORANGE = "#667085", "#0b62a8", "#c2570c"
OTHERS = ("#00795c", "#7b3fb5", "#8a6d00", "#b3306f", "#6b4c35", "#b3261e")
FAINT, INK = "#c9d1dc", "#1c2430"
DARK = {
    GREY: "#a3acb9",
    BLUE: "#5eb1f5",
    ORANGE: "#f0944d",
    **dict(zip(OTHERS, ("#3fc9a0", "#bd93f9", "#d9b93a", "#f08cb8", "#c9a284", "#ff8a80"), strict=True)),
    FAINT: "#3a4554",
    INK: "#e6eaf0",
}
"""The same colours on a dark page."""
# The SVG has these units both ways; the browser stretches them to the size of the page.
FULL = 1000
MOST_LABELLED = 240
"""Points of a figure that have a text each, which shows under the pointer; with more, the file would grow large."""
_SHADES = 5
_DASHES = {"dash": "7 5", "dot": "2 4", "dashdot": "8 4 2 4"}
_BORDERS = {"solid": "solid", "dot": "dotted"}


@dataclass(frozen=True)
class Trace:
    """A line through points, or dots at them.

    Args:
        points: (x, y); a y of None is a gap in the line.
        texts: what the pointer reads at each point; without them it reads nothing.
        width: of the line in pixels; 0 for none.
        stairs: whether the line keeps its height up to the next point.
        dot: diameter of the dots in pixels; 0 for none.
        shares: of dots, a colour for each, from blue for 0 over grey to orange for 1; None is grey.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    color: str
    texts: Sequence[str] = ()
    width: float = 0.0
    dash: str = "solid"
    stairs: bool = False
    dot: float = 0.0
    square: bool = False
    shares: Sequence[float | None] = ()
    opacity: float = 1.0
    in_legend: bool = True


@dataclass(frozen=True)
class Spans:
    """Thousands of lines across: (start, y, stop)."""

    name: str
    spans: Sequence[tuple[float, float, float]]
    color: str
    opacity: float


@dataclass(frozen=True)
class Cells:
    """Shares from 0 to 1 as depths of blue: a row for each y of 0.5, 1.5 and so on.

    Args:
        edges: x at which the columns begin, and at which the last one ends.
        shares, texts: by row and column.
    """

    edges: Sequence[float]
    shares: Sequence[Sequence[float]]
    texts: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Rule:
    """A line across the whole plot, with its text."""

    y: float
    text: str
    color: str
    dash: str = "solid"


@dataclass(frozen=True)
class Figure:
    """What is drawn on one pair of axes.

    Args:
        rows: labels of the y axis in place of numbers, the first on top at 0.5.
        shades: what the colours by `Trace.shares` mean.
    """

    traces: Sequence[Trace] = ()
    y_title: str = ""
    x_title: str = "optimizer step"
    height: int = 360
    x_range: tuple[float, float] | None = None
    x_from_zero: bool = False
    y_from_zero: bool = False
    rows: Sequence[str] = ()
    rules: Sequence[Rule] = ()
    spans: Sequence[Spans] = ()
    cells: Cells | None = None
    shades: str = ""


def line(
    name: str,
    points: Sequence[tuple[float, float]],
    color: str,
    *,
    unit: str = "",
    width: float = 1.8,
    dash: str = "solid",
    stairs: bool = False,
) -> Trace:
    """A line through (step, value) points, which the pointer reads."""
    texts = [f"{name} at step {step:,.0f}\n{value:.4g} {unit}".rstrip() for step, value in points]
    return Trace(name, points, color, texts, width, dash, stairs)


def drawing(figure: Figure, title: str) -> str:
    """The HTML of a figure: legend, plot and labels; a screen reader says the title."""
    plot = _Plot(figure)
    # Above the plot, where no line can cross it.
    above = f'<p class="chart-title">{escape(figure.y_title)}</p>' if figure.y_title else ""
    return (
        f'{_legend(figure)}{above}<div class="chart" style="height:{figure.height}px;--label:{plot.longest_label()}ch">'
        f'<svg viewBox="0 0 {FULL} {FULL}" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">'
        f"{''.join(plot.svg())}</svg>{''.join(plot.labels())}</div>"
    )


def scheme() -> str:
    """Style of the figures' colours, on a light page and on a dark one."""
    light = "".join(f"--k{color[1:]}:{color};" for color in DARK)
    dark = "".join(f"--k{color[1:]}:{other};" for color, other in DARK.items())
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def _ink(color: str) -> str:
    # A variable and no colour: the same SVG is read on a light page and on a dark one.
    return f"var(--k{color[1:]})"


def _shade(share: float | None) -> str:
    """From blue for 0 over grey to orange for 1, in few steps; grey where nothing is known."""
    level = round((0.5 if share is None else share) * (_SHADES - 1)) / (_SHADES - 1)
    return f"color-mix(in srgb,{_ink(BLUE if level < 0.5 else ORANGE)} {abs(2 * level - 1):.0%},{_ink(GREY)})"


def _legend(figure: Figure) -> str:
    """The names of traces; none for one trace."""
    # By name, so that a hundred traces of one kind have one line in the legend.
    items = {spans.name: _legend_item(spans.name, "line", spans.color, spans.opacity) for spans in figure.spans}
    for trace in figure.traces:
        if trace.in_legend:
            kind = "line" if trace.width else "dot"
            items[trace.name] = _legend_item(trace.name, kind, trace.color, trace.opacity, trace.dash)
    if figure.shades:
        dots = "".join(f'<i class="dot" style="color:{_shade(n / (_SHADES - 1))}"></i>' for n in range(_SHADES))
        items[figure.shades] = f"<li>{dots}{escape(figure.shades)}, 0 to 1</li>"
    return f'<ul class="legend">{"".join(items.values())}</ul>' if len(items) > 1 else ""


def _legend_item(name: str, kind: str, color: str, opacity: float, dash: str = "solid") -> str:
    style = f"color:{_ink(color)};opacity:{opacity};border-top-style:{_BORDERS.get(dash, 'dashed')}"
    return f'<li><i class="{kind}" style="{style}"></i>{escape(name)}</li>'


class _Plot:
    """A figure's axes, and what they make of its traces."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        # The texts of thousands of points would make the file large: then none has one.
        self.labelled = sum(len(trace.texts) for trace in figure.traces) <= MOST_LABELLED
        xs = [x for trace in figure.traces for x, _ in trace.points]
        xs += [x for spans in figure.spans for start, _, stop in spans.spans for x in (start, stop)]
        xs += figure.cells.edges if figure.cells else ()
        ys = [y for trace in figure.traces for _, y in trace.points if y is not None]
        ys += [rule.y for rule in figure.rules]
        self.x = _Axis(xs, figure.x_range, figure.x_from_zero)
        # Upside down, so that the first row stands on top.
        ends = (float(len(figure.rows)), 0.0) if figure.rows else None
        self.y = _Axis(ys, ends, figure.y_from_zero, upward=True)
        if figure.rows:
            self.y.ticks = [(place + 0.5, label) for place, label in enumerate(figure.rows)]

    def longest_label(self) -> int:
        """Letters of the longest label at the y axis."""
        return max(4, *(len(text) for _, text in self.y.ticks))

    def labels(self) -> Iterator[str]:
        """Numbers and titles at the axes, and the notes on lines across the plot."""
        for value, text in self.y.ticks:
            yield f'<span class="y" style="top:{self.y.at(value) / 10}%">&lrm;{escape(text)}&lrm;</span>'
        for value, text in self.x.ticks:
            yield f'<span class="x" style="left:{self.x.at(value) / 10}%">{text}</span>'
        yield f'<span class="x-title">{escape(self.figure.x_title)}</span>'
        for rule in self.figure.rules:
            yield f'<span class="note" style="top:{self.y.at(rule.y) / 10}%">{escape(rule.text)}</span>'

    def svg(self) -> Iterator[str]:
        """The grid, the lines across the plot, and all traces."""
        if not self.figure.rows:
            yield from (f'<path class="grid" d="M0 {self.y.at(value):g}H{FULL}"/>' for value, _ in self.y.ticks)
        for rule in self.figure.rules:
            yield _stroke(f"M0 {self.y.at(rule.y):g}H{FULL}", rule.color, 1.4, rule.dash)
        if self.figure.cells is not None:
            yield from self._cells(self.figure.cells)
        for spans in self.figure.spans:
            yield _stroke(self._joined(spans), spans.color, 1.5, opacity=spans.opacity, title=spans.name)
        for trace in self.figure.traces:
            if trace.width:
                yield _stroke(self._path(trace), trace.color, trace.width, trace.dash, trace.opacity, trace.name)
            if trace.dot or (trace.texts and self.labelled):
                yield from self._points(trace)

    def _path(self, trace: Trace) -> str:
        path, pen_down = "", False
        for x, y in trace.points:
            if y is None:
                pen_down = False
                continue
            left, top = self.x.at(x), self.y.at(y)
            if pen_down and trace.stairs:
                path += f"H{left:g}V{top:g}"
            else:
                path += f"{'L' if pen_down else 'M'}{left:g} {top:g}"
            pen_down = True
        return path

    def _joined(self, spans: Spans) -> str:
        # Thousands of units lie on few pixels: the lines on one row of pixels are joined.
        rows: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for start, y, stop in spans.spans:
            rows[f"{self.y.at(y):.0f}"].append((self.x.at(start), self.x.at(stop)))
        return "".join(f"M{at:.0f} {row}H{end:.0f}" for row, parts in rows.items() for at, end in _joined(parts))

    def _points(self, trace: Trace) -> Iterator[str]:
        """Dots, or places where the pointer reads a line; each has a text where there are few of them."""
        by_color: dict[str, dict[str, None]] = defaultdict(dict)  # a dict, since equal points are drawn once
        digits_shown = "g" if self.labelled else ".0f"
        for place, (x, y) in enumerate(trace.points):
            if y is None:
                continue
            # A line of almost no length with round ends is a dot that keeps its shape when the SVG is stretched.
            where = f"M{self.x.at(x):{digits_shown}} {self.y.at(y):{digits_shown}}h.1"
            color = _shade(trace.shares[place]) if trace.shares else _ink(trace.color)
            if self.labelled and trace.texts:
                where = f'<path d="{where}"><title>{escape(trace.texts[place], quote=False)}</title></path>'
            by_color[color][where] = None
        size = trace.dot or 9
        size = size if self.labelled else max(2, size / 2)
        for color, points in by_color.items():
            look = (
                f'style="stroke:{color}" stroke-width="{size}" stroke-linecap="{"square" if trace.square else "round"}"'
            )
            made = "".join(points) if self.labelled and trace.texts else f'<path d="{"".join(points)}"/>'
            yield f'<g class="{"point" if trace.dot else "read"}" {look}>{made}</g>'

    def _cells(self, cells: Cells) -> Iterator[str]:
        """Equal shares side by side are one cell. Of many cells, shares are rounded and have no texts."""
        gap = FULL * 3 / self.figure.height
        many = sum(len(set(shares)) for shares in cells.shares) > MOST_LABELLED
        shades: dict[float, list[str]] = defaultdict(list)
        for row, (exact_shares, texts) in enumerate(zip(cells.shares, cells.texts, strict=True)):
            shares = [round(share, 1) for share in exact_shares] if many else exact_shares
            top, foot = self.y.at(row), self.y.at(row + 1)
            starts = [n for n, share in enumerate(shares) if not n or share != shares[n - 1]]
            for start, stop in zip(starts, [*starts[1:], len(shares)], strict=True):
                left, right = self.x.at(cells.edges[start]), self.x.at(cells.edges[stop])
                where = f"M{left:g} {top + gap / 2:.1f}H{right:g}v{foot - top - gap:.1f}H{left:g}Z"
                if not many:
                    where = f'<path d="{where}"><title>{escape(texts[start], quote=False)}</title></path>'
                shades[shares[start]].append(where)
        for share, made in shades.items():
            drawn = f'<path d="{"".join(made)}"/>' if many else "".join(made)
            yield f'<g class="cell" style="fill:{_ink(BLUE)};fill-opacity:{0.06 + 0.84 * share:.2f}">{drawn}</g>'


class _Axis:
    """Values to coordinates from 0 to 1000, and the ticks with their texts."""

    def __init__(
        self, values: Iterable[float], ends: tuple[float, float] | None, from_zero: bool, upward: bool = False
    ) -> None:
        finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        if from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if ends is not None:
            low, high = ends
        elif upward:
            high += 0.06 * (high - low)
        self.low, self.high = float(low), float(high) if high != low else low + 1.0
        # Coordinates of SVG count from the top.
        self.start, self.end = (FULL, 0) if upward else (0, FULL)
        values = _round_values(min(self.low, self.high), max(self.low, self.high), 5)
        self.ticks = [(value, f"{value:,.0f}" if abs(value) >= 1000 else digits(value)) for value in values]

    def at(self, value: float) -> float:
        """The coordinate of a value."""
        where = self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)
        # Renderers fail at huge coordinates: what lies far outside may end just outside.
        return round(min(max(where, -FULL), 2 * FULL), 1)


def _round_values(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 and a power of ten, about so many of them, from `low` to `high`.

    >>> _round_values(0, 170, 5)
    [0.0, 50.0, 100.0, 150.0]
    """
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    return [float(f"{n * step:.6g}") for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _joined(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same in as few spans as there are gaps between them.

    >>> _joined([(0, 5), (7, 9), (3, 6)])
    [(0, 6), (7, 9)]
    """
    joined: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def _stroke(path: str, color: str, width: float, dash: str = "solid", opacity: float = 1, title: str = "") -> str:
    dashed = f' stroke-dasharray="{_DASHES[dash]}"' if dash in _DASHES else ""
    style = f'style="stroke:{_ink(color)}" stroke-width="{width}" stroke-opacity="{opacity}"{dashed}'
    return f'<path class="stroke" d="{path}" {style}><title>{escape(title)}</title></path>'
