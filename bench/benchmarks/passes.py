"""Runs of a task at a multiple of its passes, or made again, gathered in one file.

    setpoint bench --task cifar10-mini --epochs 40 --methods setpoint,small-long --budgets 0.25 --seeds 0,1,2 --out RUNS
    setpoint bench --task resnet56 --epochs 12 --methods dense,setpoint,cubic --budgets 0.5,0.25 --out MORE
    python bench/benchmarks/passes.py RUNS MORE --out results/passes.json
    setpoint bench --task finetune --methods setpoint --budgets 0.5,0.25 --seeds 0,1,2,3,4 --out AGAIN
    python bench/benchmarks/passes.py AGAIN --out results/again.json

The first two are four times the passes of their task. The first is the image arm of the law: `small-long` is as small
from the start, and trains for the same FLOPs as the pruned model by the same recipe; `cifar10-mini-noisy` is the task
with a fifth of the training labels wrong. The second has `resnet20` beside it, at as many passes. The last has the
task's own passes: it is compared with the table of the task, whose runs an older version made. Rows that the file
holds stay.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from record import keep

from setpoint_bench.catalogue import task_named
from setpoint_bench.report.folder import read_lines
from setpoint_bench.results import FILE

KEPT = ("task", "method", "budget", "seed", "value", "split", "final_flops", "dense_flops", "train_flops", "steps")


def main() -> None:
    """Gather the rows of the folders, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="what `setpoint bench --out` wrote")
    parser.add_argument("--data", type=Path, default=None, help="folder that holds the data")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    known = args.out is not None and args.out.exists()
    rows = {run(row): row for row in (json.loads(args.out.read_text(encoding="utf-8"))["rows"] if known else ())}
    for folder in args.folders:
        for row in read_lines(folder / FILE, FILE, []):
            kept = {key: row[key] for key in KEPT}
            passes = round(row["task_steps"] / task_named(row["task"], data=args.data).steps, 2)
            found = {**kept, "passes": passes, "environment": row["environment"], "date": row["date"]}
            rows[run(found)] = found
    keep({"rows": list(rows.values())}, args.out, shown={"rows": len(rows)})


def run(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What no two runs have in common; a run that is made again takes the place of the earlier one."""
    return tuple(row[key] for key in ("task", "method", "budget", "seed", "passes", "split"))


if __name__ == "__main__":
    main()
