"""A picture of what a network lost: by group the units that each cut took, beside an even cut."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import Any

from setpoint_bench.report.folder import LEDGER, RESULTS, read_lines
from setpoint_bench.report.packed import file_of
from setpoint_bench.report.summary import SETPOINT

WIDTH, LEFT, TOP, HIGH, GAP = 820, 52, 40, 150, 160
EVEN = "cubic"
LOST = ("#f6d9b8", "#f2c08a", "#eaa55c", "#dd8a36", "#c4701f", "#a65a15", "#85470f", "#64360c")
"""Colours of the cuts, early to late."""


def lost_runs(folder: Path) -> list[tuple[float, list[dict[str, Any]], Mapping[str, int], Mapping[str, int] | None]]:
    """Of each budget of a task: the budget, the cuts of the first seed, dense widths, and those of an even cut."""
    rows = [row for row in read_lines(file_of(folder, RESULTS), RESULTS, []) if row["seed"] == 0]
    even = {row["budget"]: row["widths"] for row in rows if row["method"] == EVEN}
    found = []
    for row in (row for row in rows if row["method"] == SETPOINT):
        ledger = folder / f"{folder.name}-{SETPOINT}-{row['budget']:g}-seed0" / LEDGER
        if ledger.is_file():
            entries = [json.loads(text) for text in ledger.read_text(encoding="utf-8").splitlines()]
            cuts = [entry for entry in entries if entry.get("dropped")]
            found.append((row["budget"], cuts, row["dense_widths"], even.get(row["budget"])))
    return sorted(found, key=lambda each: -each[0])


def lost_sentence(folder: Path) -> str:
    """When the cuts were made."""
    parts = [
        f"at {100 * budget:g} % of the FLOPs in {len(cuts)} cuts from step {cuts[0]['step']} to step {cuts[-1]['step']}"
        for budget, cuts, _, _ in lost_runs(folder)
    ]
    return f"Setpoint cut {', '.join(parts)}."


def write_lost_picture(folder: Path, out: Path) -> Path:
    """Draw a bar for each group: blue what is kept, orange what each cut took, early cuts light; a line for even cuts.

    The SVG follows the reader's light or dark scheme.
    """
    runs = lost_runs(folder)
    height = TOP + len(runs) * (HIGH + GAP)
    title = f"{folder.name}: which units were lost"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{title}">',
        "<style>text { font: 12px system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; fill: #1c2430; } "
        ".soft { fill: #5a6575; } .name { font-size: 10px; } "
        ".ground { fill: #ffffff; } .kept { fill: #3f7cac; } .even { stroke: #1c2430; "
        "stroke-width: 2; } @media (prefers-color-scheme: dark) { text { fill: #e6eaf0; } .soft { fill: #a3acb9; } "
        ".ground { fill: #12181f; } .even { stroke: #ffffff; } }</style>",
        f'<rect class="ground" width="{WIDTH}" height="{height}" rx="6"/>',
        f'<rect class="kept" x="{LEFT}" y="10" width="14" height="12"/><text x="{LEFT + 20}" y="21">kept</text>',
        *(f'<rect fill="{color}" x="{LEFT + 70 + 12 * place}" y="10" width="12" height="12"/>'
          for place, color in enumerate(LOST)),
        f'<text x="{LEFT + 76 + 12 * len(LOST)}" y="21">lost, in the first to the last cut</text>',
        f'<path class="even" d="M{LEFT + 380} 16h18"/><text x="{LEFT + 404}" y="21">what an even cut keeps</text>',
    ]  # fmt: skip
    for place, (budget, cuts, dense, even) in enumerate(runs):
        top = TOP + place * (HIGH + GAP)
        steps = ", ".join(f"{cut['step']}" for cut in cuts)
        parts.append(
            f'<text x="{LEFT}" y="{top + 12}">{100 * budget:g} % of the FLOPs; cuts after steps {steps}</text>'
        )
        parts += _bars(top + 20, cuts, dense, even)
    parts.append("</svg>")
    out.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return out


def _bars(
    top: float, cuts: Sequence[Mapping[str, Any]], dense: Mapping[str, int], even: Mapping[str, int] | None
) -> list[str]:
    pitch = (WIDTH - LEFT - 16) / len(dense)
    wide, drawn = 0.8 * pitch, []
    shared = commonprefix(list(dense)).rpartition(".")[0] + "."
    for share in (0, 50, 100):
        y = top + HIGH * (1 - share / 100)
        drawn.append(f'<text class="soft" x="{LEFT - 8}" y="{y + 4:.0f}" text-anchor="end">{share} %</text>')
    for place, (name, units) in enumerate(dense.items()):
        x, y = LEFT + pitch * place, top
        bars = []
        for number, cut in enumerate(cuts):
            tall = HIGH * len(cut["dropped"].get(name, ())) / units
            shade = LOST[round(number * (len(LOST) - 1) / max(1, len(cuts) - 1))]
            if tall:
                bars.append(f'<rect fill="{shade}" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}"/>')
            y += tall
        bars.append(f'<rect class="kept" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{top + HIGH - y:.1f}"/>')
        kept = round(units * (top + HIGH - y) / HIGH)
        if even is not None:
            line = top + HIGH * (1 - even[name] / units)
            bars.append(f'<path class="even" d="M{x - 0.1 * pitch:.1f} {line:.1f}h{pitch:.1f}"/>')
        drawn.append(f"<g><title>{name}: {kept} of {units}</title>{''.join(bars)}</g>")
        across, below = x + 0.4 * pitch + 3, top + HIGH + 8
        drawn.append(
            f'<text class="soft name" transform="translate({across:.1f} {below:.0f}) rotate(-90)" text-anchor="end">'
            f"{name.removeprefix(shared)}</text>"
        )
    return drawn
