"""The summary as Markdown: tables of what was reached and spent, differences to the rivals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from setpoint_bench.report.columns import (
    Column,
    clock_note,
    columns,
    difference_columns,
    outcome_and_training,
    seeds_text,
    texts,
)
from setpoint_bench.report.folder import read_results
from setpoint_bench.report.results import Cell, Results
from setpoint_bench.report.summary import RIVALS, Row, series, summary_rows

NAME = "results.md"
INTERVALS = (
    "Differences are means over the seeds that both methods have, with 95 % intervals of Student's t from three seeds "
    "on. A difference is bold if its interval excludes 0."
)


def write_markdown(results_dir: Path, out: Path | None = None) -> Path:
    """Write `results.md` for a results folder (docs/results-format.md), by default into it.

    Raises:
        ReportError: the folder holds no results, or of an unknown schema.
    """
    target = results_dir / NAME if out is None else out
    text = markdown(read_results(results_dir))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    return target


def markdown(results: Results) -> str:
    """All tasks of a folder as one Markdown page."""
    rows = summary_rows(results)
    parts = ["# Results"]
    for task in results.tasks():
        own = [row for row in rows if row.task == task]
        parts += [f"## {escape(task)}", task_text(results.of(task), own)]
    if results.remarks:
        parts += ["## Left out", "\n".join(f"* {escape(remark)}" for remark in results.remarks)]
    return "\n\n".join(parts) + "\n"


def task_text(cells: Sequence[Cell], rows: Sequence[Row]) -> str:
    """One task: its tables, and what they were measured on."""
    parts = [table(each, rows) for each in outcome_and_training(columns(rows)) if len(each) > 1]
    compared = [row for row in rows if row.differences]
    if compared:
        unit = " (points)" if rows[0].metric == "accuracy" else ""
        parts += [f"Differences{unit}:", table(difference_columns(rows), compared)]
    return "\n\n".join([*parts, about(cells, rows)])


def table(shown: Sequence[Column], rows: Sequence[Row]) -> str:
    """A Markdown table; of differences those are bold whose interval excludes 0."""
    lines = [f"| {' | '.join(escape(column.heading) for column in shown)} |", f"|---|{'---:|' * (len(shown) - 1)}"]
    for row in rows:
        lines.append(f"| {' | '.join(texts(shown, row, escape, '**{}**'.format))} |")
    return "\n".join(lines)


def about(cells: Sequence[Cell], rows: Sequence[Row]) -> str:
    """What the numbers were measured on, and how to read them."""
    seeds = sorted({cell.seed for cell in cells if cell.seed is not None})
    steps = max((cell.steps or 0 for cell in cells if cell.method == "dense"), default=0)
    facts = [f"{seeds_text(rows)} a row ({', '.join(map(str, seeds))})"] + [f"{steps} steps"] * bool(steps)
    facts += _machine([cell.environment for cell in cells], [cell.timing.environment for cell in cells if cell.timing])
    dates = sorted(cell.date[:10] for cell in cells if cell.date)
    facts += [" to ".join(dict.fromkeys((dates[0], dates[-1])))] if dates else []
    notes = [f"`{row.label}`: {'; '.join(row.notes)}." for row in rows if row.notes]
    masked = (
        "*In theory* means: if zeros cost nothing. " if any(row.theoretical_ratio is not None for row in rows) else ""
    )
    compared = INTERVALS if any(rival in row.differences for row in rows for rival in RIVALS) else ""
    sentences = (
        f"{'; '.join(map(escape, facts))}.",
        clock_note(cells, rows[0].clock),
        _other_machines(cells),
        _versions(cells),
        masked + compared,
        *map(escape, notes),
    )
    return " ".join(filter(None, sentences))


def _machine(runs: Sequence[Mapping[str, str]], timings: Sequence[Mapping[str, str]]) -> list[str]:
    """What the runs ran on, and in brackets what they were timed on where that is something else."""
    facts = []
    for key in ("cpu", "device", "threads", "dtype", "torch"):
        ran, timed = (_value(key, environments) for environments in (runs, timings))
        if ran and not (key == "device" and ran == "cpu"):
            facts.append(f"{ran} (timed: {timed})" if timed not in ("", ran) else ran)
    return facts


def _other_machines(cells: Sequence[Cell]) -> str:
    """Which rows ran on another processor than the majority, "" where all ran on one."""
    labels: dict[str, dict[str, None]] = {}
    for label, runs in series(cells).items():
        for cell in runs:
            labels.setdefault(cell.environment.get("cpu", "a processor not known"), {})[label] = None
    others = sorted(labels, key=lambda cpu: -len(labels[cpu]))[1:]
    return " ".join(f"On {escape(cpu)}: {', '.join(f'`{escape(each)}`' for each in labels[cpu])}." for cpu in others)


def _versions(cells: Sequence[Cell]) -> str:
    """How many versions of the code made the runs, as far as recorded; "" for one."""
    codes = [cell.environment.get("code", "") for cell in cells]
    num_untold, known = codes.count(""), set(codes) - {""}
    facts = [f"{num_untold} of {len(codes)} runs do not record their code version"] * bool(num_untold)
    facts += [f"{'the others' if num_untold else 'the runs'} are from {len(known)} versions of the code"] * (
        len(known) > 1
    )
    text = "; ".join(facts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _value(key: str, environments: Sequence[Mapping[str, str]]) -> str:
    """The values of one part of the environment, "" if it is not known."""
    value = " or ".join(dict.fromkeys(each[key] for each in environments if key in each))
    if key == "threads" and value:
        return f"{value} thread{'s' * (value != '1')}"
    return f"torch {value}" if key == "torch" and value else value


def escape(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
