"""The summary of a benchmark: what every method came to at one budget, as one JSON object."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from setpoint_bench.results import Result
from setpoint_bench.task import BenchError


def summarise(results: Sequence[Result]) -> dict[str, Any]:
    """Results of one task as `{"task", "budget", "methods": {name: numbers}}`.

    With several seeds the numbers are means, and a method's "runs" holds each run. With several
    budgets "budgets" holds one such object for each, and the outer one is that of the first.

    Args:
        results: all of one task.

    Raises:
        BenchError: there are none.
    """
    if not results:
        raise BenchError("no finished run to sum up")
    budgets: list[float | None] = list(
        dict.fromkeys(result.budget for result in results if result.budget is not None)
    ) or [None]
    parts = [_at(budget, results) for budget in budgets]
    several = {"budgets": parts} if len(parts) > 1 else {}
    return {"task": results[0].task, **parts[0], **several}


def _at(budget: float | None, results: Sequence[Result]) -> dict[str, Any]:
    """The methods at one budget, beside those that have none."""
    methods: dict[str, list[Result]] = {}
    for run in results:
        if run.budget in (None, budget):
            methods.setdefault(run.method, []).append(run)
    dense = {run.seed: run for run in methods.get("dense", [])}
    told = {name: _mean([_numbers(run, dense.get(run.seed)) for run in runs]) for name, runs in methods.items()}
    return {"budget": budget, "methods": told}


def _numbers(run: Result, dense: Result | None) -> dict[str, Any]:
    """What one run came to; ratios are to the dense run of the same seed."""
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
    if dense is not None and run is not dense:
        numbers["final_flops_ratio"] = run.final_flops / dense.final_flops
        numbers["train_flops_ratio"] = run.train_flops / dense.train_flops
        if "shared" not in (run.clock, dense.clock):  # clocks of cells that ran beside others do not compare
            saved = 1 - numbers["train_flops_ratio"]
            numbers["seconds_ratio"] = run.seconds / dense.seconds
            numbers["seconds_saved_per_flops_saved"] = (1 - numbers["seconds_ratio"]) / saved if saved > 0.01 else None
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
