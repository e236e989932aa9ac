"""The picture: a small static SVG of a results folder, for pages that run no scripts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean

import numpy as np

from setpoint.errors import ReportError
from setpoint.report.drawing import DARK
from setpoint.report.numbers import digits, scale
from setpoint_bench.report.curves import spending_line
from setpoint_bench.report.folder import read_results
from setpoint_bench.report.looks import Style, styles
from setpoint_bench.report.results import Cell
from setpoint_bench.report.summary import series

WIDTH, HEIGHT = 880, 330
DASHES = {"solid": "", "dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3", "longdash": "11 4"}

Line = list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One plot of the picture: its place in pixels, its titles, and one line per method."""

    left: float
    title: str
    x_title: str
    lines: Mapping[str, Line]
    from_zero: bool = False

    top: float = 62.0
    width: float = 366.0
    height: float = 210.0


def write_picture(results_dir: Path, out: Path, task: str | None = None, labels: Collection[str] | None = None) -> Path:
    """Draw one task of a results folder: loss or accuracy against training FLOPs, and FLOPs per step over steps.

    A line is the mean over a method's runs where all were judged after the same steps, else the first one's; FLOPs per
    step are those of the first run. The SVG follows the reader's light or dark scheme.

    Args:
        task: the first one by default.
        labels: lines to draw, such as "dense" and "small 0.5", where they exist; all by default.

    Raises:
        ReportError: if the folder cannot be read, lacks the task or all labels, or holds no history of it.
    """
    results = read_results(results_dir)
    name = results.tasks()[0] if task is None else task
    if name not in results.tasks():
        raise ReportError(f"no task {name!r} in {results_dir}: it holds {', '.join(results.tasks())}")
    everything = series(results.of(name))
    groups = {label: cells for label, cells in everything.items() if labels is None or label in labels}
    if not groups:
        raise ReportError(f"none of {', '.join(labels or ())} is among the results of {name!r} in {results_dir}")
    metric = next(iter(groups.values()))[0].metric
    split = next((split for split in ("validation", "test", "train") if any_at(groups, split)), "train")
    learning = {label: line for label, cells in groups.items() if (line := mean_line(cells, metric, split))}
    if not learning:
        raise ReportError(
            f"no history of {name!r} in {results_dir}: a picture needs history.jsonl in the cells' folders"
        )
    spending = {label: line for label, cells in groups.items() if (line := spending_line(cells[0]))}
    factor, unit = scale(max((y for line in spending.values() for _, y in line), default=1.0), "FLOPs")
    counted, counts = scale(max(x for line in learning.values() for x, _ in line), "FLOPs")
    learned = {label: [(x / counted, y) for x, y in line] for label, line in learning.items()}
    data = f"{metric} {'in training' if split == 'train' else f'on {split} data'}"
    panels = [Panel(52, f"{data}{' (%)' if metric == 'accuracy' else ''}", f"training {counts}", learned)]
    if spending:
        scaled = {label: [(x, y / factor) for x, y in line] for label, line in spending.items()}
        panels.append(Panel(492, f"{unit} per step", "optimizer step", scaled, from_zero=True))
    out.parent.mkdir(parents=True, exist_ok=True)
    look = styles(list(groups), [cells[0].method for cells in everything.values()])
    out.write_text(drawing(name, panels, look), encoding="utf-8")
    return out


def any_at(groups: Mapping[str, Sequence[Cell]], split: str) -> bool:
    """Whether any run was judged on this split as it trained."""
    return any(point.split == split for cells in groups.values() for cell in cells for point in cell.history)


def mean_line(cells: Sequence[Cell], metric: str, split: str) -> Line:
    """The metric against training FLOPs, as a mean over the runs if all were judged after the same steps."""
    lines = [learning_line(cell, metric, split) for cell in cells]
    steps = [[point.step for point in cell.history if point.split == split] for cell in cells]
    if any(each != steps[0] for each in steps) or any(len(line) != len(lines[0]) for line in lines):
        return lines[0]
    return [(fmean(x for x, _ in points), fmean(y for _, y in points)) for points in zip(*lines, strict=True)]


def learning_line(cell: Cell, metric: str, split: str) -> Line:
    """The metric of one run against training FLOPs."""
    factor = 100.0 if metric == "accuracy" else 1.0
    return [
        (point.flops, value * factor)
        for point in cell.history
        if point.split == split and point.flops is not None and (value := getattr(point, metric)) is not None
    ]


def drawing(task: str, panels: Sequence[Panel], look: Mapping[str, Style]) -> str:
    """The SVG text, with the labels' styles."""
    colors = sorted({style.color for style in look.values()})
    light = "".join(f".c{place} {{ stroke: {color}; }} " for place, color in enumerate(colors))
    dark = "".join(f".c{place} {{ stroke: {DARK[color]}; }} " for place, color in enumerate(colors))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{escape(task)}: {escape(" and ".join(panel.title for panel in panels))}">',
        "<style>"
        "text { font: 12px system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; fill: #1c2430; } "
        ".title { font-weight: 600; font-size: 13px; } .soft { fill: #5a6575; } "
        ".ground { fill: #ffffff; } .grid { stroke: #e1e6ec; } .line { fill: none; stroke-linejoin: round; } "
        f"{light}@media (prefers-color-scheme: dark) {{ text {{ fill: #e6eaf0; }} .soft {{ fill: #a3acb9; }} "
        f".grid {{ stroke: #2a3441; }} .ground {{ fill: #12181f; }} {dark}}}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
    ]
    x = 52.0
    for label, style in look.items():
        parts.append(f'<path d="M{x:.0f} 18h26" {stroke(style, colors)}/>')
        parts.append(f'<text x="{x + 32:.0f}" y="22">{escape(label)}</text>')
        x += 44 + 6.8 * len(label)
    parts += [text for panel in panels for text in plot(panel, look, colors)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def stroke(look: Style, colors: Sequence[str]) -> str:
    """Attributes of a method's line."""
    dash = f' stroke-dasharray="{DASHES[look.dash]}"' if DASHES[look.dash] else ""
    return f'class="line c{colors.index(look.color)}" stroke-width="{look.width}"{dash}'


def plot(panel: Panel, look: Mapping[str, Style], colors: Sequence[str]) -> list[str]:
    """One panel: title, grid with numbers, and its lines."""
    points = np.array([point for line in panel.lines.values() for point in line], dtype=np.float64)
    low, high = points.min(axis=0), points.max(axis=0)
    low[0] = 0.0
    low[1] = 0.0 if panel.from_zero else low[1]
    marks = [ticks(low[axis], high[axis]) for axis in (0, 1)]
    high = np.maximum(high, [mark[-1] for mark in marks])
    span = np.where(high > low, high - low, 1.0)

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (np.array([x, y]) - low) / span
        return panel.left + panel.width * float(across), panel.top + panel.height * (1 - float(up))

    bottom, right = panel.top + panel.height, panel.left + panel.width
    found = [f'<text class="title" x="{panel.left}" y="{panel.top - 14}">{escape(panel.title)}</text>']
    for value in marks[1]:
        y = at(0.0, value)[1]
        found.append(f'<path class="grid" d="M{panel.left} {y:.1f}H{right}"/>')
        found.append(
            f'<text class="soft" x="{panel.left - 8}" y="{y + 4:.1f}" text-anchor="end">{digits(value)}</text>'
        )
    for value in marks[0]:
        x = at(value, low[1])[0]
        found.append(f'<text class="soft" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{value:,.6g}</text>')
    middle = panel.left + panel.width / 2
    found.append(f'<text x="{middle}" y="{bottom + 40}" text-anchor="middle">{escape(panel.x_title)}</text>')
    for label, line in panel.lines.items():
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (at(*point) for point in line))
        found.append(f'<path d="M{path}" {stroke(look[label], colors)}/>')
    return found


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round values between `low` and `high`, at most `most` of them.

    >>> ticks(0.0, 2.4)
    [0.0, 0.5, 1.0, 1.5, 2.0]
    """
    span = high - low if high > low else abs(high) or 1.0
    rough = span / (most - 1)
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9)
    return [float(f"{value * step:.10g}") + 0.0 for value in np.arange(first, last + 1)] or [float(low)]
