"""The columns of the summary as texts, for terminals, Markdown and pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from setpoint.report.numbers import MINUS, NOTHING, duration, human, percent
from setpoint_bench.report.results import Cell
from setpoint_bench.report.statistics import Difference, Estimate, Share
from setpoint_bench.report.summary import DENSE, RIVALS, Row, ratio


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    heading: str
    text: Callable[[Row], str]


def texts(shown: Sequence[Column], row: Row, escape: Callable[[str], str], bold: Callable[[str], str]) -> list[str]:
    """A row's text in each column; a difference to a rival is bold where its interval excludes 0."""
    found = []
    for column in shown:
        text = escape(column.text(row))
        to_rival = row.differences.get(column.heading.removeprefix("to "))
        found.append(bold(text) if to_rival is not None and to_rival.clear else text)
    return found


OF_DENSE, IN_THEORY = "of dense", "in theory"
CLOCKS = {
    "timed": "training time",
    "interleaved": "training time",
    "shared": "training time (busy machine)",
}
CLOCK_NOTES = {
    "timed": "Training times are from a separate measurement, in turns on one machine: median seconds of a few steps "
    "of each stage of each run, times the steps of the stage, plus the method's own work as the run measured it. Time "
    "of dense: the median and the range of the shares of the rounds, which need not equal the ratio of median times.",
    "interleaved": "Training times are the runs' own; they took turns of a few steps in one process.",
    "shared": "Training times are the runs' own, on a machine that was busy with other work at the same time, so they "
    "are not comparable. With `setpoint bench --interleaved` they are.",
}
MOST_LOAD = 0.5
"""Load average over the last minute above which a machine is called busy."""


def clock_note(cells: Sequence[Cell], clock: str) -> str:
    """Source of the seconds, and the load of the machine meanwhile."""
    loads = [cell.timing.load for cell in cells if cell.timing and cell.timing.load is not None]
    busy = ""
    if loads:
        state = "The machine was not idle then" if max(loads) > MOST_LOAD else "Just before, the machine was idle"
        busy = f" {state}: load average {max(loads):.2f}."
    control = [each for cell in cells if cell.timing for each in cell.timing.control]
    uncertainty = ""
    if control:
        uncertainty = " In a second turn in the same rounds, steps of the dense model took "
        uncertainty += f"{min(control):.2f} to {max(control):.2f} of the first: shares are that uncertain."
    return f"{CLOCK_NOTES[clock]}{_timed_seeds(cells)}{busy}{uncertainty}"


def _timed_seeds(cells: Sequence[Cell]) -> str:
    """The timed seeds, where some were not timed."""
    timed = {cell.seed for cell in cells if cell.timing and cell.seed is not None}
    if not timed or timed == {cell.seed for cell in cells if cell.seed is not None}:
        return ""
    return f" Timed: seed{'s' * (len(timed) > 1)} {', '.join(map(str, sorted(timed)))}."


def columns(rows: Sequence[Row]) -> tuple[Column, ...]:
    """Columns of results and expenses, without those that no row fills."""
    clock = CLOCKS[rows[0].clock]
    found = (
        Column("method", lambda row: row.label),
        Column(f"{rows[0].metric} on {rows[0].split}", metric_text),
        Column("FLOPs / step", lambda row: human(row.final_flops, "FLOPs")),
        Column(f"FLOPs / step {OF_DENSE}", lambda row: percent(row.final_flops_ratio)),
        Column(f"FLOPs / step {IN_THEORY}", lambda row: percent(row.theoretical_ratio)),
        Column(f"parameters {OF_DENSE}", lambda row: percent(row.final_params_ratio)),
        Column("training FLOPs", lambda row: human(row.train_flops, "FLOPs")),
        Column(f"training FLOPs {OF_DENSE}", lambda row: percent(row.train_flops_ratio)),
        Column(f"training FLOPs {IN_THEORY}", lambda row: percent(row.theoretical_train_ratio)),
        Column(clock, seconds_text),
        Column(f"time {OF_DENSE}", lambda row: share_text(row.seconds_share)),
        Column("overhead", overhead_text),
        Column("energy", energy_text),
        Column("cuts", lambda row: NOTHING if not row.resizes else f"{row.resizes:.1f}".removesuffix(".0")),
        Column("budget met", budget_met_text),
    )
    return tuple(column for column in found if any(column.text(row) != NOTHING for row in rows))


def outcome_and_training(shown: Sequence[Column]) -> tuple[list[Column], list[Column]]:
    """The columns of what came out, and those of what training took, so that a page is wide enough for each."""
    cuts = [column for column in shown if column.heading in ("cuts", "budget met")]
    names = [column.heading for column in shown]
    begin = names.index("training FLOPs") if "training FLOPs" in names else len(names)
    training = [column for column in shown[begin:] if column not in cuts]
    return [*shown[:begin], *cuts], [shown[0], *training]


def difference_columns(rows: Sequence[Row]) -> tuple[Column, ...]:
    """Columns of the differences to each rival that the task has."""
    rivals = [rival for rival in RIVALS if any(rival in row.differences for row in rows)]

    def column(rival: str) -> Column:
        return Column(f"to {rival}", lambda row: difference_text(row, rival))

    return Column("method", lambda row: row.label), *map(column, rivals)


def metric_text(row: Row) -> str:
    """The metric with its standard deviation: accuracies in percent, losses as they are."""
    if not math.isfinite(row.value.mean):
        return "not a number"
    factor, decimals, unit = (100.0, 2, " %") if row.metric == "accuracy" else (1.0, 4, "")
    text = f"{row.value.mean * factor:.{decimals}f}"
    if row.value.deviation is not None:
        text += f" ± {row.value.deviation * factor:.{decimals}f}"
    return text + unit


def difference_text(row: Row, rival: str = DENSE) -> str:
    """The difference to a rival with its interval, and the seeds behind it where they are few."""
    found = row.differences.get(rival)
    return NOTHING if found is None else interval_text(found, row.metric)


def interval_text(found: Difference, metric: str) -> str:
    """A difference with its 95 % interval: accuracies in points (hundredths), losses as they are.

    >>> interval_text(Difference(0.012, 5, 0.004, 0.007, 0.017), "accuracy")
    '+1.20 [+0.70, +1.70]'
    >>> interval_text(Difference(-0.02, 1), "loss")
    '−0.0200 (n = 1)'
    """
    factor, decimals = (100.0, 2) if metric == "accuracy" else (1.0, 4)
    text = signed(found.mean * factor, decimals)
    if found.low is None or found.high is None:
        return f"{text} ({'no common seed' if not found.num else f'n = {found.num}'})"
    return f"{text} [{signed(found.low * factor, decimals)}, {signed(found.high * factor, decimals)}]"


def seconds_text(row: Row) -> str:
    return quantity_text(row.seconds, duration)


def share_text(share: Share | None) -> str:
    """A share of dense seconds with minimum and maximum over the rounds.

    >>> share_text(Share(0.629, 0.61, 0.68))
    '62.9 % (61.0 to 68.0)'
    """
    if share is None:
        return NOTHING
    text = percent(share.value)
    return text if share.low == share.high else f"{text} ({100 * share.low:.1f} to {100 * share.high:.1f})"


def energy_text(row: Row) -> str:
    return quantity_text(row.energy_j, lambda value: human(value, "J"))


def quantity_text(found: Estimate | None, text: Callable[[float], str]) -> str:
    if found is None:
        return NOTHING
    return text(found.mean) + ("" if found.deviation is None else f" ± {text(found.deviation)}")


def overhead_text(row: Row) -> str:
    """The overhead in seconds and as a share of the training time."""
    if not row.overhead_seconds:
        return NOTHING
    share = ratio(row.overhead_seconds, row.seconds.mean if row.seconds else None)
    return f"{duration(row.overhead_seconds)} ({percent(share)})"


def budget_met_text(row: Row) -> str:
    """Whether the budget was met: yes, no, or in how many runs."""
    if row.num_budget_met is None:
        return NOTHING
    if row.num_seeds == 1:
        return "yes" if row.num_budget_met else "no"
    return f"{row.num_budget_met} of {row.num_seeds}"


def seeds_text(rows: Sequence[Row]) -> str:
    counts = sorted({row.num_seeds for row in rows})
    span = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"{span} seed{'s' if counts[-1] > 1 else ''}"


def signed(value: float | None, decimals: int) -> str:
    """A difference, always with its sign.

    >>> signed(0.5, 2), signed(-0.25, 2), signed(None, 1)
    ('+0.50', '−0.25', '–')
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:+.{decimals}f}".replace("-", MINUS)
