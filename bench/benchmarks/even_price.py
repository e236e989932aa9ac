"""What one width for all layers of a kind costs in loss, against free widths at the same budget, on validation data.

    python bench/benchmarks/even_price.py --data DIR --out results/even.json

Tasks in the file that are not measured again are kept.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from record import keep_rows

import setpoint
from setpoint_bench.catalogue import task_named
from setpoint_bench.task import Task, dense_widths


def measured(task: Task, fraction: float, seed: int, *, even: bool) -> dict[str, Any]:
    """One run at a budget, and what it came to."""
    torch.manual_seed(seed)
    model = task.build(dense_widths(task))
    optimizer = task.optimizer(model)
    schedule = task.schedule(optimizer)
    budget = setpoint.Budget.fraction(fraction, of="flops")
    with setpoint.attach(
        model, optimizer, budget, example=task.example(), total_steps=task.steps, even=even, verify=False
    ) as loop:
        for inputs, targets in islice(task.batches(seed), task.steps):
            torch.autograd.backward(task.loss(model, inputs, targets))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    score, summary = task.evaluate(model, "validation"), loop.summary
    assert summary is not None
    return {
        "budget": fraction,
        "even": even,
        "seed": seed,
        "steps": task.steps,
        "loss": score.loss,
        "accuracy": score.accuracy,
        "flops_ratio": summary.final_flops_ratio,
        "widths": sorted(loop.widths.values()),
        "budget_met": summary.budget_met,
    }


def main() -> None:
    """Run both at every budget and seed, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="shakespeare-mini")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--budgets", default="0.5,0.35", help="with commas")
    parser.add_argument("--seeds", default="0,1,2", help="with commas")
    parser.add_argument("--data", type=Path, default=None, help="folder that holds the data")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    task = task_named(args.task, steps=args.steps, data=args.data)
    rows: list[dict[str, Any]] = []
    for fraction in map(float, args.budgets.split(",")):
        for seed in map(int, args.seeds.split(",")):
            for even in (False, True):
                row = measured(task, fraction, seed, even=even)
                print(f"{fraction:.0%}, seed {seed}, {'even' if even else 'free'}: {row['loss']:.4f}", flush=True)
                rows.append({"task": task.name, **row})
                if args.out is not None:
                    keep_rows(rows, args.out)
        pairs = [[r["loss"] for r in rows if r["even"] == even and r["budget"] == fraction] for even in (True, False)]
        apart = [one - other for one, other in zip(*pairs, strict=True)]
        print(f"{fraction:.0%}: even less free {mean(apart):+.4f} ({min(apart):+.4f} to {max(apart):+.4f})", flush=True)


if __name__ == "__main__":
    main()
