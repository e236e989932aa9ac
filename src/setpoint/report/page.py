"""The page: one self-contained, interactive HTML file made from a results folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from setpoint.report import decisions, dynamics, resources
from setpoint.report.comparison import comparison
from setpoint.report.draft import Draft, document, html_table, pair, place_of, save
from setpoint.report.figures import PARTS, curves, plotly_script, seconds_by_part, seconds_figure
from setpoint.report.folder import read_results
from setpoint.report.numbers import NOTHING, digits, duration, human, percent
from setpoint.report.results import Cell, Point, Record, Results
from setpoint.report.summary import Row, clock_of, series, summary_rows

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
    told = f"{runs} · {escape(dates[-1])}" if dates else runs
    return f"<header><h1>Setpoint <span>report</span></h1><p>{told}</p></header>\n"


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
        draft += run(f"{name}-r{place}", label, record, history, hidden=place > 0)
    left = len(runs) - len(shown)
    return draft + Draft(f'<p class="caption">{left} more runs are not shown one by one.</p>\n' if left else "")


def run(name: str, label: str, record: Record, history: Sequence[Point], *, hidden: bool) -> Draft:
    """The decisions of one run, and its dynamics."""
    told = f'<p class="caption"><b>{escape(label)}</b>: {escape(resources.ledger_line(record))}</p>\n'
    draft = Draft(f'<div class="run" id="{name}"{" hidden" if hidden else ""}>\n{told}')
    main = resources.resources(record)
    for resource in main:
        draft += place_of(
            f"{name}-spent-{len(draft.figures)}",
            decisions.spending(record, resource),
            f"Spent against reference: {resources.NAMES.get(resource, resource)} per "
            f"{resources.PER.get(resource, 'step')}",
            "The reference leads from the dense cost to the budget; a triangle is a cut, and its text tells why.",
        )
        draft += place_of(
            f"{name}-price-{len(draft.figures)}",
            decisions.price(record, resource),
            f"Price of {resources.NAMES.get(resource, resource)}",
            "Loss per unit of resource: a unit stays while its worth is at least the price.",
        )
    draft += place_of(
        f"{name}-widths",
        decisions.widths(record),
        "Width of each group",
        "Active units / units of the dense model, by group, over steps.",
    )
    draft += place_of(
        f"{name}-units",
        decisions.timeline(record, main[0] if main else None),
        "What was dropped when, and why",
        "Each line is a unit; a marker ends it, and tells its worth, saliency, the price and the reason. "
        "Blue: worth next to nothing. Orange: a close call.",
    )
    draft += dynamics_section(name, record, history)
    told = "".join(entries_table(record, resource, history) for resource in main or (None,))
    return draft + Draft(f"{group_seconds_table(record)}{told}</div>\n")


def group_seconds_table(record: Record) -> str:
    """Where the time of a step goes, folded away; nothing where seconds were not predicted."""
    found = resources.seconds_by_group(record)
    if not found:
        return ""
    dense = record.dense.get("latency")
    lines = [[escape(name), duration(s), percent(s / dense) if dense else NOTHING] for name, s in found]
    listing = html_table(("group", "predicted seconds that go with it", "of a dense step"), lines)
    return f"<details><summary>Where the time of a step goes</summary>{listing}</details>\n"


def dynamics_section(name: str, record: Record, history: Sequence[Point]) -> Draft:
    """Dropped and regrown units as spikes, and the effect of each event on the loss."""
    draft = place_of(
        f"{name}-active", dynamics.active(record), "Active units of each group", "At every step, after each decision."
    )
    draft += place_of(
        f"{name}-ranking",
        dynamics.ranking(record),
        "How stable the ranking is",
        "Spearman's rank correlation of each reading with the last one; of balanced states, of the Hankel values that "
        "the states of the last reading had then and have now. Early and high: units can go early.",
    )
    draft += place_of(
        f"{name}-raster",
        dynamics.raster(record),
        "Every drop and every return, like a spike train",
        f"A row for each unit, a tick for each event; below, their number. {dynamics.dynamics_line(record)}",
    )
    draft += place_of(
        f"{name}-rests",
        dynamics.reserve_lives(record),
        "How long units rested",
        "From the step at which a unit was dropped to its return, or to the end of the run.",
    )
    return draft + place_of(
        f"{name}-around",
        dynamics.loss_around(record, history),
        "The loss around each event",
        "Training loss less its mean before. Orange: units were dropped; blue: units came back, too.",
    )


def entries_table(record: Record, resource: str | None, history: Sequence[Point]) -> str:
    """All decisions as a table, folded away, with the loss right before and after each beside the final one."""
    if not record.entries:
        return ""
    unit = resources.UNITS.get(resource or "", resource or "")
    read = any(entry.metered for entry in record.entries)
    lines = []
    for entry in record.entries:
        lost = ", ".join(f"{name}: {count}" for name, count in resources.num_dropped(entry).items())
        back = ", ".join(f"{name}: {count}" for name, count in decisions.num_grown(entry).items())
        each = (entry.spent, entry.reference, entry.predicted, entry.metered)
        amounts = [human(values.get(resource or ""), unit) for values in each[: 4 if read else 2]]
        losses = tuple(NOTHING if loss is None else digits(loss) for loss in (entry.loss, entry.loss_after))
        cells = (f"{entry.step:,}", *amounts, lost or NOTHING, back or NOTHING, *losses)
        lines.append([escape(cell) for cell in (*cells, entry.reason)])
    meters = ("predicted before", "measured before") if read else ()
    titles = ("step", "spent", "reference", *meters, "dropped", "brought back", "loss before", "right after", "reason")
    final = max(((p.step, p.loss) for p in history if p.split == "train" and p.loss is not None), default=None)
    if final is not None:
        blank = [NOTHING] * (len(titles) - 4)
        lines.append([f"{final[0]:,}", *blank, digits(final[1]), NOTHING, "the end of the run"])
    listing = html_table(titles, lines, classes="entries")
    return f'<details><summary>All decisions</summary><div class="scroll">{listing}</div></details>\n'


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
        whole = sum(parts.values())
        shares = [
            pair(duration(seconds), percent(seconds / whole)) if seconds else NOTHING for seconds in parts.values()
        ]
        lines.append([escape(label), *shares, escape(duration(whole))])
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
