"""Budgets in real units, met: accuracy at equal measured latency, a later larger batch that fits, two budgets at once.

    python bench/benchmarks/real_budgets.py --out results/real_budgets.json

* latency: a run with a latency budget beside runs with FLOPs budgets, seed by seed. All finished models are timed in
  turns; the FLOPs-budget accuracy is read off, by straight lines, at the seconds that the latency-budget model takes.
* fits: a limit of memory that the dense model breaks at a larger batch, and the model that was cut at a smaller one
  keeps.
* two: FLOPs 0.5 and memory 0.6 in one run.

Run it on an otherwise idle machine: what else runs is in the seconds.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import keep
from torch import Tensor, nn

import setpoint
from setpoint.resources.live_bytes import peak_bytes
from setpoint.resources.median import median_of
from setpoint.spending.seconds import Stopwatch
from setpoint_bench.catalogue import task_named
from setpoint_bench.report.statistics import paired
from setpoint_bench.task import Task, dense_widths

RESULTS = Path(__file__).resolve().parents[2] / "results"
FLOPS = (0.8, 0.6, 0.45, 0.3, 0.2)
"""Budgets of the FLOPs runs, as shares of dense: their models must lie on both sides of the latency run's."""


def trained(task: Task, seed: int, budget: Any) -> tuple[nn.Module, setpoint.Summary]:
    """A model that was trained and cut to a budget, and how it met the budget."""
    torch.manual_seed(seed)
    model = task.build(dense_widths(task))
    optimizer = task.optimizer(model)
    schedule, batches = task.schedule(optimizer), task.batches(seed)
    loop = setpoint.attach(model, optimizer, budget, example=task.example(), total_steps=task.steps)
    for _ in range(task.steps):
        task.loss(model, *next(batches)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model, loop.finish()


def stepper(task: Task, model: nn.Module) -> Callable[[], None]:
    """One training step of a copy of the model on one batch."""
    model = copy.deepcopy(model).train()
    optimizer, (inputs, targets) = task.optimizer(model), next(task.batches(0))

    def step() -> None:
        task.loss(model, inputs, targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step


def timed(task: Task, models: Sequence[nn.Module], rounds: int) -> list[dict[str, float]]:
    """Seconds of a training step of each model, in turns, so that a machine whose speed drifts favours none."""
    steps = [stepper(task, model) for model in models]
    times: list[list[float]] = [[] for _ in models]
    watch = Stopwatch(synchronize=True)
    for _ in range(rounds):
        for step, mine in zip(steps, times, strict=True):
            with watch:
                step()
            mine.append(watch.last_seconds)
    found = [median_of(mine) for mine in times]
    return [{"step_s": each.value, "low_s": each.low, "high_s": each.high} for each in found]


def latency(task: Task, seeds: Sequence[int], fraction: float, rounds: int) -> dict[str, Any]:
    """Accuracy of a latency budget, and of FLOPs budgets at the same measured seconds."""
    rows = []
    for seed in seeds:
        budgets = [setpoint.Budget.fraction(fraction, of="latency")]
        budgets += [setpoint.Budget.fraction(each, of="flops") for each in FLOPS]
        runs = [trained(task, seed, budget) for budget in budgets]
        seconds = timed(task, [model for model, _ in runs], rounds)
        mine, *others = [
            {
                **measured,
                "resource": budget.resource,
                "budget": budget.limit,
                "accuracy": task.evaluate(model, "test").accuracy,
                "budget_met": summary.budget_met,
                "limit": summary.limit[budget.resource],
                "metered": summary.metered.get(budget.resource),
                "flops_ratio": summary.final_flops_ratio,
            }
            for budget, (model, summary), measured in zip(budgets, runs, seconds, strict=True)
        ]
        others.sort(key=lambda row: row["step_s"])
        at = [row["step_s"] for row in others]
        flops_accuracy = float(np.interp(mine["step_s"], at, [row["accuracy"] for row in others]))
        rows.append(
            {
                "seed": seed,
                "latency": mine,
                "flops": others,
                "flops_accuracy": flops_accuracy,
                "difference": mine["accuracy"] - flops_accuracy,
                "between": at[0] <= mine["step_s"] <= at[-1],
            }
        )
    gains = [row["difference"] for row in rows]
    found = paired(gains)
    return {
        "fraction": fraction,
        "rows": rows,
        "mean_difference": found.mean,
        "half_interval": None if found.high is None else found.high - found.mean,
        "over_budget": max(row["latency"]["metered"] / row["latency"]["limit"] - 1 for row in rows),
    }


def peak(task: Task, model: nn.Module, batch: tuple[Tensor, Tensor]) -> int:
    """Peak bytes of one training step on this batch, with optimizer state in place."""
    model = copy.deepcopy(model).train()
    optimizer = task.optimizer(model)

    def step() -> None:
        task.loss(model, *batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    step()
    held = [*model.parameters(), *model.buffers(), *batch]
    held += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return peak_bytes(step, held, task.device)


def larger(task: Task, times: int) -> tuple[Tensor, Tensor]:
    """A batch so many times as large as training's."""
    batches = task.batches(0)
    parts = [next(batches) for _ in range(times)]
    return torch.cat([inputs for inputs, _ in parts]), torch.cat([targets for _, targets in parts])


def fits(task: Task, times: int) -> dict[str, Any]:
    """A limit between what the dense and the cut model need at a batch `times` as large."""
    batch, dense = larger(task, times), task.build(dense_widths(task))
    needed = peak(task, dense, batch)
    limit = round(0.75 * needed)
    # At the larger batch activations weigh more, and it is they that are cut least evenly: half leaves room.
    model, summary = trained(task, 0, setpoint.Budget.fraction(0.5, of="memory"))
    cut = peak(task, model, batch)
    return {
        "batch": len(batch[0]) // times,
        "larger_batch": len(batch[0]),
        "limit_bytes": limit,
        "dense_bytes": needed,
        "cut_bytes": cut,
        "dense_fits": needed <= limit,
        "cut_fits": cut <= limit,
        "budget_met": summary.budget_met,
        "metered_over_limit": summary.metered["memory"] / summary.limit["memory"] - 1,
        "accuracy": task.evaluate(model, "test").accuracy,
    }


def two(task: Task) -> dict[str, Any]:
    """FLOPs 0.5 and memory 0.6 in one run."""
    budgets = [setpoint.Budget.fraction(0.5, of="flops"), setpoint.Budget.fraction(0.6, of="memory")]
    model, summary = trained(task, 0, budgets)
    return {
        "budget_met": summary.budget_met,
        "flops_over_limit": summary.spent["flops"] / summary.limit["flops"] - 1,
        "memory_over_limit": summary.metered["memory"] / summary.limit["memory"] - 1,
        "limits": {"flops": 0.5, "memory": 0.6},
        "accuracy": task.evaluate(model, "test").accuracy,
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "real_budgets.json")
    parser.add_argument("--task", default="digits")
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--fraction", type=float, default=0.5, help="of the dense latency")
    parser.add_argument("--rounds", type=int, default=60, help="steps by which finished models are timed")
    parser.add_argument("--times", type=int, default=4, help="how much larger the later batch is")
    parser.add_argument("--parts", default="latency,fits,two", help="with commas")
    args = parser.parse_args()
    task = task_named(args.task, epochs=args.epochs)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "latency": lambda: latency(task, range(args.seeds), args.fraction, args.rounds),
        "fits": lambda: fits(task, args.times),
        "two": lambda: two(task),
    }
    found = {name: parts[name]() for name in args.parts.split(",")}
    short = {name: {key: value for key, value in each.items() if key != "rows"} for name, each in found.items()}
    keep({"task": task.name, "steps": task.steps, **found}, args.out, short)


if __name__ == "__main__":
    main()
