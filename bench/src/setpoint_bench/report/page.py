"""The page: one self-contained HTML file made from a results folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from setpoint.messages import counted
from setpoint.report.drawing import AXES
from setpoint.report.numbers import NOTHING, duration, share
from setpoint.report.page import document, drawn, html_table, pair, run, save
from setpoint_bench.report.comparison import comparison
from setpoint_bench.report.curves import PARTS, curves, followed, seconds_by_part
from setpoint_bench.report.folder import read_results
from setpoint_bench.report.history import loss_around
from setpoint_bench.report.results import Cell, Results
from setpoint_bench.report.summary import SETPOINT, Row, clock_of, series, summary_rows

ROOM = 500_000
"""Characters of the runs that are shown decision by decision, so that the page stays under a megabyte."""
MOST_CURVES = 24
"""How many runs of a task have curves; of more, each method has those of its first seed only."""
VIEWS = {"step": "steps", "seconds": "seconds", "flops": "training FLOPs"}
"""Abscissas of the curves, by axis."""


def write_page(results_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a results folder (docs/results-format.md) to one file, by default `report.html` in it.

    The file needs no network and no other file.

    Raises:
        ReportError: if the folder holds no results, or of an unknown schema.
    """
    return save(render(read_results(results_dir)), results_dir / "report.html" if out is None else out)


def render(results: Results) -> str:
    """The HTML of the report."""
    rows, tasks = summary_rows(results), results.tasks()
    page = header(results)
    for place, task in enumerate(tasks):
        of_task = [row for row in rows if row.task == task]
        page += task_section(f"t{place}", task, results.of(task), of_task, ROOM // len(tasks))
    return document(", ".join(tasks), page + remarks(results.remarks) + environment(results.cells))


def header(results: Results) -> str:
    """Title, and what the page is about."""
    dates = sorted(cell.date[:10] for cell in results.cells if cell.date)
    runs = counted(len(results.cells), "run")
    about = f"{runs} · {escape(dates[-1])}" if dates else runs
    return f"<header><h1>Setpoint <span>report</span></h1><p>{about}</p></header>\n"


def task_section(name: str, task: str, cells: Sequence[Cell], rows: Sequence[Row], room: int) -> str:
    """Everything about one task; `room` is the number of characters that its runs may take."""
    groups = series(cells)
    return (
        f"<section>\n<h2>{escape(task)}</h2>\n{comparison(cells, rows)}{curve_section(name, groups)}"
        f"{run_section(name, groups, room)}{seconds_section(groups)}</section>\n"
    )


def curve_section(name: str, groups: Mapping[str, Sequence[Cell]]) -> str:
    """Loss and accuracy over the run, against steps, FLOPs, and seconds where those of the runs compare."""
    many = sum(map(len, followed(groups).values())) > MOST_CURVES
    shown = {label: cells[:1] if many else cells for label, cells in groups.items()}
    about = "Thin: training, averaged over stretches of steps. With points: validation and test."
    about += " The first seed of each method." if many else ""
    about += " Only dense, small and Setpoint." if len(followed(groups)) < len(groups) else ""
    busy = any(cell.clock == "shared" for cells in groups.values() for cell in cells)
    views = {}
    for axis in [each for each in AXES if each != "seconds" or not busy]:
        loss, accuracy = (curves(shown, quantity, axis) for quantity in ("loss", "accuracy"))
        if loss or accuracy:
            views[axis] = drawn(loss, "Loss", about) + drawn(accuracy, "Accuracy", about)
    if not views:
        return ""
    choices = "".join(
        f'<label><input type="radio" name="{name}-axis" value="{axis}"{" checked" * (axis == next(iter(views)))}>'
        f"{VIEWS[axis]}</label>"
        for axis in views
    )
    figures = "".join(f'<div class="two by-{axis}">{made}</div>\n' for axis, made in views.items())
    return (
        f'<h3>How training went</h3>\n<div class="curves">\n'
        f'<fieldset class="choice"><legend>against</legend>{choices}</fieldset>\n{figures}</div>\n'
    )


def run_section(name: str, groups: Mapping[str, Sequence[Cell]], room: int) -> str:
    """Each run with a ledger, decision by decision; one is open at a time."""
    runs = [
        (f"{label}, seed {cell.seed}" if cell.seed is not None else label, cell.record, cell.history)
        for label, cells in sorted(groups.items(), key=lambda item: item[1][0].method != SETPOINT)
        for cell in cells
        if cell.record is not None
    ]
    if not runs:
        return ""
    page, left = "<h3>Decision by decision</h3>\n", len(runs)
    for label, record, history in runs:
        around = drawn(
            loss_around(record, history),
            "The loss around each event",
            "Training loss less its mean before. Orange: units were dropped; blue: units came back, too.",
        )
        final = max(((p.step, p.loss) for p in history if p.split == "train" and p.loss is not None), default=None)
        made = run(label, record, more=around, final=final)
        if len(page) + len(made) > room and left < len(runs):
            break
        opened = " open" if left == len(runs) else ""
        page += f'<details class="run" name="{name}-run"{opened}><summary>{escape(label)}</summary>\n{made}</details>\n'
        left -= 1
    return page + (f'<p class="caption">{left} more runs are not shown one by one.</p>\n' if left else "")


def seconds_section(groups: Mapping[str, Sequence[Cell]]) -> str:
    """Where the seconds went."""
    lines = []
    for label, cells in groups.items():
        parts = seconds_by_part(cells)
        if parts is None:
            continue
        total = sum(parts.values())
        shares = [pair(duration(seconds), share(seconds, total)) if seconds else NOTHING for seconds in parts.values()]
        lines.append([escape(label), *shares, escape(duration(total))])
    if not lines:
        return ""
    clock = clock_of([cell for cells in groups.values() for cell in cells])
    caption = "Means over seeds, by the runs' own clocks."
    caption += "" if clock == "interleaved" else " The machine was busy with other work: only the shares count."
    listing = html_table(("method", *PARTS, "total"), lines)
    return f'<h3>Where the seconds went</h3>\n<div class="scroll">{listing}</div>\n<p class="caption">{caption}</p>\n'


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
