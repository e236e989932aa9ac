"""Markup: a page, its tables, and its figures, as SVG between HTML labels: no script, no library, no other file.

A figure stretches with the page while its letters and lines keep their size: the SVG's coordinates run from 0 to 1000
both ways, and labels stand outside of it at shares of its width and height.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

from setpoint.checkpoint.plain import replace_text
from setpoint.report.numbers import digits

GREY, BLUE, ORANGE = "#667085", "#0b62a8", "#c2570c"
OTHERS = ("#00795c", "#7b3fb5", "#8a6d00", "#b3306f", "#6b4c35", "#b3261e")
FAINT, INK = "#c9d1dc", "#1c2430"
DARK = {  # the same colours on a dark page
    GREY: "#a3acb9",
    BLUE: "#5eb1f5",
    ORANGE: "#f0944d",
    **dict(zip(OTHERS, ("#3fc9a0", "#bd93f9", "#d9b93a", "#f08cb8", "#c9a284", "#ff8a80"), strict=True)),
    FAINT: "#3a4554",
    INK: "#e6eaf0",
}
FULL = 1000
MOST_LABELLED = 240
"""Points or cells of a figure that have a text each, which shows under the pointer; more would make the file large."""
_DASHES = {"dash": "7 5", "dot": "2 4", "dashdot": "8 4 2 4"}
_BORDERS = {"solid": "solid", "dot": "dotted"}


def document(title: str, body: str) -> str:
    """The HTML of a page."""
    style = (files("setpoint.report") / "page.css").read_text(encoding="utf-8")
    light = "".join(f"--k{color[1:]}:{color};" for color in DARK)
    dark = "".join(f"--k{color[1:]}:{other};" for color, other in DARK.items())
    scheme = f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>Setpoint: {escape(title)}</title>\n<style>\n{scheme}{style}</style>\n</head>\n<body>\n"
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )


def save(page: str, target: Path) -> Path:
    """Write a page in place of the old one at once: a browser that reloads never sees half of one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_text(target, page)
    return target


def html_table(titles: Iterable[str], lines: Iterable[Sequence[str]], classes: str = "") -> str:
    """A table whose first column names the line; cells are HTML already."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    rows = ((first, "".join(f"<td>{cell}</td>" for cell in cells)) for first, *cells in lines)
    body = "".join(f'<tr><th scope="row">{first}</th>{cells}</tr>\n' for first, cells in rows)
    return f'<table class="{classes}"><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>'


# Figures.


@dataclass(frozen=True)
class Trace:
    """A line through points, or dots at them; sizes are in pixels, 0 for none."""

    name: str
    points: Sequence[tuple[float, float | None]]  # a y of None is a gap in the line
    color: str
    texts: Sequence[str] = ()  # what the pointer reads at each point
    width: float = 0.0
    dash: str = "solid"
    stairs: bool = False  # whether the line keeps its height up to the next point
    dot: float = 0.0
    square: bool = False
    opacity: float = 1.0
    in_legend: bool = True


@dataclass(frozen=True)
class Rule:
    """A line across the whole plot, with its text."""

    y: float
    text: str
    color: str
    dash: str = "solid"


@dataclass(frozen=True)
class Cell:
    """A share from 0 to 1 as a depth of blue, in a row of the figure from one x to another."""

    row: int
    start: float
    stop: float
    share: float
    text: str


@dataclass(frozen=True)
class Figure:
    """What is drawn on one pair of axes."""

    traces: Sequence[Trace] = ()
    y_title: str = ""
    x_title: str = "optimizer step"
    height: int = 360
    x_range: tuple[float, float] | None = None
    x_from_zero: bool = False
    y_from_zero: bool = False
    rows: Sequence[str] = ()  # labels of the y axis in place of numbers, each for a row of height 1, from the top
    rules: Sequence[Rule] = ()
    cells: Sequence[Cell] = ()


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


def drawn(figure: Figure | None, title: str, caption: str) -> str:
    """A titled figure; nothing if there is none."""
    if figure is None:
        return ""
    return f"<figure><h4>{escape(title)}</h4>{drawing(figure, title)}<figcaption>{caption}</figcaption></figure>\n"


def drawing(figure: Figure, title: str) -> str:
    """The HTML of a figure: legend, plot and labels; a screen reader says the title."""
    heights = [y for trace in figure.traces for _, y in trace.points if y is not None]
    x = _Axis([x for trace in figure.traces for x, _ in trace.points], figure.x_range, figure.x_from_zero)
    # Upside down, so that the first row stands on top.
    ends = (float(len(figure.rows)), 0.0) if figure.rows else None
    y = _Axis([*heights, *(rule.y for rule in figure.rules)], ends, figure.y_from_zero, upward=True)
    if figure.rows:
        y.ticks = [(place + 0.5, label) for place, label in enumerate(figure.rows)]
    longest = max(4, *(len(text) for _, text in y.ticks))
    # Above the plot, where no line can cross it.
    above = f'<p class="chart-title">{escape(figure.y_title)}</p>' if figure.y_title else ""
    return (
        f'{_legend(figure)}{above}<div class="chart" style="height:{figure.height}px;--label:{longest}ch">'
        f'<svg viewBox="0 0 {FULL} {FULL}" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">'
        f"{''.join(_svg(figure, x, y))}</svg>{''.join(_labels(figure, x, y))}</div>"
    )


class _Axis:
    """Values to coordinates from 0 to 1000, and the ticks with their texts."""

    def __init__(
        self, values: Sequence[float], ends: tuple[float, float] | None, from_zero: bool, upward: bool = False
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
    """Multiples of 1, 2 or 5 and a power of ten, about so many of them, from `low` to `high`."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    return [float(f"{n * step:.6g}") for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _ink(color: str) -> str:
    # A variable and no colour: the same SVG is read on a light page and on a dark one.
    return f"var(--k{color[1:]})"


def _legend(figure: Figure) -> str:
    """The names of traces, each once; none for one trace."""
    items = {}
    for trace in (trace for trace in figure.traces if trace.in_legend):
        border = _BORDERS.get(trace.dash, "dashed")
        style = f"color:{_ink(trace.color)};opacity:{trace.opacity};border-top-style:{border}"
        kind = "line" if trace.width else "dot"
        items[trace.name] = f'<li><i class="{kind}" style="{style}"></i>{escape(trace.name)}</li>'
    return f'<ul class="legend">{"".join(items.values())}</ul>' if len(items) > 1 else ""


def _labels(figure: Figure, x: _Axis, y: _Axis) -> Iterator[str]:
    for value, text in y.ticks:
        yield f'<span class="y" style="top:{y.at(value) / 10}%">&lrm;{escape(text)}&lrm;</span>'
    for value, text in x.ticks:
        yield f'<span class="x" style="left:{x.at(value) / 10}%">{text}</span>'
    yield f'<span class="x-title">{escape(figure.x_title)}</span>'
    for rule in figure.rules:
        yield f'<span class="note" style="top:{y.at(rule.y) / 10}%">{escape(rule.text)}</span>'


def _svg(figure: Figure, x: _Axis, y: _Axis) -> Iterator[str]:
    if not figure.rows:
        yield from (f'<path class="grid" d="M0 {y.at(value):g}H{FULL}"/>' for value, _ in y.ticks)
    for rule in figure.rules:
        yield _stroke(f"M0 {y.at(rule.y):g}H{FULL}", rule.color, 1.4, rule.dash)
    if figure.cells:
        gap = FULL * 1.5 / figure.height
        yield f'<g class="cell" style="fill:{_ink(BLUE)}">'
        for cell in figure.cells:
            left, right, top, foot = x.at(cell.start), x.at(cell.stop), y.at(cell.row), y.at(cell.row + 1)
            d = f"M{left:g} {top + gap:.1f}H{right:g}V{foot - gap:.1f}H{left:g}Z"
            title = _title(cell.text) if len(figure.cells) <= MOST_LABELLED else ""
            yield f'<path d="{d}" fill-opacity="{0.06 + 0.84 * cell.share:.2f}">{title}</path>'
        yield "</g>"
    labelled = sum(len(trace.texts) for trace in figure.traces) <= MOST_LABELLED
    for trace in figure.traces:
        if trace.width:
            yield _stroke(_path(trace, x, y), trace.color, trace.width, trace.dash, trace.opacity, trace.name)
        if trace.dot or (trace.texts and labelled):
            yield _points(trace, x, y, labelled)


def _title(text: str) -> str:
    return f"<title>{escape(text, quote=False)}</title>" if text else ""


def _stroke(path: str, color: str, width: float, dash: str, opacity: float = 1, title: str = "") -> str:
    dashed = f' stroke-dasharray="{_DASHES[dash]}"' if dash in _DASHES else ""
    style = f'style="stroke:{_ink(color)}" stroke-width="{width}" stroke-opacity="{opacity}"{dashed}'
    return f'<path class="stroke" d="{path}" {style}>{_title(title)}</path>'


def _path(trace: Trace, x: _Axis, y: _Axis) -> str:
    path, pen_down = "", False
    for step, height in trace.points:
        if height is not None:
            left, top = x.at(step), y.at(height)
            across = f"H{left:g}V{top:g}" if trace.stairs else f"L{left:g} {top:g}"
            path += across if pen_down else f"M{left:g} {top:g}"
        pen_down = height is not None
    return path


def _points(trace: Trace, x: _Axis, y: _Axis, labelled: bool) -> str:
    """Dots, or places where the pointer reads a line; of many, small ones without a text. Equal ones are one."""
    texts = trace.texts if labelled and trace.texts else [""] * len(trace.points)
    form, size = ("g", trace.dot or 9) if labelled else (".0f", max(2, (trace.dot or 9) / 2))
    # A line of almost no length with round ends is a dot that keeps its shape when the SVG is stretched.
    dots = {
        f"M{x.at(step):{form}} {y.at(height):{form}}h.1": text
        for (step, height), text in zip(trace.points, texts, strict=True)
        if height is not None
    }
    made = f'<path d="{"".join(dots)}"/>'
    if any(texts):
        made = "".join(f'<path d="{where}">{_title(text)}</path>' for where, text in dots.items())
    look = f'style="stroke:{_ink(trace.color)}" stroke-width="{size}"'
    cap = "square" if trace.square else "round"
    return f'<g class="{"point" if trace.dot else "read"}" {look} stroke-linecap="{cap}">{made}</g>'
