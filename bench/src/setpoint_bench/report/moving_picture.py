"""The moving picture: one run as an SVG that draws itself, accuracy climbing while FLOPs per step fall in steps."""

from __future__ import annotations

from html import escape
from pathlib import Path

from setpoint.errors import ReportError
from setpoint.report.drawing import BLUE, DARK, ORANGE
from setpoint_bench.report.curves import spending_line
from setpoint_bench.report.folder import read_results
from setpoint_bench.report.picture import Line
from setpoint_bench.report.results import Cell

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 64.0, 560.0, 58.0, 250.0
SECONDS = 9
"""Of a round: two thirds of it draw, one third rests."""


def write_moving_picture(results_dir: Path, out: Path, method: str, budget: float, title: str) -> Path:
    """Draw the first run of a method at a budget; the SVG follows the reader's scheme, and moves unless motion is off.

    Where nothing moves (in print, or in a reader without animation) it shows the whole run.

    Raises:
        ReportError: there is no such run, or it has no ledger or no accuracy on validation data.
    """
    cells = [cell for cell in read_results(results_dir).cells if (cell.method, cell.budget) == (method, budget)]
    if not cells:
        raise ReportError(f"no run of {method!r} at {budget:g} in {results_dir}: run it, or name another")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(moving_picture(cells[0], title), encoding="utf-8")
    return out


def moving_picture(cell: Cell, title: str) -> str:
    """The SVG of one run.

    Raises:
        ReportError: it has no ledger or no accuracy on validation data.
    """
    spent = spending_line(cell)
    learned = [
        (point.step, 100 * point.accuracy)
        for point in cell.history
        if point.split == "validation" and point.accuracy is not None
    ]
    if not spent or not learned:
        raise ReportError(
            f"{cell.task} {cell.method}: a moving picture needs a ledger, and accuracies on validation data"
        )
    dense = spent[0][1]
    cost: Line = [(step, 100 * flops / dense) for step, flops in spent]
    end = max(cost[-1][0], learned[-1][0])

    def across(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * step / end

    def path(line: Line) -> str:
        points = [(across(step), _up(value)) for step, value in line]
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)

    costs, climb = path(cost), path(learned)
    area = f"{costs}L{across(end):.1f} {BOTTOM}L{LEFT} {BOTTOM}Z"
    said = f"{title}: accuracy climbs to {learned[-1][1]:.1f} % while FLOPs per step fall to {cost[-1][1]:.0f} %"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" role="img" aria-label="{escape(said)}">',
            _style(),
            f'<clipPath id="so-far"><rect class="so-far" width="{WIDTH}" height="{HEIGHT}"/></clipPath>',
            f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
            f'<text class="title" x="{LEFT}" y="30">{escape(title)}</text>',
            *_grid(),
            '<g clip-path="url(#so-far)">',
            f'<path class="area" d="{area}"/>',
            f'<path class="line cost" d="{costs}"/>',
            f'<path class="line climb" d="{climb}"/>',
            "</g>",
            *_label("climb", _up(learned[-1][1]), f"{learned[-1][1]:.1f} %", "accuracy, on validation data"),
            *_label("cost", _up(cost[-1][1]), f"{cost[-1][1]:.0f} %", "FLOPs per step, of dense"),
            f'<text class="soft" x="{LEFT}" y="{BOTTOM + 20}">step 0</text>',
            f'<text class="soft" x="{RIGHT}" y="{BOTTOM + 20}" text-anchor="end">step {end:,.0f}</text>',
            "</svg>",
            "",
        ]
    )


def _up(percents: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * percents / 100


def _grid() -> list[str]:
    found = []
    for mark in (0, 25, 50, 75, 100):
        y = _up(mark)
        found.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        found.append(f'<text class="soft" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{mark:g} %</text>')
    return found


def _label(kind: str, y: float, value: str, what: str) -> list[str]:
    x = RIGHT + 12
    return [
        f'<text class="{kind} value at-end" x="{x}" y="{y + 2:.1f}">{value}</text>',
        f'<text class="soft" x="{x}" y="{y + 20:.1f}">{escape(what)}</text>',
    ]


def _style() -> str:
    def colors(cost: str, climb: str) -> str:
        lines = f".line.cost {{ stroke: {cost}; }} .line.climb {{ stroke: {climb}; }} "
        return f"{lines}.area, text.cost {{ fill: {cost}; }} text.climb {{ fill: {climb}; }} "

    return (
        "<style>"
        "text { font: 12px system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; fill: #1c2430; } "
        ".title { font-weight: 600; font-size: 14px; } .value { font-weight: 600; font-size: 18px; } "
        ".soft { fill: #5a6575; } .ground { fill: #ffffff; } .grid { stroke: #e1e6ec; } "
        f".line {{ fill: none; stroke-width: 2.5; stroke-linejoin: round; }} {colors(BLUE, ORANGE)}"
        ".area { opacity: 0.14; } "
        f".so-far {{ animation: draw {SECONDS}s linear infinite; }} "
        "@keyframes draw { from { transform: scaleX(0.08); } 66%, to { transform: scaleX(1); } } "
        f".at-end {{ animation: show {SECONDS}s linear infinite; }} "
        "@keyframes show { from, 62% { opacity: 0; } 66%, to { opacity: 1; } } "
        "@media print, (prefers-reduced-motion: reduce) { .so-far, .at-end { animation: none; } } "
        "@media (prefers-color-scheme: dark) { text { fill: #e6eaf0; } .title { fill: #e6eaf0; } "
        f".soft {{ fill: #a3acb9; }} .ground {{ fill: #12181f; }} .grid {{ stroke: #2a3441; }} "
        f"{colors(DARK[BLUE], DARK[ORANGE])}}}"
        "</style>"
    )
