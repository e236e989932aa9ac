"""The page: one self-contained, interactive HTML file made from a results folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from setpoint.report.draft import Draft, document, html_table, pair, place_of, save
from setpoint.report.figures import plotly_script
from setpoint.report.numbers import NOTHING, duration, share
from setpoint.report.run import run
from setpoint_bench.report.comparison import comparison
from setpoint_bench.report.curves import PARTS, curves, seconds_by_part, seconds_figure
from setpoint_bench.report.folder import read_results
from setpoint_bench.report.history import loss_around
from setpoint_bench.report.results import Cell, Results
from setpoint_bench.report.summary import Row, clock_of, series, summary_rows

MOST_RUNS = 12
"""How many runs of a task are shown decision by decision, so that the file stays small."""
MOST_CURVES = 24
"""How many runs of a task have curves; of more, each method has those of its first seed only."""


def write_page(results_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a results folder (docs/results-format.md) to one file, by default `report.html` in it.

    The file needs no network and no other file.

    Raises:
        ReportError: if the folder holds no results, or of an unknown schema.
        ModuleNotFoundError: if plotly is not installed.
    """
    results = read_results(results_dir)
    target = results_dir / "report.html" if out is None else out
    return save(render(results, plotly_script()), target)


def render(results: Results, script: str) -> str:
    """The HTML of the report; `script` is JavaScript that defines `Plotly`."""
    rows = summary_rows(results)
    body = Draft(header(results))
    for place, task in enumerate(results.tasks()):
        body += task_section(f"t{place}", task, results.of(task), [row for row in rows if row.task == task])
    body += Draft(remarks(results.remarks) + environment(results.cells))
    return document(", ".join(results.tasks()), body, script)


def header(results: Results) -> str:
    """Title, and what the page is about."""
    dates = sorted(cell.date[:10] for cell in results.cells if cell.date)
    runs = f"{len(results.cells)} run{'s' if len(results.cells) != 1 else ''}"
    about = f"{runs} · {escape(dates[-1])}" if dates else runs
    return f"<header><h1>Setpoint <span>report</span></h1><p>{about}</p></header>\n"


def task_section(name: str, task: str, cells: Sequence[Cell], rows: Sequence[Row]) -> Draft:
    """Everything about one task."""
    groups = series(cells)
    draft = Draft(f'<section id="{name}">\n<h2>{escape(task)}</h2>\n') + comparison(name, cells, rows)
    draft += curve_section(name, groups)
    draft += run_section(name, groups)
    draft += seconds_section(name, groups)
    return draft + Draft("</section>\n")


def curve_section(name: str, groups: Mapping[str, Sequence[Cell]]) -> Draft:
    """Loss and accuracy over the run, against steps, seconds or FLOPs."""
    many = sum(map(len, groups.values())) > MOST_CURVES
    shown = {label: cells[:1] if many else cells for label, cells in groups.items()}
    figures = {quantity: curves(shown, quantity) for quantity in ("loss", "accuracy")}
    if not any(figures.values()):
        return Draft("")
    names = (("step", "steps"), ("seconds", "seconds"), ("flops", "training FLOPs"))
    buttons = "".join(
        f'<button type="button" data-axis="{axis}" aria-pressed="{str(axis == "step").lower()}">{text}</button>'
        for axis, text in names
    )
    draft = Draft(
        f'<h3>How training went</h3>\n<div class="choice" role="group" aria-label="against" data-task="{name}">'
        f'<span>against</span>{buttons}</div>\n<div class="two">'
    )
    draft += place_of(
        f"{name}-loss",
        figures["loss"],
        "Loss",
        "Thin: training, averaged over stretches of steps. Marked: validation and test."
        + (" The first seed of each method." if many else ""),
    )
    draft += place_of(f"{name}-accuracy", figures["accuracy"], "Accuracy", "Click a name to hide or show its curves.")
    return draft + Draft("</div>\n")


def run_section(name: str, groups: Mapping[str, Sequence[Cell]]) -> Draft:
    """How the budget was met, for each run with a ledger; one run is shown at a time."""
    runs = [
        (f"{label}, seed {cell.seed}" if cell.seed is not None else label, cell.record, cell.history)
        for label, cells in groups.items()
        for cell in cells
        if cell.record is not None
    ]
    if not runs:
        return Draft("")
    shown = runs[:MOST_RUNS]
    options = "".join(f'<option value="{name}-r{i}">{escape(label)}</option>' for i, (label, *_) in enumerate(shown))
    picker = f'<label class="choice"><span>run</span><select data-runs="{name}">{options}</select></label>\n'
    draft = Draft("<h3>How the budget was met</h3>\n" + (picker if len(shown) > 1 else ""))
    for place, (label, record, history) in enumerate(shown):
        around = place_of(
            f"{name}-r{place}-around",
            loss_around(record, history),
            "The loss around each event",
            "Training loss less its mean before. Orange: units were dropped; blue: units came back, too.",
        )
        final = max(((p.step, p.loss) for p in history if p.split == "train" and p.loss is not None), default=None)
        draft += run(f"{name}-r{place}", label, record, hidden=place > 0, more=around, final=final)
    left = len(runs) - len(shown)
    return draft + Draft(f'<p class="caption">{left} more runs are not shown one by one.</p>\n' if left else "")


def seconds_section(name: str, groups: Mapping[str, Sequence[Cell]]) -> Draft:
    """Where the seconds went."""
    figure = seconds_figure(groups)
    if figure is None:
        return Draft("")
    lines = []
    for label, cells in groups.items():
        parts = seconds_by_part(cells)
        if parts is None:
            continue
        total = sum(parts.values())
        shares = [pair(duration(seconds), share(seconds, total)) if seconds else NOTHING for seconds in parts.values()]
        lines.append([escape(label), *shares, escape(duration(total))])
    draft = Draft("<h3>Where the seconds went</h3>\n")
    clock = clock_of([cell for cells in groups.values() for cell in cells])
    caption = "Means over seeds, by the runs' own clocks."
    caption += "" if clock == "interleaved" else " The machine was busy with other work: only the shares count."
    draft += place_of(f"{name}-seconds", figure, "Training and overhead", caption)
    return draft + Draft(f'<div class="scroll">{html_table(("method", *PARTS, "total"), lines)}</div>\n')


def remarks(found: Sequence[str]) -> str:
    """What could not be read."""
    if not found:
        return ""
    items = "".join(f"<li>{escape(remark)}</li>" for remark in found)
    return f'<section class="remarks"><h2>Left out</h2><ul>{items}</ul></section>\n'


def environment(cells: Sequence[Cell]) -> str:
    """Environment of the runs and, where it differs, of their timing; every value where runs differ."""
    values: dict[str, list[str]] = {}
    for cell in cells:
        timed = (
            {} if cell.timing is None else {f"{key}, timed": value for key, value in cell.timing.environment.items()}
        )
        for key, value in {**cell.environment, **timed}.items():
            known = values.setdefault(key, [])
            known += [value] if value not in known else []
    if not values:
        return ""
    same = [key for key in values if key.endswith(", timed") and values[key] == values.get(key.removesuffix(", timed"))]
    for key in same:
        del values[key]
    lines = [[escape(key), "<br>".join(map(escape, found))] for key, found in values.items()]
    return f'<section><h2>Environment</h2><div class="scroll">{html_table(("what", "value"), lines)}</div></section>\n'
