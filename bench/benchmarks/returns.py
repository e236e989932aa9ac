"""Whether the loss jumps when units come back: at once and eased in, on batches that stay the same.

    python bench/benchmarks/returns.py --task cifar10-mini --data DIR --out results/returns.json

A dense model trains for a fifth of its run; the least salient quarter of each group's units goes and the model trains
on for another tenth. Then all of them come back, with what rested: once at once, and once with outgoing weights that
rise from zero over eight steps while training goes on. Losses are means over eight batches of training data, after
each of the eight steps. Beside them stands what eight steps do to the loss where nothing comes back.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import keep_rows
from torch import Tensor, nn

import setpoint
from setpoint.regrowth.easing import Easing
from setpoint.regrowth.regrow import regrow
from setpoint.regrowth.reserve import Reserve
from setpoint_bench.catalogue import task_named
from setpoint_bench.task import Task, dense_widths

SHARE, NUM_BATCHES, EASE_STEPS = 0.25, 8, 8
Batches = Iterator[tuple[Tensor, Tensor]]


@torch.no_grad()
def loss_on(task: Task, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Mean training loss; running statistics are put back."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    value = float(torch.stack([task.loss(model, *batch) for batch in batches]).mean())
    for buffer, before in buffers:
        buffer.copy_(before)
    return value


def step(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
    """One step of training."""
    torch.autograd.backward(task.loss(model, *next(batches)))
    optimizer.step()
    optimizer.zero_grad()


def measured(task: Task, seed: int) -> dict[str, Any]:
    """The losses of one seed."""
    torch.manual_seed(seed)
    model, batches = task.build(dense_widths(task)), task.batches(seed)
    optimizer, sensor = task.optimizer(model), setpoint.TaylorSensor(task.recipe.batch)  # type: ignore[attr-defined]
    schedule = task.schedule(optimizer)
    groups = tuple(group for group in setpoint.find_groups(model, task.example()) if group.lossless)
    state = sensor.init(groups, model)
    for _ in range(task.steps // 5):
        torch.autograd.backward(task.loss(model, *next(batches)))
        state = sensor.update(state, groups, model)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    saliency = sensor.read(state, groups, task.steps // 5).saliency
    places, goes = {}, {}
    for group in groups:
        size = min(group.multiple_of, group.num_units)
        count = min(round(SHARE * group.num_units) // size * size, group.num_units - max(1, group.min_units))
        goes[group.name] = np.sort(np.argsort(saliency[group.name])[:count])
        places[group.name] = ~np.isin(np.arange(group.num_units), goes[group.name])
    reserve = Reserve.of(model, groups).rest(model, optimizer, places)
    groups = setpoint.shrink(model, optimizer, groups, places)
    for _ in range(task.steps // 10):
        step(task, model, optimizer, batches)
        schedule.step()
    fixed = list(islice(task.batches(seed + 100), NUM_BATCHES))
    found = {"seed": seed, "units": sum(map(len, goes.values())), "before": loss_on(task, model, fixed)}
    coming = list(islice(batches, EASE_STEPS))

    def run(*, back: bool, eased: bool) -> list[float]:
        """Losses after the return and after each of the eight steps, of a copy."""
        alike, optimizers = copy.deepcopy((model, optimizer))
        wide, easing = groups, None
        if back:
            origins = {name: units.tolist() for name, units in goes.items() if len(units)}
            wide, _ = regrow(alike, optimizers, groups, reserve, origins)
        if eased:
            came = {group.name: ~places[group.name] for group in wide}
            easing = Easing(alike, wide, came, num_steps=EASE_STEPS)
        losses, batch = [loss_on(task, alike, fixed)], iter(coming)
        for _ in range(EASE_STEPS):
            step(task, alike, optimizers, batch)
            if easing is not None:
                easing.step()
            losses.append(loss_on(task, alike, fixed))
        return losses

    found["none"] = run(back=False, eased=False)
    found["at_once"] = run(back=True, eased=False)
    found["eased"] = run(back=True, eased=True)
    return found


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="cifar10-mini")
    parser.add_argument("--seeds", default="0,1,2", help="with commas")
    parser.add_argument("--data", type=Path, default=None, help="folder that holds the data")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    task = task_named(args.task, data=args.data)
    rows = []
    for seed in map(int, args.seeds.split(",")):
        rows.append({"task": task.name, **measured(task, seed)})
        told = {key: f"{max(rows[-1][key][1:]) - rows[-1]['before']:+.4f}" for key in ("none", "at_once", "eased")}
        print(f"seed {seed}: {rows[-1]['before']:.4f}, highest in eight steps: {told}", flush=True)
    keep_rows(rows, args.out)


if __name__ == "__main__":
    main()
