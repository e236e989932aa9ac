"""What descends from a trained parent: a family of sizes, and what the parent is worth in steps.

    python bench/benchmarks/descent.py family --task banking77 --seeds 0,1,2
    python bench/benchmarks/descent.py parent --task shakespeare-mini --seeds 0

`family` derives models of 75, 50, 35 and 25 % of the FLOPs, each from the one above it, with the first parent
teaching, and each alone from the parent, for the same steps. `parent` derives models of half and a quarter with the
parent as teacher, in parts of the parent's steps. It trains a small net of even widths from scratch, in parts and
multiples of them. Each is trained at several learning rates. Rows that the file holds are not run again.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from record import held_in, write
from torch import nn

import setpoint
from setpoint.distillation import Teacher
from setpoint_bench.catalogue import task_named
from setpoint_bench.counter import step_flops
from setpoint_bench.environment import machine
from setpoint_bench.simple_task import SimpleTask, dense_widths
from setpoint_bench.sizing import small_widths

RESULTS = Path(__file__).resolve().parents[2] / "results"
SIZES = (0.75, 0.5, 0.35, 0.25)
SHARE = 0.4
"""Steps of each size of a family, as a share of the parent's."""
CHILDREN, SCRATCH = (1 / 64, 1 / 16, 1 / 4), (1 / 16, 1 / 4, 1.0, 4.0)
"""Steps of derived models and of those from scratch, as shares of the parent's."""
RATES = (0.5, 1.0, 2.0)

Row = dict[str, Any]


def trained(
    task: SimpleTask, model: nn.Module, seed: int, budget: float | None = None, teacher: nn.Module | None = None
) -> Row:
    """Train a model in place; what it came to on the test data, and the FLOPs of the run."""
    torch.manual_seed(seed)
    optimizer, batches, loop = task.optimizer(model), task.batches(seed), None
    if budget is not None:
        taught_by = None if teacher is None else Teacher(copy.deepcopy(teacher))
        fraction = setpoint.Budget.fraction(budget, of="flops")
        loop = setpoint.attach(
            model, optimizer, fraction, example=task.example(), total_steps=task.steps, teacher=taught_by
        )
    schedule = task.schedule(optimizer)
    for _ in range(task.steps):
        torch.autograd.backward(task.loss(model.train(), *next(batches)))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    flops = step_flops(model, task.example())
    spent = flops * task.steps if loop is None else loop.finish().train_flops
    score = task.evaluate(model, "test")
    return {"steps": task.steps, "flops": flops, "train_flops": spent, "loss": score.loss, "accuracy": score.accuracy}


def parent_of(task: SimpleTask, seed: int, folder: Path) -> tuple[nn.Module, Row]:
    """The dense model of a seed, trained here or before."""
    torch.manual_seed(seed)
    model, file = task.build(dense_widths(task)), folder / f"{task.name}-{task.steps}-{seed}.pt"
    if not file.exists():
        row = trained(task, model, seed)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"row": row, "model": model.state_dict()}, file)
    held = torch.load(file, weights_only=True)
    model.load_state_dict(held["model"])
    return model, held["row"]


def family(task: SimpleTask, seed: int, folder: Path) -> Iterator[Row]:
    """Sizes from one parent, each from the one above it, and each alone."""
    parent, row = parent_of(task, seed, folder)
    yield {"what": "parent", "size": 1.0, **row}
    short = task.with_steps(max(1, round(SHARE * task.steps)))
    last = parent
    for size in SIZES:
        last = copy.deepcopy(last)
        yield {"what": "descended", "size": size, **trained(short, last, seed, size, parent)}
        yield {"what": "alone", "size": size, **trained(short, copy.deepcopy(parent), seed, size, parent)}


def worth(task: SimpleTask, seed: int, folder: Path) -> Iterator[Row]:
    """Derived models and models from scratch of the same FLOPs, at several lengths and rates."""
    parent, row = parent_of(task, seed, folder)
    yield {"what": "parent", "size": 1.0, **row}
    for size in (0.5, 0.25):
        for what, shares in (("derived", CHILDREN), ("from scratch", SCRATCH)):
            for share in shares:
                for rate in RATES:
                    run = task.with_steps(max(2, round(share * task.steps))).with_learning_rate_factor(rate)
                    about = {"what": what, "size": size, "share": share, "rate": rate}
                    if what == "derived":
                        yield {**about, **trained(run, copy.deepcopy(parent), seed, size, parent)}
                    else:
                        torch.manual_seed(seed)
                        yield {**about, **trained(run, task.build(small_widths(task, size)), seed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("family", "parent"))
    parser.add_argument("--task", required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, help="of the parent; by default the task's own")
    parser.add_argument("--models", type=Path, default=Path("runs/descent"), help="folder of trained parents")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--data", type=Path, help="folder that holds the data")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = args.out or RESULTS / f"{args.kind}.json"
    for seed in map(int, args.seeds.split(",")):
        task = task_named(args.task, steps=args.steps, data=args.data)
        made = (family if args.kind == "family" else worth)(task, seed, args.models)
        key = f"{task.name}, {task.steps} steps, seed {seed}"
        rows: list[Row] = []
        if key in held_in(out).get("runs", {}):
            continue
        for row in made:
            rows.append(row)
            print(key, row, flush=True)
        about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": {**machine(), "threads": 1}}
        held = held_in(out)
        write({**held, "runs": {**held.get("runs", {}), key: {**about, "rows": rows}}}, out)


if __name__ == "__main__":
    main()
