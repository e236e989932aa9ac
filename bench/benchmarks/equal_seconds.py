"""At equal milliseconds in ONNX Runtime: a budget of seconds, a budget of FLOPs, and even widths.

    python bench/benchmarks/equal_seconds.py --tasks banking77 clothing --seeds 0 1 2 3 4

`seconds` is trained to half of the dense seconds in ONNX Runtime. `flops` is a budget of FLOPs, and `even` one with the
same density in all layers and widths on multiples of 16; both begin with the cut, as is the default. Their share of the
FLOPs is the one whose file takes as long as that of `seconds` at the first seed, found by bisection on models that are
cut after the first batches. Everything else is the task's recipe. All files of a task are timed in turns at the end.
Trained models stay in a folder; those that are there are not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from int8 import quartiles
from record import held_in, write
from torch import nn

import setpoint
from setpoint.resources.serving import answering
from setpoint.runtimes import OnnxRuntime
from setpoint.runtimes.runtime import in_turns, ratios
from setpoint_bench.catalogue import task_named
from setpoint_bench.counter import step_flops
from setpoint_bench.environment import machine, package_version
from setpoint_bench.simple_task import SimpleTask, dense_widths

SHARE, PROBES = 0.5, 5
EVEN: dict[str, Any] = {
    "controller": setpoint.PricedController(setpoint.Schedule.at_once(), allocation="uniform"),
    "grid": 16,
}


def trained(task: SimpleTask, budget: setpoint.Budget, seed: int, *, whole: bool = True, **settings: Any) -> nn.Module:
    """The model after its run, or, unless `whole`, as the first cut leaves it."""
    torch.manual_seed(seed)
    model, batches = task.build(dense_widths(task)), task.batches(seed)
    optimizer = task.optimizer(model)
    schedule = task.schedule(optimizer)
    loop = setpoint.attach(model, optimizer, budget, example=task.example(), total_steps=task.steps, **settings)
    for step in range(1, task.steps + 1):
        loss = task.loss(model, *next(batches))
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if not whole and loop.widths != loop.dense_widths:
            loop.detach()
            return model
        if step % 50 == 0:
            print(f"step {step} of {task.steps}, loss {loss.item():.3f}", flush=True)
    print("budget met" if loop.finish().budget_met else "budget NOT met")
    return model


def share_of_flops(task: SimpleTask, goal: float, settings: dict[str, Any]) -> float:
    """The share of the FLOPs whose file takes the share `goal` of the dense seconds."""
    dense, low, high = task.build(dense_widths(task)), 0.1, 0.9
    for _ in range(PROBES):
        middle = (low + high) / 2
        cut = trained(task, setpoint.Budget.fraction(middle, of="flops"), 0, whole=False, **settings)
        found = statistics.median(seconds_of(task, [dense, cut])[1][1])
        print(f"{middle:.1%} of the FLOPs take {found:.1%} of the seconds", flush=True)
        low, high = (low, middle) if found > goal else (middle, high)
    return (low + high) / 2


def seconds_of(task: SimpleTask, models: list[nn.Module]) -> tuple[list[float], list[list[float]]]:
    """The median seconds of each model's file at batch 1, and its ratios to the first one's of the same turn."""
    one = (task.example()[0][:1],)
    read = in_turns([OnnxRuntime().load(answering(model), one) for model in models])
    return [statistics.median(seconds) for seconds in read], [ratios(seconds, read[0]) for seconds in read]


def measure(task: SimpleTask, seeds: list[int], folder: Path) -> dict[str, Any]:
    """Train what is not there, and a row for each model."""
    half = setpoint.Budget.fraction(SHARE, of="inference", runtime=OnnxRuntime(), example=(task.example()[0][:1],))
    runs: dict[str, tuple[setpoint.Budget, dict[str, Any]]] = {"seconds": (half, {})}
    shares, rows, models = dict[str, float](), [], [task.build(dense_widths(task))]
    dense = step_flops(models[0], task.example())
    for seed in seeds:
        for way in ("seconds", "flops", "even"):
            file = folder / f"{way}-{seed}.safetensors"
            if way not in runs:
                settings, held = EVEN if way == "even" else {}, held_in(folder / "shares.json")
                if way not in held:
                    first = setpoint.load(folder / "seconds-0.safetensors", into=task.build(dense_widths(task)))
                    held[way] = share_of_flops(
                        task, statistics.median(seconds_of(task, [models[0], first])[1][1]), settings
                    )
                    write(held, folder / "shares.json")
                shares[way] = held[way]
                runs[way] = setpoint.Budget.fraction(held[way], of="flops"), settings
            if not file.exists():
                print(f"{task.name}, {way}, seed {seed}", flush=True)
                setpoint.save(trained(task, runs[way][0], seed, **runs[way][1]), file)
            model = setpoint.load(file, into=task.build(dense_widths(task)))
            accuracy = task.evaluate(model, "test").accuracy
            rows.append({"way": way, "seed": seed, "accuracy": accuracy, "flops": step_flops(model, task.example())})
            models.append(model)
            print(f"{task.name}, {way}, seed {seed}: {accuracy:.2%}", flush=True)
    seconds, of_dense = seconds_of(task, models)
    for row, each, parts in zip(rows, seconds[1:], of_dense[1:], strict=True):
        row |= {"seconds": each, "of_dense_quartiles": quartiles(parts)}
    return {"steps": task.steps, "shares": shares, "dense_flops": dense, "dense_seconds": seconds[0], "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=("banking77", "clothing"))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--steps", type=int, help="of each training; by default the task's own")
    parser.add_argument("--models", type=Path, default=Path("runs/equal_seconds"), help="folder of trained models")
    parser.add_argument("--out", type=Path, default=Path("results/equal_seconds.json"))
    parser.add_argument("--data", type=Path, help="folder that holds the data")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.tasks:
        task = task_named(name, steps=arguments.steps, data=arguments.data)
        folder = arguments.models / f"{name}-{task.steps}"
        folder.mkdir(parents=True, exist_ok=True)
        found = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": {**machine(), "threads": 1, "onnxruntime": package_version("onnxruntime")},
            **measure(task, arguments.seeds, folder),
        }
        write({"tasks": {**held_in(arguments.out).get("tasks", {}), name: found}}, arguments.out)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
