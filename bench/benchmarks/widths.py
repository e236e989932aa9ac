"""Seconds of a training step: the widths that Setpoint found, beside even widths of the same FLOPs.

    python bench/benchmarks/widths.py --out results/widths.json
    python bench/benchmarks/widths.py --out results/widths.json --runs RUNS [MORE RUNS]    methods that look at seconds

Each model of the committed results (first seed) is cut again to its widths. A model with the same share of units in
each group is cut to the same FLOPs in whole blocks. They take turns with the dense model; a turn is a few training
steps of the task's recipe, on one thread. Run it on an otherwise idle machine. With `--runs` the models of `setpoint`,
`setpoint-quick` and `setpoint-quick@share=0.2` take turns, as the folders have them at seed 0.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from record import held_in, keep_machine, write
from torch import nn

import setpoint
from setpoint.controller.selection import landing_widths
from setpoint.cost.flops import flops_cost
from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import trace
from setpoint_bench.catalogue import task_named
from setpoint_bench.environment import machine
from setpoint_bench.report.folder import read_lines
from setpoint_bench.report.packed import file_of
from setpoint_bench.report.summary import SETPOINT
from setpoint_bench.results import FILE
from setpoint_bench.task import Task, dense_widths

RESULTS = Path(__file__).resolve().parents[2] / "results"
TASKS = ("cifar10", "cifar10-mini", "shakespeare", "shakespeare-mini", "finetune", "banking77", "clothing", "resnet56")
ENOUGH_S = 1.0
BY_SECONDS = (SETPOINT, "setpoint-quick", "setpoint-quick@share=0.2")


def step_of(task: Task, model: nn.Module) -> Callable[[], None]:
    """A training step of the task's recipe on one batch."""
    optimizer = task.optimizer(model)
    inputs, targets = next(task.batches(0))

    def step() -> None:
        torch.autograd.backward(task.loss(model, inputs, targets))
        optimizer.step()
        optimizer.zero_grad()

    return step


def cut(dense: nn.Module, groups: tuple[Group, ...], widths: Mapping[str, int]) -> nn.Module:
    """A copy of the model that keeps the first units of each group."""
    model = copy.deepcopy(dense)
    setpoint.shrink(model, None, groups, {g.name: np.arange(g.num_units) < widths[g.name] for g in groups})
    return model


def timed(task: Task, models: Mapping[str, nn.Module], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each model in each turn."""
    steps = {arm: step_of(task, model) for arm, model in models.items()}
    turns: dict[str, list[float]] = {arm: [] for arm in steps}
    for number in range(rounds + 1):
        for arm, step in steps.items():
            began, count = time.perf_counter(), 0
            while count < 2 or time.perf_counter() - began < ENOUGH_S:
                step()
                count += 1
            if number:
                turns[arm].append((time.perf_counter() - began) / count)
    return turns


def beside(folder: Path, rounds: int) -> dict[str, Any]:
    """The row of a folder of runs: seconds of a step at the widths of each method."""
    rows = [row for row in read_lines(folder / FILE, FILE, []) if row["seed"] == 0 and row["method"] in BY_SECONDS]
    budget = min(row["budget"] for row in rows if row["method"] != SETPOINT)
    chosen = {row["method"]: row for row in rows if row["budget"] == budget}
    task = task_named(rows[0]["task"])
    torch.manual_seed(0)
    dense = task.build(dense_widths(task)).train()
    traced = trace(copy.deepcopy(dense), task.example())
    full = widths_of(traced.groups)
    models = {name: cut(dense, traced.groups, {**full, **chosen[name]["widths"]}) for name in BY_SECONDS}
    print(f"{rows[0]['task']}: {', '.join(models)}", flush=True)
    return {"task": rows[0]["task"], "budget": budget, "step_seconds": timed(task, models, rounds)}


def found_by_setpoint(name: str) -> list[dict[str, Any]]:
    """The committed rows of Setpoint on a task, of the first seed, smaller budgets first."""
    rows = read_lines(file_of(RESULTS / name, FILE), FILE, [])
    chosen = {row["budget"]: row for row in rows if row["method"] == SETPOINT and row["seed"] == 0}
    return [chosen[budget] for budget in sorted(chosen)]


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each budget of a task."""
    task = task_named(name)
    torch.manual_seed(0)
    dense = task.build(dense_widths(task)).train()
    traced = trace(copy.deepcopy(dense), task.example())
    cost, full = flops_cost(traced), widths_of(traced.groups)
    rows = []
    for row in found_by_setpoint(name):
        found = {**full, **row["widths"]}
        flops = cost.total(found)
        free = tuple(group for group in traced.groups if group.name in row["widths"])
        even = {**full, **landing_widths(cost, full, full, free, flops)}
        models = {"dense": copy.deepcopy(dense), "even": cut(dense, traced.groups, even)}
        models["Setpoint"] = cut(dense, traced.groups, found)
        turns = timed(task, models, rounds)
        ratios = [ours / theirs for ours, theirs in zip(turns["Setpoint"], turns["even"], strict=True)]
        rows.append(
            {
                "task": name,
                "budget": row["budget"],
                "flops": {"dense": cost.total(full), "even": cost.total(even), "Setpoint": flops},
                "step_seconds": turns,
                "ratio": median(ratios),
                "ratios": ratios,
                "widths": {"even": even, "Setpoint": found},
            }
        )
        print(f"{name} {row['budget']}: Setpoint / even {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    return rows


def main() -> None:
    """Measure, print a line for each model, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--tasks", default=",".join(TASKS), help="with commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runs", type=Path, nargs="+", help="folders that `setpoint bench --out` wrote")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.runs:
        found = [beside(folder, args.rounds) for folder in args.runs]
        about = {"rounds": args.rounds, "date": str(date.today()), "environment": {**machine(), "threads": 1}}
        if args.out:
            write({**held_in(args.out), "by_seconds": {**about, "rows": found}}, args.out)
        print(json.dumps({"rows": len(found)}))
        return
    rows = [row for name in args.tasks.split(",") for row in measure(name, args.rounds)]
    middle = median(row["ratio"] for row in rows)
    found_here = {"seed": 0, "rounds": args.rounds, "median_ratio": middle, "rows": rows}
    keep_machine(found_here, args.out, shown={"rows": len(rows)})


if __name__ == "__main__":
    main()
