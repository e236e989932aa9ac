"""What Setpoint itself costs: in whole runs, and sensing, resizing, discovery and import beside what each is part of.

    python bench/benchmarks/overhead.py --base ../base --data DIR --out results/overhead.json

Steps with and without Setpoint take turns, so that a machine whose speed drifts favours neither; ratios are
of medians, with the middle half of the paired ratios as their spread. Whole runs of this tree and of the tree in
`--base` take turns, too, each on one thread and with an empty cache. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torchvision
from record import commit_of, write

import setpoint
from setpoint.groups.group import random_keep
from setpoint.sensor.reading import sensed_every
from setpoint_bench.catalogue import task_named
from setpoint_bench.environment import environment, machine
from setpoint_bench.results import load_results
from setpoint_bench.simple_task import SimpleTask

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
RUNS = {"finetune": 300, "banking77": 300, "cifar10-mini": 2000, "shakespeare-mini": 2000}
"""Tasks and steps of the whole runs."""


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def spread(values: list[float]) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4)
    return [low, high]


def sensor_seconds(
    task: SimpleTask, model: torch.nn.Module, backward: Callable[[], None], updates: int = 72
) -> list[float]:
    """Seconds of single sensings, each right after a backward pass, without the first ones, which fill caches."""
    groups = tuple(group for group in setpoint.find_groups(model, task.example()) if group.lossless)
    sensor = setpoint.TaylorSensor(num_samples=1)
    state = sensor.init(groups, model)
    durations = []
    for _ in range(updates):
        backward()
        start = time.perf_counter()
        state = sensor.update(state, groups, model)
        durations.append(time.perf_counter() - start)
    return durations[8:]


def sensing(name: str, rounds: int) -> dict[str, Any]:
    """Share of the steps that sensing takes, on the dense model of a task in a run as long as the committed one."""
    task = task_named(name)
    steps = max(result.steps for result in load_results(RESULTS / name))
    every = sensed_every(steps)
    torch.manual_seed(0)
    plain = task.build({key: dimension.dense for key, dimension in task.dimensions.items()})
    watched = copy.deepcopy(plain)
    optimizers = {id(model): task.optimizer(model) for model in (plain, watched)}
    batches = task.batches(seed=0)
    loop = setpoint.attach(
        watched,
        optimizers[id(watched)],
        setpoint.Budget.fraction(0.5, of="flops"),
        example=task.example(),
        total_steps=steps,  # no decision falls into the first steps, which are timed
    )

    def step_gradients(model: torch.nn.Module) -> None:
        inputs, targets = next(batches)
        torch.autograd.backward(task.loss(model, inputs, targets))

    def step(model: torch.nn.Module) -> None:
        step_gradients(model)
        optimizers[id(model)].step()
        optimizers[id(model)].zero_grad()

    for model in (plain, watched, plain, watched):
        step(model)
    without, with_it = [], []
    for turn in range(rounds):
        for model in (plain, watched) if turn % 2 else (watched, plain):
            (without if model is plain else with_it).append(seconds(lambda model=model: step(model)))
    attach_seconds = loop.finish().overhead["attach"]
    sensed = sensor_seconds(task, watched, lambda: step_gradients(watched))
    ratios = [b / a - 1 for a, b in zip(without, with_it, strict=True)]
    return {
        "step_seconds": statistics.median(without),
        "sensed_every": every,
        "sensing_share_of_a_sensed_step": statistics.median(sensed) / statistics.median(without),
        "sensing_share_median": statistics.median(sensed) / statistics.median(without) / every,
        "sensing_share_mean": statistics.mean(sensed) / statistics.median(without) / every,
        "slowdown_median": statistics.median(ratios),
        "slowdown_quartiles": spread(ratios),
        "attach_seconds": attach_seconds,
        "rounds": rounds,
    }


def resizing() -> dict[str, Any]:
    """A resize of ResNet-50 with AdamW state to random widths, against one training step of it."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    optimizer = torch.optim.AdamW(model.parameters())
    inputs = torch.randn(16, 3, 224, 224)
    discovery = [seconds(lambda: setpoint.find_groups(model, (inputs[:1],))) for _ in range(3)]
    groups = setpoint.find_groups(model, (inputs[:1],))

    def step() -> None:
        model(inputs).logsumexp(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    steps = [seconds(step) for _ in range(3)]
    resize = seconds(lambda: setpoint.shrink(model, optimizer, groups, random_keep(groups)))
    step()
    return {
        "find_groups_seconds": discovery,
        "training_step_seconds": steps,
        "batch": len(inputs),
        "resize_seconds": resize,
        "resize_in_steps": resize / statistics.median(steps),
    }


def importing(rounds: int = 7) -> dict[str, Any]:
    """Seconds that `import setpoint` adds to `import torch`, in fresh processes that take turns."""

    def run(code: str) -> float:
        timed = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
        return float(subprocess.run([sys.executable, "-c", timed], check=True, capture_output=True, text=True).stdout)

    run("import torch, setpoint")
    added = [run("import torch, setpoint") - run("import torch") for _ in range(rounds)]
    return {"added_seconds_median": statistics.median(added), "added_seconds_quartiles": spread(added)}


def run_of(tree: Path, name: str, steps: int, data: Path | None, cache: Path) -> dict[str, float]:
    """Seconds of a run to half of the FLOPs with the code of a tree, and those of Setpoint's own work in it."""
    settings = {
        "PYTHONPATH": os.pathsep.join((str(tree / "src"), str(tree / "bench" / "src"))),
        "XDG_CACHE_HOME": str(cache),
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "setpoint", "bench", "--task", name, "--methods", "setpoint"]
        command += ["--budgets", "0.5", "--steps", str(steps), "--out", out, *(["--data", str(data)] if data else [])]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, **settings})
        (result,) = load_results(Path(out))
    return {"seconds": result.seconds, "own_seconds": result.overhead_seconds}


def whole_run(name: str, base: Path | None, data: Path | None, pairs: int) -> dict[str, Any]:
    """For each tree what runs of a task took."""
    trees = {"now": ROOT, **({"before": base.resolve()} if base else {})}
    steps = RUNS[name]
    runs: dict[str, list[dict[str, Any]]] = {tree: [] for tree in trees}
    for pair in range(pairs):
        for tree in list(trees)[:: -1 if pair % 2 else 1]:
            with tempfile.TemporaryDirectory() as folder:
                run = run_of(trees[tree], name, steps, data, Path(folder))
            runs[tree].append(run)
            print(f"{name}, {steps} steps, {tree}: own work {run['own_seconds'] / run['seconds']:.2%}", flush=True)
    made = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": {**machine(), "threads": 1}}
    return {**made, "steps": steps, **({"base": commit_of(base)} if base else {}), "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/overhead.json"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--base", type=Path, help="a checkout of the version to compare whole runs with")
    parser.add_argument("--data", type=Path, help="folder that holds the data")
    parser.add_argument("--pairs", type=int, default=2, choices=range(1, 100), metavar="N", help="of whole runs")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), help="whole runs of these tasks alone; the rest stays")
    arguments = parser.parse_args()
    if arguments.runs:
        kept = json.loads(arguments.out.read_text(encoding="utf-8"))
        for name in arguments.runs:
            kept["whole_runs"][name] = whole_run(name, arguments.base, arguments.data, arguments.pairs)
            write(kept, arguments.out)
        return
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": 0,
        "whole_runs": {name: whole_run(name, arguments.base, arguments.data, arguments.pairs) for name in RUNS},
        "environment": environment(task_named("digits")),
        "sensing": {name: sensing(name, arguments.rounds) for name in ("cifar10-mini", "shakespeare-mini")},
        "resnet50": resizing(),
        "import": importing(),
    }
    write(result, arguments.out)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
