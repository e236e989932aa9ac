"""A drawing: a figure as data, and as SVG between HTML labels, which needs no script and no library.

It stretches with the page while its letters and lines keep their size: the SVG's coordinates run from 0 to 1000 both
ways, and labels stand outside of it at shares of its width and height.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape as escape_html
from html import unescape
from typing import Any

from setpoint.report.numbers import digits, exact

Trace = dict[str, Any]

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
AXES = {"step": "optimizer step", "seconds": "training time (s)", "flops": "training FLOPs"}
# The SVG has these units both ways; the browser stretches them to the size of the page.
FULL = 1000
MOST_LABELLED = 240
"""Points of a figure that have a text each, which shows under the pointer; with more, the file would grow large."""
MARKS = {
    "circle": "M5 0A5 5 0 1 1 5-.01Z",
    "square": "M-4.5-4.5h9v9h-9Z",
    "diamond": "M0-6L6 0L0 6L-6 0Z",
    "triangle-up": "M0-6L5.5 4.5h-11Z",
    "triangle-down": "M0 6L5.5-4.5h-11Z",
    "cross": "M-2-5.5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5v-4h3.5Z",
    "bowtie": "M-5.5-5.5L5.5 5.5V-5.5L-5.5 5.5Z",
    "hourglass": "M-5.5-5.5L5.5 5.5H-5.5L5.5-5.5Z",
    "pentagon": "M0-6L5.7-1.9L3.5 4.9h-7L-5.7-1.9Z",
}
"""Shapes of marks, as paths around 0."""
_SHADES = 5
_DASHES = {"dash": "7 5", "dot": "2 4", "dashdot": "8 4 2 4", "longdash": "13 5"}
_BORDERS = {"solid": "solid", "dot": "dotted"}
_FIELD = re.compile(r"%\{(\w+)(?:\[(\d+)\])?(?::([^}]*))?\}")


@dataclass(frozen=True)
class Figure:
    """Traces, and the layout they share; both have the keys that Plotly gives them."""

    data: Sequence[Trace]
    layout: Mapping[str, Any]


def scatter(mode: str, name: str, points: Iterable[tuple[Any, Any]], hover: str, **more: Any) -> Trace:
    """Lines or markers at (x, y) points, with the text that shows under the pointer."""
    points = list(points)
    trace = {"type": "scatter", "mode": mode, "name": name, "x": [x for x, _ in points], "y": [y for _, y in points]}
    return trace | {"hovertemplate": hover} | more


def line(
    name: str,
    points: Sequence[tuple[float, float]],
    color: str,
    *,
    dash: str = "solid",
    width: float = 1.8,
    shape: str = "linear",
    hover: str = "%{y:.4g}",
) -> Trace:
    """A line through (step, value) points."""
    look = {"color": color, "dash": dash, "width": width, "shape": shape}
    return scatter("lines", name, points, f"<b>{name}</b> at step %{{x:,d}}<br>{hover}", line=look)


def layout(y_title: str, x_title: str = AXES["step"], height: int = 360, **more: Any) -> dict[str, Any]:
    """A layout with titled axes."""
    # The keys are those of Plotly, whose words for axes many people know; nothing of it is used.
    return {"height": height, "xaxis": {"title": {"text": x_title}}, "yaxis": {"title": {"text": y_title}}, **more}


def escape(text: str) -> str:
    """Text for labels, in which HTML and `%{...}` placeholders have a meaning."""
    return escape_html(text).replace("{", "&#123;")


def drawing(figure: Figure, title: str) -> str:
    """The HTML of a figure: legend, plot and labels.

    Args:
        figure: traces of scatter and heatmap. Of scatter, a list of symbols is one of `MARKS`, which keep their shape,
            each with "-open" or without.
        title: what a screen reader says of it.
    """
    plot = _Plot(figure)
    drawn = "".join(part for trace in figure.data for part in plot.drawn(trace))
    size = f"height:{figure.layout['height']}px;--label:{plot.longest_label()}ch"
    y_title = figure.layout["yaxis"].get("title", {}).get("text")
    # Above the plot, where no line can cross it.
    above = f'<p class="chart-title">{y_title}</p>' if y_title else ""
    return (
        f'{_legend(figure)}{above}<div class="chart" style="{size}">'
        f'<svg viewBox="0 0 {FULL} {FULL}" preserveAspectRatio="none" role="img" aria-label="{escape_html(title)}">'
        f"{''.join(plot.rules())}{drawn}</svg>{''.join(plot.labels())}{''.join(plot.marks())}</div>"
    )


def mark(symbol: str, color: str, place: str = "", text: str = "") -> str:
    """A mark as SVG of its own: full, or open where the symbol ends with "-open"."""
    shape = symbol.removesuffix("-open")
    fill = "currentColor" if shape == symbol else "var(--panel)"
    title = f"<title>{escape_html(text, quote=False)}</title>" if text else ""
    return (
        f'<svg class="mark" viewBox="-7 -7 14 14" style="color:{ink(color)};{place}">'
        f'<path d="{MARKS[shape]}" style="fill:{fill}"/>{title}</svg>'
    )


def scheme() -> str:
    """Style of the figures' colours, on a light page and on a dark one."""
    light, dark = ("".join(f"--k{key[1:]}:{look[key]};" for key in DARK) for look in ({key: key for key in DARK}, DARK))
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def ink(color: str) -> str:
    """A colour in CSS: of those that a dark page changes, its name there."""
    # A variable and no colour: the same SVG is read on a light page and on a dark one.
    return f"var(--k{color[1:]})" if color in DARK else color


def _shade(share: float | None) -> str:
    """From blue for 0 over grey to orange for 1, in few steps; grey where nothing is known."""
    level = round((0.5 if share is None else share) * (_SHADES - 1)) / (_SHADES - 1)
    return f"color-mix(in srgb,{ink(BLUE if level < 0.5 else ORANGE)} {abs(2 * level - 1):.0%},{ink(GREY)})"


def _legend(figure: Figure) -> str:
    if not figure.layout.get("showlegend", True):
        return ""
    items = {}
    for trace in figure.data:
        look = trace.get("line") or trace.get("marker") or {}
        if trace.get("name") and trace.get("showlegend", True) and isinstance(look.get("color"), str):
            kind = "line" if str(trace.get("mode")).startswith("lines") else "dot"
            style = f"color:{ink(look['color'])};opacity:{trace.get('opacity', 1)}"
            border = f";border-top-style:{_BORDERS.get(look.get('dash', 'solid'), 'dashed')}"
            name = escape_html(_plain(trace["name"]), quote=False)
            # By name, so that a hundred traces of one kind have one line in the legend.
            items[trace["name"]] = f'<li><i class="{kind}" style="{style}{border}"></i>{name}</li>'
    if shaded := figure.layout.get("shades", ""):
        dots = "".join(f'<i class="dot" style="color:{_shade(n / (_SHADES - 1))}"></i>' for n in range(_SHADES))
        items[shaded] = f"<li>{dots}{escape_html(shaded)}, 0 to 1</li>"
    return f'<ul class="legend">{"".join(items.values())}</ul>' if len(items) > 1 else ""


class _Plot:
    """A figure's axes, and what they make of its traces."""

    def __init__(self, figure: Figure) -> None:
        self.layout, self.traces = figure.layout, figure.data
        points = sum(len(trace["x"]) for trace in self.traces if trace.get("hoverinfo") != "skip")
        self.labelled = points <= MOST_LABELLED
        rules = [rule["y0"] for rule in self.layout.get("shapes", ()) if "y0" in rule]
        self.x = _Axis(self.layout["xaxis"], [x for trace in self.traces for x in (*trace["x"], *_spans(trace, "x"))])
        ys = [y for trace in self.traces for y in (*trace["y"], *_spans(trace, "y"))]
        self.y = _Axis(self.layout["yaxis"], ys + rules, upward=True)

    def longest_label(self) -> int:
        """Letters of the longest label at the y axis."""
        return max(4, *(len(_plain(text)) for _, text in self.y.ticks))

    def rules(self) -> Iterator[str]:
        """Lines of the grid, then those across the plot."""
        if self.layout["yaxis"].get("showgrid", True):
            yield from (f'<path class="grid" d="M0 {self.y.at(value):g}H{FULL}"/>' for value, _ in self.y.ticks)
        if self.layout["xaxis"].get("showgrid"):
            yield from (f'<path class="grid" d="M{self.x.at(value):g} 0V{FULL}"/>' for value, _ in self.x.ticks)
        for rule in self.layout.get("shapes", ()):
            upright = "x0" in rule
            path = f"M{self.x.at(rule['x0']):g} 0V{FULL}" if upright else f"M0 {self.y.at(rule['y0']):g}H{FULL}"
            yield _stroke(path, rule["line"])

    def labels(self) -> Iterator[str]:
        """Numbers and titles at the axes, and the notes on lines across the plot."""
        for value, text in self.y.ticks:
            yield f'<span class="y" style="top:{self.y.at(value) / 10}%">&lrm;{text}&lrm;</span>'
        for value, text in self.x.ticks:
            yield f'<span class="x" style="left:{self.x.at(value) / 10}%">{text}</span>'
        yield f'<span class="x-title">{escape_html(self.layout["xaxis"]["title"]["text"])}</span>'
        for note in self.layout.get("annotations", ()):
            yield f'<span class="note" style="top:{self.y.at(note["y"]) / 10}%">{note["text"]}</span>'

    def marks(self) -> Iterator[str]:
        """Marks, which stand outside of the stretched SVG so that they keep their shapes."""
        for trace in self.traces:
            symbols = trace.get("marker", {}).get("symbol")
            if isinstance(symbols, list):
                for place, (x, y) in enumerate(zip(trace["x"], trace["y"], strict=True)):
                    where = f"left:{self.x.at(x) / 10:g}%;top:{self.y.at(y) / 10:g}%"
                    yield mark(symbols[place], trace["marker"]["color"], where, _text(trace, place))

    def drawn(self, trace: Trace) -> Iterator[str]:
        """A trace as SVG."""
        if trace["type"] == "heatmap":
            yield from self._cells(trace)
            return
        if "lines" in trace["mode"]:
            path = self._lives(trace) if None in trace["x"] else self._path(trace)
            yield _stroke(path, trace["line"], trace.get("opacity", 1), trace["name"])
        if isinstance(trace.get("marker", {}).get("symbol"), list):
            yield _stroke(self._errors(trace), {"color": trace["marker"]["color"], "width": 1})
        elif None not in trace["x"]:
            yield from self._points(trace)

    def _errors(self, trace: Trace) -> str:
        """Lines from the value less its error to the value and its error, both ways."""
        path = ""
        for x, y, right, up in zip(
            trace["x"], trace["y"], trace["error_x"]["array"], trace["error_y"]["array"], strict=True
        ):
            path += f"M{self.x.at(x - right):g} {self.y.at(y):g}H{self.x.at(x + right):g}" if right else ""
            path += f"M{self.x.at(x):g} {self.y.at(y - up):g}V{self.y.at(y + up):g}" if up else ""
        return path

    def _lives(self, trace: Trace) -> str:
        """A line across for each unit. Thousands of them lie on few pixels, so those on one row are joined."""
        rows: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for start, y, stop in zip(trace["x"][::3], trace["y"][::3], trace["x"][1::3], strict=True):
            rows[f"{self.y.at(y):.0f}"].append((self.x.at(start), self.x.at(stop)))
        return "".join(f"M{at:.0f} {row}H{end:.0f}" for row, spans in rows.items() for at, end in _joined(spans))

    def _path(self, trace: Trace) -> str:
        steps, path, pen_down = trace["line"].get("shape") == "hv", "", False
        for x, y in zip(trace["x"], trace["y"], strict=True):
            if y is None:  # a gap in the line
                pen_down = False
                continue
            left, top = self.x.at(x), self.y.at(y)
            path += f"H{left:g}V{top:g}" if pen_down and steps else f"{'L' if pen_down else 'M'}{left:g} {top:g}"
            pen_down = True
        return path

    def _points(self, trace: Trace) -> Iterator[str]:
        """Markers, or places where the pointer reads a line; each has a text where there are few of them."""
        on_line, marker = "markers" not in trace["mode"], trace.get("marker", {})
        if on_line and (not self.labelled or trace.get("hoverinfo") == "skip"):
            return
        colors = marker.get("color", trace.get("line", {}).get("color", GREY))
        by_color: dict[str, dict[str, None]] = defaultdict(dict)  # a dict, since equal points are drawn once
        for place, (x, y) in enumerate(zip(trace["x"], trace["y"], strict=True)):
            if y is None:
                continue
            form = "g" if self.labelled else ".0f"
            where = f"M{self.x.at(x):{form}} {self.y.at(y):{form}}h.1"
            color = ink(colors) if isinstance(colors, str) else _shade(colors[place])
            text = escape_html(_text(trace, place), quote=False) if self.labelled else ""
            by_color[color][f'<path d="{where}"><title>{text}</title></path>' if text else where] = None
        size = 9 if on_line else marker.get("size", 6)
        wide, cap = (size, "round") if self.labelled else (max(2, size / 2), "round")
        if marker.get("symbol") == "square":
            cap = "square"
        for color, points in by_color.items():
            look = f'style="stroke:{color}" stroke-width="{wide}" stroke-linecap="{cap}"'
            made = "".join(points) if self.labelled else f'<path d="{"".join(points)}"/>'
            yield f'<g class="{"read" if on_line else "point"}" {look}>{made}</g>'

    def _cells(self, trace: Trace) -> Iterator[str]:
        """Shares as depths of blue; equal ones side by side are one cell. Of many cells, shares are rounded."""
        gap = FULL * trace["ygap"] / self.layout["height"]
        many = sum(len(set(shares)) for shares in trace["z"]) > MOST_LABELLED
        shades: dict[float, list[str]] = defaultdict(list)
        for row, (exact_shares, texts) in enumerate(zip(trace["z"], trace["text"], strict=True)):
            shares = [round(share, 1) for share in exact_shares] if many else exact_shares
            top, foot = self.y.at(trace["y"][row]), self.y.at(trace["y"][row + 1])
            starts = [n for n, share in enumerate(shares) if not n or share != shares[n - 1]]
            for start, stop in zip(starts, [*starts[1:], len(shares)], strict=True):
                left, right = self.x.at(trace["x"][start]), self.x.at(trace["x"][stop])
                where = f"M{left:g} {top + gap / 2:.1f}H{right:g}v{foot - top - gap:.1f}H{left:g}Z"
                text = escape_html(_plain(texts[start]), quote=False)
                shades[shares[start]].append(where if many else f'<path d="{where}"><title>{text}</title></path>')
        for share, cells in shades.items():
            made = f'<path d="{"".join(cells)}"/>' if many else "".join(cells)
            yield f'<g class="cell" style="fill:{ink(BLUE)};fill-opacity:{0.06 + 0.84 * share:.2f}">{made}</g>'


class _Axis:
    """Values to coordinates from 0 to 1000, and the ticks with their texts."""

    def __init__(self, given: Mapping[str, Any], values: Sequence[Any], upward: bool = False) -> None:
        finite = [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        if given.get("rangemode") == "tozero":
            low, high = min(low, 0.0), max(high, 0.0)
        if "range" in given:
            # A range may be given upside down: the first group of a list stands on top.
            low, high = given["range"]
        elif upward:
            high += 0.06 * (high - low)
        self.low, self.high = float(low), float(high) if high != low else low + 1.0
        # Coordinates of SVG count from the top.
        self.start, self.end = (FULL, 0) if upward else (0, FULL)
        if "tickvals" in given:
            self.ticks = list(zip(given["tickvals"], given["ticktext"], strict=True))
        else:
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
    # As people choose ticks: the nearest of 1, 2 and 5 times a power of ten.
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


def _spans(trace: Trace, axis: str) -> list[float]:
    """Where the lines of errors begin and end."""
    errors = trace.get(f"error_{axis}", {}).get("array", ())
    return [value + side * error for value, error in zip(trace[axis], errors, strict=False) for side in (-1, 1)]


def _stroke(path: str, look: Mapping[str, Any], opacity: float = 1, title: str = "") -> str:
    dash = _DASHES.get(look.get("dash", "solid"))
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    style = f'style="stroke:{ink(look["color"])}" stroke-width="{look["width"]}" stroke-opacity="{opacity}"{dashed}'
    return f'<path class="stroke" d="{path}" {style}>' + (f"<title>{title}</title></path>" if title else "</path>")


def _text(trace: Trace, place: int) -> str:
    """What the pointer reads at a point: the trace's template, filled in."""

    def value(field: re.Match[str]) -> str:
        name, index, form = field.groups()
        shown = trace["customdata"][place][int(index)] if index else trace[name][place]
        if not isinstance(shown, (int, float)):
            return str(shown)
        return format(shown, form.replace("d", ".0f")) if form else exact(shown)

    return _plain(_FIELD.sub(value, str(trace.get("hovertemplate", ""))))


def _plain(text: str) -> str:
    """A label's text, with lines for its breaks and without other markup."""
    # A <title> of SVG shows no markup, and a line break as it is.
    return unescape(re.sub("<[^>]*>", "", text.replace("<br>", "\n")))
