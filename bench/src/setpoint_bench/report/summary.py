"""The summary: one row per task, method and budget, over seeds, with its rivals."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from setpoint_bench.report.results import Cell, Results
from setpoint_bench.report.statistics import Difference, Estimate, Share, difference, estimate, mean, share_of
from setpoint_bench.results import exact

DENSE = "dense"
SETPOINT = "setpoint"
RIVALS = (DENSE, "small", "small-long", SETPOINT)
"""Methods that all others are compared with, seed by seed."""
FAMILIES = (DENSE, "small", SETPOINT, "open-loop", "post-training", "sparse")
"""Kinds of methods in the order of the rows."""


@dataclass(frozen=True)
class Row:
    """Results of one method on one task at one budget. Ratios are to the dense model's mean.

    Fields of the same name as in `Cell` are means over the runs.

    Args:
        budget: the fraction asked for, None where there is none.
        label: the method, with its budget where the task has several.
        split: "test" or "validation", for the metric.
        clock: source of the seconds: "timed", "interleaved" or "shared", see `clock_of`.
        differences: by rival, `value` minus the rival's at the same budget, paired by seed.
        final_flops_ratio, final_params_ratio, train_flops_ratio: final_flops, final_params, train_flops / dense.
        theoretical_ratio, theoretical_train_ratio: `final_flops` and `train_flops` / dense if zeros cost nothing; None
            where nothing is masked.
        seconds: duration of training, overhead included; None where others were timed and this was not.
        seconds_share: the same / dense, with minimum and maximum over the rounds of their measurement.
        overhead_seconds: part of `seconds` that the method itself spent in addition to plain training steps.
        num_budget_met: number of runs that ended within budget, None without a budget.
    """

    task: str
    method: str
    family: str
    budget: float | None
    label: str
    metric: str
    unit: str
    split: str
    clock: str
    num_seeds: int
    value: Estimate
    differences: Mapping[str, Difference]
    final_flops: float | None
    final_flops_ratio: float | None
    theoretical_ratio: float | None
    final_params: float | None
    final_params_ratio: float | None
    train_flops: float | None
    train_flops_ratio: float | None
    theoretical_train_ratio: float | None
    density: float | None
    seconds: Estimate | None
    seconds_share: Share | None
    overhead_seconds: float | None
    overhead_flops: float | None
    energy_j: Estimate | None
    resizes: float | None
    num_budget_met: int | None
    notes: tuple[str, ...] = field(default=())

    @property
    def difference(self) -> Difference | None:
        return self.differences.get(DENSE)

    @property
    def seconds_ratio(self) -> float | None:
        """`seconds` / dense: the median over the rounds of their measurement."""
        return None if self.seconds_share is None else self.seconds_share.value


def summary_rows(results: Results) -> tuple[Row, ...]:
    """One row per task, method and budget: dense first, then budget by budget, small models before the rest."""
    rows = []
    for task in results.tasks():
        groups = series(results.of(task))
        rows += [summarise(label, groups) for label in groups]
    return tuple(rows)


def series(cells: Sequence[Cell]) -> dict[str, tuple[Cell, ...]]:
    """Cells of one task by label, in the order of the rows; cells of one label differ by seed only."""
    order = list(dict.fromkeys(cell.method for cell in cells))
    budgets = {cell.budget for cell in cells if cell.method != DENSE and cell.budget is not None}
    found: dict[str, list[Cell]] = {}

    def rank(cell: Cell) -> tuple[bool, float, int, int]:
        family = FAMILIES.index(cell.family) if cell.family in FAMILIES else len(FAMILIES)
        # Dense first, then methods without a budget, then budgets from the largest.
        return cell.method != DENSE, -(cell.budget or 2.0), family, order.index(cell.method)

    for cell in sorted(cells, key=rank):
        several = cell.method != DENSE and len(budgets) > 1
        label = f"{cell.method} {exact(cell.budget)}" if several and cell.budget is not None else cell.method
        found.setdefault(label, []).append(cell)
    return {label: tuple(members) for label, members in found.items()}


def rivals_of(cells: Sequence[Cell], groups: Mapping[str, Sequence[Cell]]) -> dict[str, tuple[Cell, ...]]:
    """By name, the runs of each rival at the same budget; a method is no rival of itself."""
    found: dict[str, tuple[Cell, ...]] = {}
    for rival in RIVALS:
        runs = [cell for members in groups.values() for cell in members if cell.method == rival]
        same = tuple(cell for cell in runs if rival == DENSE or cell.budget == cells[0].budget)
        if same and cells[0].method not in (rival, DENSE):
            found[rival] = same
    return found


def clock_of(cells: Sequence[Cell]) -> str:
    """Source of the seconds of a task.

    "timed": from a separate measurement, on an idle machine; then nothing else counts. "interleaved": from
    the runs, which took turns in one process. "shared": from runs on a machine that was busy with other work.
    """
    if any(cell.timing is not None for cell in cells):
        return "timed"
    return "shared" if any(cell.clock == "shared" for cell in cells) else "interleaved"


def summarise(label: str, groups: Mapping[str, Sequence[Cell]]) -> Row:
    """One row, from the runs under its label and all others of the task."""
    cells = groups[label]
    everyone = [cell for members in groups.values() for cell in members]
    dense = tuple(cell for cell in everyone if cell.method == DENSE)
    first, clock = cells[0], clock_of(everyone)

    def ratio_of(of: Callable[[Cell], float | None], to: Callable[[Cell], float | None]) -> float | None:
        return ratio(mean(map(of, cells)), mean(map(to, dense)))

    def same(of: Callable[[Cell], float | None]) -> tuple[float | None, float | None]:
        return mean(map(of, cells)), ratio_of(of, of)

    final_flops, final_flops_ratio = same(lambda cell: cell.final_flops)
    final_params, final_params_ratio = same(lambda cell: cell.final_params)

    train_flops, train_flops_ratio = same(lambda cell: cell.train_flops)
    seconds_share = None if clock == "shared" else share_of(rounds_of(cells, clock), rounds_of(dense, clock))
    landings = [cell.budget_met for cell in cells if cell.budget_met is not None]
    is_dense = first.method == DENSE
    return Row(
        task=first.task,
        method=first.method,
        family=first.family,
        budget=first.budget,
        label=label,
        metric=first.metric,
        unit=first.unit,
        split=first.split,
        clock=clock,
        num_seeds=len(cells),
        value=estimate([cell.value for cell in cells]) or Estimate(math.nan),
        differences={
            name: found
            for name, rivals in rivals_of(cells, groups).items()
            if (found := difference(cells, rivals)) is not None
        },
        final_flops=final_flops,
        final_flops_ratio=final_flops_ratio,
        theoretical_ratio=ratio_of(lambda cell: cell.theoretical_flops, lambda cell: cell.final_flops),
        final_params=final_params,
        final_params_ratio=final_params_ratio,
        train_flops=train_flops,
        train_flops_ratio=train_flops_ratio,
        theoretical_train_ratio=ratio_of(lambda cell: cell.theoretical_train_flops, lambda cell: cell.train_flops),
        density=mean(cell.density for cell in cells),
        seconds=seconds_estimate(cells, clock),
        seconds_share=seconds_share,
        overhead_seconds=mean(overhead_of(cell, clock) for cell in cells),
        overhead_flops=mean(cell.overhead_flops for cell in cells),
        energy_j=estimate([cell.energy_j for cell in cells if cell.energy_j is not None]),
        resizes=mean(cell.resizes for cell in cells),
        num_budget_met=sum(landings) if landings and not is_dense else None,
        notes=merged([cell.notes for cell in cells if cell.notes]),
    )


def merged(notes: Sequence[str]) -> tuple[str, ...]:
    """Different notes once each; where they differ in decimal fractions alone, one note with their ranges.

    >>> merged(["pruning ratio 0.49", "pruning ratio 0.52", "pruning ratio 0.5"])
    ('pruning ratio 0.49 to 0.52',)
    """
    different = tuple(dict.fromkeys(notes))
    parts = [re.split(r"(\d+\.\d+)", note) for note in different]
    if len(parts) < 2 or any(each[::2] != parts[0][::2] for each in parts):
        return different
    columns = [sorted(set(column), key=float) for column in list(zip(*parts, strict=True))[1::2]]
    ranges = [" to ".join(dict.fromkeys((column[0], column[-1]))) for column in columns]
    return ("".join(text + number for text, number in zip(parts[0][::2], [*ranges, ""], strict=True)),)


def ratio(value: float | None, whole: float | None) -> float | None:
    """`value / whole`, None if either is unknown or `whole` is 0."""
    return None if value is None or not whole else value / whole


def overhead_of(cell: Cell, clock: str) -> float | None:
    """Seconds of a run that the method itself spent, by the task's clock."""
    if clock == "timed":
        return None if cell.timing is None else cell.timing.own_seconds
    return cell.overhead_seconds


def rounds_of(cells: Sequence[Cell], clock: str) -> tuple[float, ...]:
    """Mean seconds of the runs in each round of their measurement; by another clock, one round: what the runs took."""
    if clock == "timed":
        timed = [cell.timing.rounds or (cell.timing.seconds,) for cell in cells if cell.timing is not None]
        if len(set(map(len, timed))) > 1:
            return (statistics.fmean(map(statistics.median, timed)),)
        return tuple(map(statistics.fmean, zip(*timed, strict=True)))
    seconds = mean(cell.seconds for cell in cells)
    return () if seconds is None else (seconds,)


def seconds_estimate(cells: Sequence[Cell], clock: str) -> Estimate | None:
    """Seconds with their deviation: median and deviation of rounds where timed, else mean and deviation of runs."""
    if clock == "timed":
        rounds = rounds_of(cells, clock)
        if not rounds:
            return None
        return Estimate(statistics.median(rounds), statistics.stdev(rounds) if len(rounds) > 1 else None)
    return estimate([cell.seconds for cell in cells if cell.seconds is not None])
