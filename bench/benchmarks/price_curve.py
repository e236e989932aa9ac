"""What a price buys: the curve of accuracy, or loss, against cost as the rate is swept, on validation data.

    python bench/benchmarks/price_curve.py --data DIR --out results/price.json

Rates are relative: loss that the whole dense cost is worth, in FLOPs. Tasks in the file that are not measured again
are kept.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from record import keep_rows

import setpoint
from setpoint_bench.catalogue import task_named
from setpoint_bench.task import Task, dense_widths

RATES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def priced(task: Task, rate: float, seed: int) -> dict[str, Any]:
    """One run under a price, and what it came to."""
    torch.manual_seed(seed)
    model = task.build(dense_widths(task))
    optimizer = task.optimizer(model)
    schedule = task.schedule(optimizer)
    price = setpoint.Price(rate, of="flops")
    with setpoint.attach(model, optimizer, price, example=task.example(), total_steps=task.steps) as loop:
        for inputs, targets in islice(task.batches(seed), task.steps):
            loss = task.loss(model, inputs, targets)
            torch.autograd.backward(loss)
            loop.observe(loss=loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    score, summary = task.evaluate(model, "validation"), loop.summary
    assert summary is not None
    return {
        "rate": rate,
        "seed": seed,
        "metric": task.metric,
        "value": score.accuracy if task.metric == "accuracy" else score.loss,
        "loss": score.loss,
        "flops_ratio": summary.final_flops_ratio,
        "train_flops_ratio": summary.train_flops / (summary.dense_flops * task.steps),
        "budget_met": summary.budget_met,
    }


def main() -> None:
    """Sweep, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="finetune")
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="with commas")
    parser.add_argument("--seeds", default="0,1,2", help="with commas")
    parser.add_argument("--data", type=Path, default=None, help="folder that holds the data")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    task = task_named(args.task, data=args.data)
    rows = []
    for rate in map(float, args.rates.split(",")):
        for seed in map(int, args.seeds.split(",")):
            row = priced(task, rate, seed)
            print(
                f"rate {rate:g}, seed {seed}: {row['value']:.4f} at {row['flops_ratio']:.1%} of the FLOPs", flush=True
            )
            rows.append({"task": task.name, **row})
    keep_rows(rows, args.out)


if __name__ == "__main__":
    main()
