"""Setpoint with one thing changed, on validation data: what its defaults are chosen by.

    python bench/benchmarks/ablation.py --task cifar10-mini --seeds 0,1 --data DIR --out results/ablation.json

Runs that the folder already holds are not run again, and rows of other tasks in the file are kept.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from record import keep

from setpoint.ledger import Ledger
from setpoint_bench.catalogue import task_named
from setpoint_bench.method import method_named
from setpoint_bench.progress import ProgressBars
from setpoint_bench.results import LEDGER, Result
from setpoint_bench.runner import finished, grid, run

VARIANTS = ("small", "setpoint", "setpoint-uniform", "setpoint-early", "setpoint-late")


def row_of(result: Result, folder: Path) -> dict[str, Any]:
    """What the file keeps of a run.

    `grown` is how many units came back, `dropped_again` how many of those went again; `held` is what a meter read
    last, as a share of the limit by resource.
    """
    names = ("task", "method", "budget", "seed", "metric", "value", "split", "train_flops", "final_flops", "date")
    row: dict[str, Any] = {name: getattr(result, name) for name in names}
    row |= {name: result.environment[name] for name in ("cpu", "threads", "torch")}
    path = folder / result.folder / LEDGER
    if not path.exists():
        return row
    ledger = Ledger.load(path)
    last, grown = ledger[-1], sum(len(units) for entry in ledger for units in entry.grown.values())
    drops = Counter((name, unit) for entry in ledger for name, units in entry.dropped.items() for unit in units)
    again = sum(count > 1 for count in drops.values())
    held = {name: value / last.limit[name] for name, value in last.metered.items() if name in last.limit}
    row |= {"overhead_flops": result.overhead_flops, "grown": grown, "dropped_again": again}
    return row | ({"held": held} if held else {})


def main() -> None:
    """Run what is missing, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="cifar10-mini")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="methods, with commas")
    parser.add_argument("--budgets", default="0.5,0.25", help="with commas")
    parser.add_argument("--seeds", default="0,1", help="with commas")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data", type=Path, default=None, help="folder that holds the data")
    parser.add_argument("--folder", type=Path, default=Path("runs/ablation"), help="of the runs")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    task = task_named(args.task, data=args.data)
    methods = tuple(method_named(name) for name in args.variants.split(","))
    budgets, seeds = map(float, args.budgets.split(",")), map(int, args.seeds.split(","))
    cells = grid(task, methods, dict.fromkeys(budgets), dict.fromkeys(seeds), "validation")
    done = finished(cells, args.folder)
    with ProgressBars([cell for cell in cells if cell not in done]) as bars:
        outcome = run(cells, args.folder, bars, workers=args.workers)
    rows = [row_of(result, args.folder) for result in outcome.results]
    if args.out is not None and args.out.exists():
        made = {(row["task"], row["method"], row["budget"], row["seed"]) for row in rows}
        old = json.loads(args.out.read_text(encoding="utf-8"))["rows"]
        rows = [row for row in old if (row["task"], row["method"], row["budget"], row["seed"]) not in made] + rows
    keep({"rows": rows}, args.out, shown={"rows": len(rows)})


if __name__ == "__main__":
    main()
