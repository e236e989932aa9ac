"""The summary of a benchmark: what every method came to at one budget, as one JSON object."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from setpoint_bench.report.statistics import share_of
from setpoint_bench.results import Result
from setpoint_bench.task import BenchError

Run = tuple[Result, tuple[float, ...]]
"""A run, and its seconds in each round of their measurement: one round where the clock was its own."""


def summarise(results: Sequence[Result], rounds: Sequence[tuple[float, ...]] = ()) -> dict[str, Any]:
    """Results of one task as `{"task", "budget", "methods": {name: numbers}}`.

    With several seeds the numbers are means, and a method's "runs" holds each run. With several
    budgets "budgets" holds one such object for each, and the outer one is that of the first.

    Args:
        results: all of one task.
        rounds: of each result, what each round of a timing says, in seconds; none where nothing was timed. Shares of
            the dense model's seconds are medians over rounds, as in the tables.

    Raises:
        BenchError: there are none.
    """
    if not results:
        raise BenchError("no finished run to sum up")
    runs = list(zip(results, rounds or [(result.seconds,) for result in results], strict=True))
    budgets: list[float | None] = list(
        dict.fromkeys(result.budget for result in results if result.budget is not None)
    ) or [None]
    parts = [_at(budget, runs) for budget in budgets]
    several = {"budgets": parts} if len(parts) > 1 else {}
    return {"task": results[0].task, **parts[0], **several}


def _at(budget: float | None, runs: Sequence[Run]) -> dict[str, Any]:
    """The methods at one budget, beside those that have none."""
    methods: dict[str, list[Run]] = {}
    for run in runs:
        if run[0].budget in (None, budget):
            methods.setdefault(run[0].method, []).append(run)
    dense = methods.get("dense", [])
    by_seed = {run[0].seed: run for run in dense}
    told = {}
    for name, cells in methods.items():
        numbers = _mean([_numbers(run, by_seed.get(run[0].seed)) for run in cells])
        if "seconds_ratio" in numbers:  # of means round by round, not the mean of shares
            numbers.update(_seconds_saved(cells, dense, numbers["train_flops_ratio"]))
        told[name] = numbers
    return {"budget": budget, "methods": told}


def _seconds_saved(runs: Sequence[Run], dense: Sequence[Run], train_flops_ratio: float) -> dict[str, float | None]:
    """The share of the dense model's seconds, and seconds saved / FLOPs saved."""
    share, saved = share_of(_mean_rounds(runs), _mean_rounds(dense)), 1 - train_flops_ratio
    assert share is not None, "a run takes seconds"
    ratio = (1 - share.value) / saved if saved > 0.01 else None
    return {"seconds_ratio": share.value, "seconds_saved_per_flops_saved": ratio}


def _mean_rounds(runs: Sequence[Run]) -> tuple[float, ...]:
    return tuple(map(statistics.fmean, zip(*(rounds for _, rounds in runs), strict=True)))


def _numbers(run_and_rounds: Run, dense: Run | None) -> dict[str, Any]:
    """What one run came to; ratios are to the dense run of the same seed."""
    run = run_and_rounds[0]
    numbers: dict[str, Any] = {
        "seed": run.seed,
        run.metric: run.value,
        "final_flops": run.final_flops,
        "final_params": run.final_params,
        "train_flops": run.train_flops,
        "seconds": run.seconds,
        "steps": run.steps,
    }
    if run.dense_flops is not None:
        numbers["final_flops_ratio"] = run.final_flops / run.dense_flops
    if dense is not None and run is not dense[0]:
        numbers["final_flops_ratio"] = run.final_flops / dense[0].final_flops
        numbers["train_flops_ratio"] = run.train_flops / dense[0].train_flops
        if "shared" not in (run.clock, dense[0].clock):  # clocks of cells that ran beside others do not compare
            numbers.update(_seconds_saved([run_and_rounds], [dense], numbers["train_flops_ratio"]))
    if run.budget_met is not None:
        numbers["budget_met"] = run.budget_met
        numbers["resizes"] = run.resizes
        numbers["overhead_seconds"] = run.overhead_seconds
        numbers["overhead_seconds_ratio"] = run.overhead_seconds / run.seconds
        numbers["overhead_flops"] = run.overhead_flops
        numbers["overhead_flops_ratio"] = run.overhead_flops / run.train_flops
        if run.claimed_flops is not None:
            numbers["counter_agrees"] = run.claimed_flops == run.final_flops
    return numbers


def _mean(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run itself, or means over several with the runs beside them; what must hold, must hold in all."""
    if len(runs) == 1:
        return {key: value for key, value in runs[0].items() if key != "seed"}
    means: dict[str, Any] = {}
    for key in runs[0]:
        if key == "seed" or any(key not in run for run in runs):
            continue
        values = [run[key] for run in runs if run[key] is not None]
        if not values:
            means[key] = None
        elif all(isinstance(value, bool) for value in values):
            means[key] = all(values)
        else:
            means[key] = statistics.fmean(values)
    return {**means, "runs": runs}
