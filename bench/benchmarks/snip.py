"""What SNIP's mask keeps of the weights for queries, keys and values of the GPT, layer by layer, seed by seed.

python bench/benchmarks/snip.py --out results/snip.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from record import keep

from setpoint_bench.catalogue import task_named
from setpoint_bench.method import method_named
from setpoint_bench.task import Task
from setpoint_bench.training import Cell, begin

PARTS = ("queries", "keys", "values")


def kept(task: Task, budget: float, seed: int) -> dict[str, Any]:
    """Weights other than zero after the first step, of each part a number by layer; and how many a part has."""
    with TemporaryDirectory() as folder:
        run = begin(Cell(task, method_named("snip"), budget, seed), Path(folder), {})
        run.turn(1)
    weights = [weight for name, weight in run.model.named_parameters() if name.endswith("c_attn.weight")]
    thirds = [[int((part != 0).sum()) for part in weight.chunk(3)] for weight in weights]
    by_part = {part: list(numbers) for part, numbers in zip(PARTS, zip(*thirds, strict=True), strict=True)}
    return {"budget": budget, "seed": seed, "of": weights[0].numel() // 3, **by_part}


def main() -> None:
    """All seeds at both budgets, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    task = task_named("shakespeare-mini")
    rows = [kept(task, budget, seed) for budget in (0.5, 0.25) for seed in range(5)]
    keep({"task": task.name, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
