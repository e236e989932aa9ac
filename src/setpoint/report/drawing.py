"""A drawing: a figure as SVG between HTML labels, which needs no script and no library.

It stretches with the page while its letters and lines keep their size: the SVG's coordinates run from 0 to 1000 both
ways, and labels stand outside of it at shares of its width and height.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape, unescape
from typing import Any

from setpoint.report.figures import BLUE, DARK, GREY, ORANGE, Figure, Trace
from setpoint.report.numbers import digits, exact

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


def drawing(figure: Figure, title: str) -> str:
    """The HTML of a figure: legend, plot and labels.

    Args:
        figure: traces of scatter, bar, histogram and heatmap; a second y axis, where there is one, has a domain below.
            Of scatter, a list of symbols is one of `MARKS`, which keep their shape, each with "-open" or without.
        title: what a screen reader says of it.
    """
    plot = _Plot(figure)
    marks = "".join(mark for trace in plot.traces for mark in plot.drawn(trace))
    size = f"height:{figure.layout['height']}px;--label:{plot.longest()}ch"
    return (
        f'{_legend(figure)}{_y_title(figure)}<div class="chart" style="{size}">'
        f'<svg viewBox="0 0 {FULL} {FULL}" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">'
        f"{''.join(plot.rules())}{marks}</svg>{''.join(plot.labels())}{''.join(plot.marks())}</div>"
    )


def mark(symbol: str, color: str, place: str = "", text: str = "") -> str:
    """A mark as SVG of its own: full, or open where the symbol ends with "-open"."""
    shape = symbol.removesuffix("-open")
    fill = "currentColor" if shape == symbol else "var(--panel)"
    title = f"<title>{escape(text, quote=False)}</title>" if text else ""
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
    return f"var(--k{color[1:]})" if color in DARK else color


def _shade(share: float | None) -> str:
    """From blue for 0 over grey to orange for 1, in few steps; grey where nothing is known."""
    level = round((0.5 if share is None else share) * (_SHADES - 1)) / (_SHADES - 1)
    return f"color-mix(in srgb,{ink(BLUE if level < 0.5 else ORANGE)} {abs(2 * level - 1):.0%},{ink(GREY)})"


def _dot(trace: Trace) -> str:
    """The class of a trace's mark in a legend."""
    return "dot square" if trace.get("marker", {}).get("symbol") == "square" else "dot"


def _legend(figure: Figure) -> str:
    if not figure.layout.get("showlegend", True):
        return ""
    items = {}
    for trace in figure.data:
        look = trace.get("line") or trace.get("marker") or {}
        if trace.get("name") and trace.get("showlegend", True) and isinstance(look.get("color"), str):
            kind = "line" if str(trace.get("mode")).startswith("lines") else _dot(trace)
            style = f"color:{ink(look['color'])};opacity:{trace.get('opacity', 1)}"
            dashed = f";border-top-style:{_BORDERS.get(look.get('dash', 'solid'), 'dashed')}"
            items[trace["name"]] = (
                f'<li><i class="{kind}" style="{style}{dashed}"></i>{escape(_plain(trace["name"]), quote=False)}</li>'
            )
    found = figure.layout.get("coloraxis", {}).get("colorbar", {}).get("title", {}).get("text")
    if found:
        kind = "dot square" if any("square" in _dot(trace) for trace in figure.data) else "dot"
        keys = "".join(f'<i class="{kind}" style="color:{_shade(n / (_SHADES - 1))}"></i>' for n in range(_SHADES))
        items[found] = f"<li>{keys}{escape(found)}, 0 to 1</li>"
    return f'<ul class="legend">{"".join(items.values())}</ul>' if len(items) > 1 else ""


def _y_title(figure: Figure) -> str:
    """What the y axis counts, above it, where nothing can lie over it."""
    title = figure.layout["yaxis"].get("title", {}).get("text")
    return f'<p class="chart-title">{title}</p>' if title else ""


class _Plot:
    """A figure's axes, and what they make of its traces."""

    def __init__(self, figure: Figure) -> None:
        self.layout = figure.layout
        self.traces = _stacked([_counted(trace) for trace in figure.data], str(figure.layout.get("barmode", "")))
        self.labelled = (
            sum(len(trace["x"]) for trace in self.traces if trace.get("hoverinfo") != "skip") <= MOST_LABELLED
        )
        across = [x for trace in self.traces for x in (*_ends(trace), *_spans(trace, "x"))]
        self.x = _Axis(self.layout["xaxis"], across, (0.0, 1.0))
        self.ys = {}
        for name, key in (("y", "yaxis"), ("y2", "yaxis2")):
            if key in self.layout:
                mine = [trace for trace in self.traces if trace.get("yaxis", "y") == name]
                values = [each for trace in mine for each in (*trace["y"], *_tops(trace), *_spans(trace, "y"))]
                lines = [shape["y0"] for shape in self.layout.get("shapes", ()) if shape.get("yref") != "paper"]
                domain = self.layout[key].get("domain", (0.0, 1.0))
                self.ys[name] = _Axis(self.layout[key], values + (lines if name == "y" else []), domain, upward=True)

    def longest(self) -> int:
        """Letters of the longest label at the y axis."""
        return max(4, *(len(unescape(re.sub("<[^>]*>", "", text))) for y in self.ys.values() for _, text in y.ticks))

    def rules(self) -> Iterator[str]:
        """Lines of the grid, then those across the plot."""
        for axis in self.ys.values():
            for value, _ in (
                axis.ticks if self.layout["yaxis"].get("showgrid", True) or axis is not self.ys["y"] else ()
            ):
                yield f'<path class="grid" d="M0 {axis.at(value):g}H{FULL}"/>'
        if self.layout["xaxis"].get("showgrid"):
            yield from (f'<path class="grid" d="M{self.x.at(value):g} 0V{FULL}"/>' for value, _ in self.x.ticks)
        for shape in self.layout.get("shapes", ()):
            upright = shape.get("yref") == "paper"
            across = (
                f"M{self.x.at(shape['x0']):g} 0V{FULL}" if upright else f"M0 {self.ys['y'].at(shape['y0']):g}H{FULL}"
            )
            yield _stroke(across, shape["line"])

    def labels(self) -> Iterator[str]:
        """Numbers and titles at the axes, and the notes on lines across the plot."""
        for axis in self.ys.values():
            yield from (
                f'<span class="y" style="top:{axis.at(v) / 10}%">&lrm;{text}&lrm;</span>' for v, text in axis.ticks
            )
        yield from (f'<span class="x" style="left:{self.x.at(v) / 10}%">{text}</span>' for v, text in self.x.ticks)
        yield f'<span class="x-title">{escape(self.layout["xaxis"]["title"]["text"])}</span>'
        for note in self.layout.get("annotations", ()):
            yield f'<span class="note" style="top:{self.ys["y"].at(note["y"]) / 10}%">{note["text"]}</span>'

    def marks(self) -> Iterator[str]:
        """Marks, which stand outside of the SVG so that they keep their shapes."""
        for trace in self.traces:
            if isinstance(symbols := trace.get("marker", {}).get("symbol"), list):
                y = self.ys[trace.get("yaxis", "y")]
                for place, (at, value) in enumerate(zip(trace["x"], trace["y"], strict=True)):
                    where = f"left:{self.x.at(at) / 10:g}%;top:{y.at(value) / 10:g}%"
                    yield mark(symbols[place], trace["marker"]["color"], where, _text(trace, place))

    def drawn(self, trace: Trace) -> Iterator[str]:
        """A trace as SVG."""
        y = self.ys[trace.get("yaxis", "y")]
        if trace["type"] == "heatmap":
            yield from self._cells(trace, y)
        elif trace["type"] == "bar":
            yield from self._bars(trace, y)
        else:
            if "lines" in trace["mode"]:
                yield _stroke(self._path(trace, y), trace["line"], trace.get("opacity", 1), trace["name"])
            if isinstance(trace.get("marker", {}).get("symbol"), list):
                yield _stroke(self._errors(trace, y), {"color": trace["marker"]["color"], "width": 1})
            else:
                yield from self._points(trace, y)

    def _errors(self, trace: Trace, y: _Axis) -> str:
        """Lines from the value less its error to the value and its error, both ways."""
        found = ""
        for place, (at, value) in enumerate(zip(trace["x"], trace["y"], strict=True)):
            if error := trace["error_x"]["array"][place]:
                found += f"M{self.x.at(at - error):g} {y.at(value):g}H{self.x.at(at + error):g}"
            if error := trace["error_y"]["array"][place]:
                found += f"M{self.x.at(at):g} {y.at(value - error):g}V{y.at(value + error):g}"
        return found

    def _path(self, trace: Trace, y: _Axis) -> str:
        if None in trace["x"]:  # a separate line for each unit, of which many may lie on one pixel
            rows: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for start, value, stop in zip(trace["x"][::3], trace["y"][::3], trace["x"][1::3], strict=True):
                rows[f"{y.at(value):.0f}"].append((self.x.at(start), self.x.at(stop)))
            return "".join(f"M{at:.0f} {row}H{end:.0f}" for row, spans in rows.items() for at, end in _joined(spans))
        steps, made, pen = trace["line"].get("shape") == "hv", list[str](), False
        for at, value in zip(trace["x"], trace["y"], strict=True):
            if value is None:
                pen = False
                continue
            left, top = self.x.at(at), y.at(value)
            made.append(f"H{left:g}V{top:g}" if pen and steps else f"{'L' if pen else 'M'}{left:g} {top:g}")
            pen = True
        return "".join(made)

    def _points(self, trace: Trace, y: _Axis) -> Iterator[str]:
        """Markers, or places where the pointer reads a line; each has a text where there are few of them."""
        on_line, marker = "markers" not in trace["mode"], trace.get("marker", {})
        if (on_line and (not self.labelled or trace.get("hoverinfo") == "skip")) or (None in trace["x"]):
            return
        reach = FULL * 5 / self.layout["height"]
        tick, size = marker.get("symbol") == "line-ns-open", 9 if on_line else marker.get("size", 6)
        cap = "butt" if tick else "square" if marker.get("symbol") == "square" else "round"
        colors = marker.get("color", trace.get("line", {}).get("color", GREY))
        by_color: dict[str, dict[str, None]] = defaultdict(dict)
        for place, (at, value) in enumerate(zip(trace["x"], trace["y"], strict=True)):
            if value is None:
                continue
            left, top = self.x.at(at), y.at(value)
            form = "g" if self.labelled else ".0f"
            where = f"M{left:{form}} {top - reach if tick else top:{form}}" + (f"v{2 * reach:.0f}" if tick else "h.1")
            text = f"<title>{escape(_text(trace, place), quote=False)}</title>" if self.labelled else ""
            color = ink(colors) if isinstance(colors, str) else _shade(colors[place])
            by_color[color][f'<path d="{where}">{text}</path>' if text else where] = None
        wide = size if self.labelled else max(2, size / 2)
        for color, found in by_color.items():
            look = f'style="stroke:{color}" stroke-width="{2 if tick else wide}" stroke-linecap="{cap}"'
            made = "".join(found) if self.labelled else f'<path d="{"".join(found)}"/>'
            yield f'<g class="{"read" if on_line else "point"}" {look}>{made}</g>'

    def _bars(self, trace: Trace, y: _Axis) -> Iterator[str]:
        for place, (at, value) in enumerate(zip(trace["x"], trace["y"], strict=True)):
            base = trace["base"][place]
            left, right = self.x.at(at - trace["width"] / 2), self.x.at(at + trace["width"] / 2)
            top, foot = sorted((y.at(base + value), y.at(base)))
            color = ink(trace["marker"]["color"])
            where = f'x="{left:g}" y="{top:g}" width="{max(2, right - left):.1f}" height="{foot - top:.1f}"'
            yield f'<rect {where} style="fill:{color}"><title>{escape(_text(trace, place), quote=False)}</title></rect>'

    def _cells(self, trace: Trace, y: _Axis) -> Iterator[str]:
        """Shares as depths of blue; equal ones side by side are one cell. Of many cells, shares are rounded."""
        gap = FULL * trace["ygap"] / self.layout["height"]
        many = sum(len(set(values)) for values in trace["z"]) > MOST_LABELLED
        shades: dict[float, list[str]] = defaultdict(list)
        for row, (given, texts) in enumerate(zip(trace["z"], trace["text"], strict=True)):
            values = [round(value, 1) for value in given] if many else given
            top, foot = y.at(trace["y"][row]), y.at(trace["y"][row + 1])
            starts = [n for n, value in enumerate(values) if not n or value != values[n - 1]]
            for start, stop in zip(starts, [*starts[1:], len(values)], strict=True):
                left, right = self.x.at(trace["x"][start]), self.x.at(trace["x"][stop])
                where = f"M{left:g} {top + gap / 2:.1f}H{right:g}v{foot - top - gap:.1f}H{left:g}Z"
                text = "" if many else f"<title>{escape(_plain(texts[start]), quote=False)}</title>"
                shades[values[start]].append(where if many else f'<path d="{where}">{text}</path>')
        for value, found in shades.items():
            made = f'<path d="{"".join(found)}"/>' if many else "".join(found)
            yield f'<g class="cell" style="fill:{ink(BLUE)};fill-opacity:{0.06 + 0.84 * value:.2f}">{made}</g>'


class _Axis:
    """Values to coordinates from 0 to 1000, and the ticks with their texts."""

    def __init__(
        self, given: Mapping[str, Any], values: Sequence[Any], domain: Sequence[float], upward: bool = False
    ) -> None:
        found = [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)] or [0.0, 1.0]
        low, high = min(found), max(found)
        if given.get("rangemode") == "tozero":
            low, high = min(low, 0.0), max(high, 0.0)
        if "range" in given:
            low, high = given["range"]
        elif upward:
            high += 0.06 * (high - low)
        self.low, self.high = float(low), float(high) if high != low else low + 1.0
        start, end = (FULL * share for share in domain)
        self.start, self.end = (FULL - start, FULL - end) if upward else (start, end)
        if "tickvals" in given:
            self.ticks = list(zip(given["tickvals"], given["ticktext"], strict=True))
        else:
            about = 5 if end - start > 0.3 * FULL else 2
            values = _round_values(min(self.low, self.high), max(self.low, self.high), about)
            self.ticks = [(value, _number(value)) for value in values]

    def at(self, value: float) -> float:
        """The coordinate of a value."""
        where = self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)
        return round(min(max(where, -FULL), 2 * FULL), 1)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else digits(value)


def _round_values(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 and a power of ten, about so many of them, from `low` to `high`.

    >>> _round_values(0, 170, 5)
    [0.0, 50.0, 100.0, 150.0]
    """
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda each: abs(math.log(each / rough)))
    return [float(f"{n * step:.6g}") for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _joined(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same in as few spans as there are gaps between them.

    >>> _joined([(0, 5), (7, 9), (3, 6)])
    [(0, 6), (7, 9)]
    """
    found: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


def _ends(trace: Trace) -> list[Any]:
    """Values that the x axis must hold."""
    wide = trace.get("width", 0) / 2 if trace["type"] == "bar" else 0
    return [x + side for x in trace["x"] if x is not None for side in {-wide, wide}]


def _spans(trace: Trace, axis: str) -> list[float]:
    """Where the lines of errors begin and end."""
    errors = trace.get(f"error_{axis}", {}).get("array", ())
    return [value + side * error for value, error in zip(trace[axis], errors, strict=False) for side in (-1, 1)]


def _tops(trace: Trace) -> list[float]:
    """Where bars begin and end."""
    base = trace.get("base", ())
    return [*base, *(start + y for start, y in zip(base, trace["y"], strict=False))]


def _counted(trace: Trace) -> Trace:
    """A histogram as bars."""
    if trace["type"] != "histogram":
        return trace
    start, size = trace["xbins"]["start"], trace["xbins"]["size"]
    counts: dict[float, int] = defaultdict(int)
    for value in trace["x"]:
        counts[start + size * (math.floor((value - start) / size) + 0.5)] += 1
    return {**trace, "type": "bar", "x": list(counts), "y": list(counts.values()), "width": size}


def _stacked(traces: Sequence[Trace], mode: str) -> list[Trace]:
    """Bars with a base each: on those of earlier traces that point the same way."""
    tops: dict[tuple[float, bool], float] = defaultdict(float)
    found = []
    for trace in traces:
        if trace["type"] == "bar":
            bases = []
            for x, y in zip(trace["x"], trace["y"], strict=True):
                bases.append(tops[x, y < 0] if mode in ("stack", "relative") else 0.0)
                tops[x, y < 0] += y
            trace = {**trace, "base": bases, "y": list(trace["y"])}
        found.append(trace)
    return found


def _stroke(path: str, look: Mapping[str, Any], opacity: float = 1, title: str = "") -> str:
    dash = _DASHES.get(look.get("dash", "solid"))
    more = f' stroke-dasharray="{dash}"' if dash else ""
    style = f'style="stroke:{ink(look["color"])}" stroke-width="{look["width"]}" stroke-opacity="{opacity}"{more}'
    return f'<path class="stroke" d="{path}" {style}>' + (f"<title>{title}</title></path>" if title else "</path>")


def _text(trace: Trace, place: int) -> str:
    """What the pointer reads at a point: the trace's template, filled in."""

    def value(found: re.Match[str]) -> str:
        name, index, form = found.groups()
        each = trace["customdata"][place][int(index)] if index else trace[name][place]
        if not isinstance(each, (int, float)):
            return str(each)
        return format(each, form.replace("d", ".0f")) if form else exact(each)

    return _plain(_FIELD.sub(value, str(trace.get("hovertemplate", ""))))


def _plain(text: str) -> str:
    """A label's text, with lines for its breaks and without other markup."""
    return unescape(re.sub("<[^>]*>", "", text.replace("<br>", "\n")))
