"""The summary: one row per task, method and budget, over seeds, beside the dense model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from setpoint.report.numbers import NOTHING, duration, human, percent, signed
from setpoint.report.results import Cell, Results

DENSE = "dense"
ORDER = (DENSE, "small")
"""Methods that come first: the dense model, then its honest rival."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its sample standard deviation, None for a single seed."""

    mean: float
    deviation: float | None = None


@dataclass(frozen=True)
class Row:
    """What one method did on one task at one budget. Ratios are to the dense model's mean.

    Args:
        task: name of the task.
        method: name of the method.
        budget: the fraction asked for, None where there is none.
        label: the method, with its budget where the task has it at several.
        metric: "accuracy" or "loss".
        split: "test" or "validation": what the metric was measured on.
        num_seeds: how many runs are behind the row.
        value: the metric.
        difference: `value` minus the dense model's, paired by seed where both have it.
        final_flops: FLOPs of one optimizer step of the finished model.
        final_flops_ratio: the same / dense.
        final_params: parameters of the finished model.
        final_params_ratio: the same / dense.
        train_flops: FLOPs of the whole run, overhead included.
        train_flops_ratio: the same / dense.
        seconds: duration of training, overhead included.
        seconds_ratio: the same / dense.
        overhead_seconds: part of `seconds` that Setpoint spent: attaching, sensing, deciding, resizing.
        overhead_flops: part of `train_flops` spent on them.
        realised: seconds saved / FLOPs saved, both as shares of the dense run.
        break_even_step: step from which on the run is ahead of the dense run in seconds.
        resizes: mean number of cuts.
        num_landed: how many runs ended within budget, None where there is none to meet.
    """

    task: str
    method: str
    budget: float | None
    label: str
    metric: str
    split: str
    num_seeds: int
    value: Estimate
    difference: Estimate | None
    final_flops: float | None
    final_flops_ratio: float | None
    final_params: float | None
    final_params_ratio: float | None
    train_flops: float | None
    train_flops_ratio: float | None
    seconds: Estimate | None
    seconds_ratio: float | None
    overhead_seconds: float | None
    overhead_flops: float | None
    realised: float | None
    break_even_step: float | None
    resizes: float | None
    num_landed: int | None


def summary_rows(results: Results) -> tuple[Row, ...]:
    """One row per task, method and budget: dense first, then the small model, then the rest."""
    rows = []
    for task in results.tasks():
        cells = results.of(task)
        dense = tuple(cell for cell in cells if cell.method == DENSE)
        rows += [summarise(label, members, dense) for label, members in series(cells).items()]
    return tuple(rows)


def series(cells: Sequence[Cell]) -> dict[str, tuple[Cell, ...]]:
    """Cells of one task by label, in the order of the rows; what one label holds differs by seed only."""
    budgets: dict[str, set[float | None]] = {}
    for cell in cells:
        budgets.setdefault(cell.method, set()).add(cell.budget)
    found: dict[str, list[Cell]] = {}

    def rank(cell: Cell) -> tuple[int, float]:
        methods = [*(name for name in ORDER if name in budgets), *(name for name in budgets if name not in ORDER)]
        return methods.index(cell.method), -(cell.budget or 0.0)

    for cell in sorted(cells, key=rank):
        several = cell.method != DENSE and len(budgets[cell.method]) > 1
        label = f"{cell.method} {cell.budget:g}" if several and cell.budget is not None else cell.method
        found.setdefault(label, []).append(cell)
    return {label: tuple(members) for label, members in found.items()}


def summarise(label: str, cells: tuple[Cell, ...], dense: tuple[Cell, ...]) -> Row:
    """One row from the runs of one method at one budget."""
    first = cells[0]

    def both(of: Callable[[Cell], float | None]) -> tuple[float | None, float | None]:
        value = mean(map(of, cells))
        return value, ratio(value, mean(map(of, dense)))

    final_flops, final_flops_ratio = both(lambda cell: cell.final_flops)
    final_params, final_params_ratio = both(lambda cell: cell.final_params)
    train_flops, train_flops_ratio = both(lambda cell: cell.train_flops)
    _, seconds_ratio = both(lambda cell: cell.seconds)
    landings = [cell.landed for cell in cells if cell.landed is not None]
    is_dense = first.method == DENSE
    return Row(
        task=first.task,
        method=first.method,
        budget=first.budget,
        label=label,
        metric=first.metric,
        split=first.split,
        num_seeds=len(cells),
        value=estimate([cell.value for cell in cells]) or Estimate(math.nan),
        difference=None if is_dense else difference(cells, dense),
        final_flops=final_flops,
        final_flops_ratio=final_flops_ratio,
        final_params=final_params,
        final_params_ratio=final_params_ratio,
        train_flops=train_flops,
        train_flops_ratio=train_flops_ratio,
        seconds=estimate([cell.seconds for cell in cells if cell.seconds is not None]),
        seconds_ratio=seconds_ratio,
        overhead_seconds=mean(cell.overhead_seconds for cell in cells),
        overhead_flops=mean(cell.overhead_flops for cell in cells),
        realised=realised(train_flops_ratio, seconds_ratio),
        break_even_step=None if is_dense else mean(break_even_step(cell, dense) for cell in cells),
        resizes=mean(cell.resizes for cell in cells),
        num_landed=sum(landings) if landings and not is_dense else None,
    )


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are known, None if none is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def ratio(value: float | None, whole: float | None) -> float | None:
    """`value / whole`, None if either is unknown or the whole is 0."""
    return None if value is None or not whole else value / whole


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and sample standard deviation, None without values."""
    if not values:
        return None
    return Estimate(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def difference(cells: Sequence[Cell], dense: Sequence[Cell]) -> Estimate | None:
    """How far the metric lies from the dense model's: paired by seed, else between the means."""
    by_seed = {cell.seed: cell.value for cell in dense}
    pairs = [cell.value - by_seed[cell.seed] for cell in cells if cell.seed in by_seed]
    if pairs:
        return estimate(pairs)
    if not dense:
        return None
    return Estimate(statistics.fmean(cell.value for cell in cells) - statistics.fmean(by_seed.values()))


def realised(flops_ratio: float | None, seconds_ratio: float | None) -> float | None:
    """Seconds saved / FLOPs saved; None where no FLOPs were saved to speak of."""
    if flops_ratio is None or seconds_ratio is None or flops_ratio > 0.99:
        return None
    return (1 - seconds_ratio) / (1 - flops_ratio)


def break_even_step(cell: Cell, dense: Sequence[Cell]) -> float | None:
    """First step from which on the run had taken fewer seconds than the dense run of the same seed.

    None if it never did, or if there is no history to compare.
    """
    rival = next((other for other in dense if other.seed == cell.seed), dense[0] if dense else None)
    if rival is None or rival is cell:
        return None
    ours, theirs = clock(cell), clock(rival)
    if len(ours) < 2 or len(theirs) < 2:
        return None
    seconds = np.interp(ours[:, 0], theirs[:, 0], theirs[:, 1], left=np.nan, right=np.nan)
    comparable = ~np.isnan(seconds)
    steps, behind = ours[comparable, 0], (ours[:, 1] > seconds)[comparable]
    last = int(np.flatnonzero(behind)[-1]) if behind.any() else -1
    return float(steps[last + 1]) if last + 1 < len(steps) else None


def clock(cell: Cell) -> Float64[np.ndarray, "ticks 2"]:
    """Steps and seconds of a run, sorted, one row per step."""
    ticks = {point.step: point.seconds for point in cell.history if point.seconds is not None}
    return np.array(sorted(ticks.items()), dtype=np.float64).reshape(-1, 2)


HEADINGS = (
    "method",
    "metric",
    "to dense",
    "FLOPs / step",
    "of dense",
    "parameters",
    "of dense",
    "training FLOPs",
    "of dense",
    "training time",
    "of dense",
    "overhead",
    "cuts",
    "landed",
)


def row_texts(row: Row) -> tuple[str, ...]:
    """A row as texts under `HEADINGS`, for terminals and pages."""
    return (
        row.label,
        metric_text(row),
        difference_text(row),
        human(row.final_flops, "FLOP"),
        percent(row.final_flops_ratio),
        human(row.final_params),
        percent(row.final_params_ratio),
        human(row.train_flops, "FLOP"),
        percent(row.train_flops_ratio),
        seconds_text(row),
        percent(row.seconds_ratio),
        overhead_text(row),
        NOTHING if not row.resizes else f"{row.resizes:.1f}".removesuffix(".0"),
        NOTHING if row.num_landed is None else landed_text(row.num_landed, row.num_seeds),
    )


def metric_text(row: Row) -> str:
    """The metric with its spread: accuracies in percent, losses as they are."""
    if not math.isfinite(row.value.mean):
        return "not a number"
    factor, decimals, unit = (100.0, 2, " %") if row.metric == "accuracy" else (1.0, 4, "")
    text = f"{row.value.mean * factor:.{decimals}f}"
    if row.value.deviation is not None:
        text += f" ± {row.value.deviation * factor:.{decimals}f}"
    return text + unit


def difference_text(row: Row) -> str:
    """The difference to dense: accuracies in points (hundredths), losses as they are."""
    if row.difference is None:
        return NOTHING
    factor, decimals, unit = (100.0, 2, " points") if row.metric == "accuracy" else (1.0, 4, "")
    text = signed(row.difference.mean * factor, decimals)
    if row.difference.deviation is not None:
        text += f" ± {row.difference.deviation * factor:.{decimals}f}"
    return text + unit


def seconds_text(row: Row) -> str:
    """The training time with its spread."""
    if row.seconds is None:
        return NOTHING
    spread = "" if row.seconds.deviation is None else f" ± {duration(row.seconds.deviation)}"
    return duration(row.seconds.mean) + spread


def overhead_text(row: Row) -> str:
    """The overhead in seconds and as a share of the training time."""
    if not row.overhead_seconds:
        return NOTHING
    share = ratio(row.overhead_seconds, row.seconds.mean if row.seconds else None)
    return f"{duration(row.overhead_seconds)} ({percent(share)})"


def landed_text(num_landed: int, num_runs: int) -> str:
    """Whether the budget was met: yes, no, or in how many runs."""
    if num_runs == 1:
        return "yes" if num_landed else "no"
    return f"{num_landed} of {num_runs}"
