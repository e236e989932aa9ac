"""Whole runs with and without `torch.compile`, dense and pruned: does pruning still pay, and what do recompiles cost?

    python bench/benchmarks/compiled.py --data DIR --out results/compiled.json

Each run has a process of its own, its compiled code is not kept from one to the next, and rounds of all four runs take
turns. Compilation, recompilation and all of Setpoint's own work count. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from record import keep

import setpoint
from setpoint_bench.catalogue import task_named
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.task import dense_widths

RUNS = {
    "eager, dense": ("", False),
    "eager, pruned": ("", True),
    "compiled, dense": ("model", False),
    "compiled, pruned": ("model", True),
    "compiled by block, dense": ("blocks", False),
    "compiled by block, pruned": ("blocks", True),
}
"""What is compiled, and whether the model is pruned. Only a model with `layers` has equal blocks."""
TASKS = {"cifar10-mini": 1200, "shakespeare-mini": 600, "shakespeare-mini, batch 2": 6000}
BUDGET = 0.25


def trained(name: str, compiled: str, pruned: bool, steps: int, seed: int, data: Path | None) -> dict[str, Any]:
    """One run: its seconds in all, of its first step and of a step at its end, and what was compiled again."""
    name, _, batch = name.partition(", batch ")
    task = task_named(name, data=data).with_steps(steps)
    if batch:
        assert isinstance(task, SimpleTask)
        task = replace(task, recipe=replace(task.recipe, batch=int(batch)))
    torch.manual_seed(seed)
    model = task.build(dense_widths(task))
    batches = task.batches(seed=seed)
    next(batches)  # data are read and decoded before the clock starts
    start = time.perf_counter()
    optimizer = task.optimizer(model)
    schedule = task.schedule(optimizer)
    loop = None
    if pruned:
        budget = setpoint.Budget.fraction(BUDGET, of="flops")
        loop = setpoint.attach(model, optimizer, budget, example=task.example(), total_steps=steps)
    called = torch.compile(model) if compiled == "model" else model
    if compiled == "blocks":
        for block in model.layers:
            block.compile()
    durations = []
    for _ in range(steps):
        begun = time.perf_counter()
        inputs, targets = next(batches)
        loss = task.loss(called, inputs, targets)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        durations.append(time.perf_counter() - begun)
    summary = None if loop is None else loop.finish()
    return {
        "seconds": time.perf_counter() - start,
        "loss": float(loss.detach()),
        "first_step_seconds": durations[0],
        "dense_step_seconds": statistics.median(durations[1 : max(2, steps // 25)]),
        "last_step_seconds": statistics.median(durations[-max(1, steps // 5) :]),
        "resizes": 0 if summary is None else summary.resizes,
        "recompiles": 0 if summary is None else summary.recompiles,
        "recompile_seconds": 0.0 if summary is None else summary.recompiling_seconds,
        "overhead_seconds": 0.0 if summary is None else summary.overhead_seconds,
        "budget_met": None if summary is None else summary.budget_met,
    }


def _in_process(pipe: Any, threads: int, *arguments: Any) -> None:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        pipe.send(trained(*arguments))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--data", type=Path, default=None, help="folder that holds the data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps, for a quick look")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    lengths = {name: max(20, round(args.share * steps)) for name, steps in TASKS.items()}
    for name, length in lengths.items():
        runs = {run: how for run, how in RUNS.items() if how[0] != "blocks" or name.startswith("shakespeare")}
        found[name] = {run: [] for run in runs}
        for seed in range(args.rounds):
            for run, (compiled, pruned) in runs.items():
                ours, theirs = context.Pipe(duplex=False)
                order = (theirs, torch.get_num_threads(), name, compiled, pruned, length, seed, args.data)
                process = context.Process(target=_in_process, args=order)
                process.start()
                theirs.close()
                found[name][run].append(ours.recv())
                process.join()
                print(name, run, seed, found[name][run][-1], flush=True)
    keep({"budget": BUDGET, "steps": lengths, "runs": found}, args.out, shown={"tasks": list(found)})


if __name__ == "__main__":
    main()
