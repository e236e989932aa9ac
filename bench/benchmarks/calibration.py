"""Whether saliency tells the truth: predicted loss increases beside measured ones, unit by unit and for a 10 % cut.

    python bench/benchmarks/calibration.py --out results/calibration.json

A task that is measured alone (`--task`) takes its place in the file among the others.

A CNN (`cifar10-mini`) and a GPT (`shakespeare-mini`) are trained to 40 % of a run. There the weights stay as they
are; units are left out one by one (their outgoing weights zeroed) and the training loss is measured over the same
batches, with batch norm in training mode and in float32. Beside it stand the sensor's predictions from

* "running": the training steps before, as a loop reads them (a window of 50 steps), and "latest" (of 10);
* "still": the gradients of the very batches that the losses are measured on, with the weights at rest;
* "elsewhere": the same of as many other batches, which tells how much of it was particular to those;

each with the curvature alone and with the slope, and with B = the examples of a batch, or B = its targets (a text has
many in one example). Of each group at most `--units` are left out, drawn at random; ranks are over those. Then all
units are dropped that a controller drops for 10 % of the FLOPs, and the loss's real increase is set against the sum of
their saliencies, and against the same quadratic along the gate that all of them share, in which units interact: with
R the sum of their gate gradients in a batch at rest, `-mean(R) + (B var(R) + mean(R)^2) / 2`.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from scipy.stats import spearmanr
from torch import Tensor, nn

import setpoint
from setpoint.controller.plan import Observation
from setpoint.cost.flops import flops_cost
from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import trace
from setpoint.sensor.reading import Reading
from setpoint_bench.catalogue import task_named
from setpoint_bench.environment import environment
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.task import dense_widths

POINT = 0.4
CUT = 0.9
STEPS = {"cifar10-mini": 1500, "shakespeare-mini": 2000}
Batches = Sequence[tuple[Tensor, Tensor]]
Units = Mapping[str, np.ndarray]


@contextmanager
def without(
    model: nn.Module, groups: Sequence[Group], units: Mapping[str, Int[np.ndarray, " _units"]]
) -> Iterator[None]:
    """The model with these units' outgoing weights at zero; after it they are back, to the bit."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    before: dict[int, tuple[nn.Parameter, Tensor]] = {}
    with torch.no_grad():
        for group in groups:
            gone = np.asarray(units.get(group.name, ()), dtype=np.int64)
            for part in group.slices if len(gone) else ():
                if part.role != "consume" or part.tensor not in tensors:
                    continue
                assert part.dim is not None, "units lie along a dim"
                weight = tensors[part.tensor]
                before.setdefault(id(weight), (weight, weight.detach().clone()))
                entries = torch.from_numpy(np.flatnonzero(np.isin(part.index, gone)))
                weight.index_fill_(part.dim, entries.to(weight.device), 0.0)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in before.values():
                weight.copy_(value)


def train(task: SimpleTask, model: nn.Module, seed: int, watch: Callable[[], None]) -> None:
    """Train to the point; `watch` is called before each optimizer step."""
    optimizer = task.optimizer(model)
    schedule = task.schedule(optimizer)
    for inputs, targets in islice(task.batches(seed), round(POINT * task.steps)):
        torch.autograd.backward(task.loss(model, inputs, targets))
        watch()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def mean_loss(task: SimpleTask, model: nn.Module, batches: Batches) -> float:
    """Mean training loss over the batches, each normalised by its own statistics."""
    return float(np.mean([float(task.loss(model, inputs, targets)) for inputs, targets in batches]))


def still_state(task: SimpleTask, model: nn.Module, groups: tuple[Group, ...], batches: Batches) -> Any:
    """Sensor state after all batches with the weights at rest, every batch counting alike."""
    sensor = setpoint.TaylorSensor(1, window=10**9)
    state = sensor.init(groups, model)
    for inputs, targets in batches:
        model.zero_grad()
        torch.autograd.backward(task.loss(model, inputs, targets))
        state = sensor.update(state, groups, model)
    model.zero_grad()
    return state


def gate_gradients(task: SimpleTask, model: nn.Module, groups: tuple[Group, ...], batches: Batches) -> list[Units]:
    """Gate gradients r of all units in each batch, with the weights at rest."""
    sensor = setpoint.TaylorSensor(1)
    start, found = sensor.init(groups, model), []
    for inputs, targets in batches:
        model.zero_grad()
        torch.autograd.backward(task.loss(model, inputs, targets))
        found.append(sensor.read(sensor.update(start, groups, model), groups, 0).slope)
    model.zero_grad()
    return found


def together(gradients: Sequence[Units], gone: Units, num_samples: int) -> dict[str, float]:
    """What the gate that these units share predicts for all of them at once, from the weights at rest."""
    sums = [sum(float(slope[name][units].sum()) for name, units in gone.items()) for slope in gradients]
    mean, variance = float(np.mean(sums)), float(np.var(sums, ddof=1))
    curvature = (num_samples * variance + mean**2) / 2
    return {"shared_gate_curvature": curvature, "shared_gate": curvature - mean}


def correlation(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Spearman's rank correlation; a prediction that is the same for all units ranks nothing: 0."""
    return 0.0 if np.ptp(predicted) == 0 else float(spearmanr(predicted, measured).statistic)


def ranks(predicted: Units, measured: Units, chosen: Units) -> dict[str, Any]:
    """Rank correlations within each group and over all units that were left out."""
    pairs = {name: (predicted[name][units], measured[name]) for name, units in chosen.items()}
    within = {name: correlation(*pair) for name, pair in pairs.items() if len(pair[0]) > 2}
    whole = correlation(*(np.concatenate([pair[place] for pair in pairs.values()]) for place in (0, 1)))
    total = [sum(float(pair[place].sum()) for pair in pairs.values()) for place in (0, 1)]
    return {
        "spearman_within": within,
        "spearman_within_mean": float(np.mean(list(within.values()))),
        "spearman_within_least": min(within.values()),
        "spearman_whole": whole,
        "sum_predicted_over_measured": total[0] / total[1],
    }


def ten_percent(
    task: SimpleTask,
    model: nn.Module,
    groups: tuple[Group, ...],
    reading: Reading,
    batches: Batches,
    base: float,
    gradients: Sequence[Units],
) -> dict[str, float]:
    """Predicted and real increase of the loss for the units that a controller drops for a tenth of the FLOPs.

    Args:
        task: in float32.
        model: the model.
        groups: its groups.
        reading: what the controller decides on.
        batches: what the loss is measured on.
        base: mean loss over them, with all units.
        gradients: gate gradients in each batch.
    """
    found = trace(model, task.example())
    cost, widths = flops_cost(found), widths_of(found.groups)
    dense = cost.total(widths)
    seen = Observation(1, 1, widths, widths, reading, {"flops": dense}, {"flops": CUT * dense}, {"flops": dense})
    controller = setpoint.PricedController()
    plan = controller.decide(controller.init(groups), seen, cost, groups)[1]
    gone = {name: np.flatnonzero(~keep) for name, keep in plan.keep.items()}
    with without(model, groups, gone):
        real = mean_loss(task, model, batches) - base
    predicted = sum(float(reading.saliency[name][units].sum()) for name, units in gone.items())
    dropped = sum(map(len, gone.values()))
    told = {"units": dropped, "predicted": predicted, "real": real, "predicted_over_real": predicted / real}
    return told | together(gradients, gone, reading.num_samples)


def calibrate(name: str, seed: int, num_samples: int, most: int) -> dict[str, Any]:
    """Everything about one task."""
    torch.manual_seed(seed)
    task = task_named(name, steps=STEPS[name])
    assert isinstance(task, SimpleTask)
    model = task.build(dense_widths(task))
    groups = tuple(group for group in setpoint.find_groups(model, task.example()) if group.lossless)
    watchers = {"running": setpoint.TaylorSensor(1), "latest": setpoint.TaylorSensor(1, window=10)}
    states = {name: watcher.init(groups, model) for name, watcher in watchers.items()}

    def watch() -> None:
        for each, watcher in watchers.items():
            states[each] = watcher.update(states[each], groups, model)

    train(task, model, seed, watch)
    num_batches = -(-num_samples // task.recipe.batch)
    exact = replace(task, recipe=replace(task.recipe, mixed=False))
    model = copy.deepcopy(model)
    batches = list(islice(exact.batches(seed + 1), num_batches))
    rng = np.random.default_rng(seed)
    chosen = {g.name: np.sort(rng.permutation(g.num_units)[:most]) for g in groups}
    base = mean_loss(exact, model, batches)
    measured: dict[str, np.ndarray] = {}
    for group in groups:
        losses = []
        for unit in chosen[group.name]:
            with without(model, groups, {group.name: np.array([unit])}):
                losses.append(mean_loss(exact, model, batches) - base)
        measured[group.name] = np.array(losses)
        print(f"{name}: {group.name} done", flush=True)
    inputs, targets = batches[0]
    result: dict[str, Any] = {
        "steps": round(POINT * task.steps),
        "total_steps": task.steps,
        "loss": base,
        "samples": num_batches * len(inputs),
        "targets": num_batches * targets.numel(),
        "left_out": sum(map(len, chosen.values())),
        "raised_the_loss": sum(int((values > 0).sum()) for values in measured.values()),
        "variants": {},
    }
    states["still"] = still_state(exact, model, groups, batches)
    states["elsewhere"] = still_state(exact, model, groups, list(islice(exact.batches(seed + 2), num_batches)))
    gradients = gate_gradients(exact, model, groups, batches)
    samples = {"examples": len(inputs), **({"targets": targets.numel()} if targets.numel() > len(inputs) else {})}
    for source, seen in states.items():
        for of, count in samples.items():
            for slope in (False, True):
                sensor = setpoint.TaylorSensor(count, first_order=slope)
                reading = sensor.read(seen, groups, result["steps"])
                variant = f"{source}, B = {of}{', with slope' if slope else ''}"
                result["variants"][variant] = {
                    **ranks(reading.saliency, measured, chosen),
                    "ten_percent": ten_percent(exact, model, groups, reading, batches, base, gradients),
                }
    return result


def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/calibration.json"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=2048, help="examples that losses are measured on")
    parser.add_argument("--units", type=int, default=24, help="units left out of each group, at most")
    parser.add_argument("--task", choices=sorted(STEPS), action="append", help="only this task")
    arguments = parser.parse_args()
    tasks = {}
    for name in arguments.task or sorted(STEPS):
        start = time.perf_counter()
        found = calibrate(name, arguments.seed, arguments.samples, arguments.units)
        tasks[name] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": arguments.seed,
            "environment": environment(task_named(name)),
            "seconds": time.perf_counter() - start,
            **found,
        }
    before = json.loads(arguments.out.read_text(encoding="utf-8"))["tasks"] if arguments.out.exists() else {}
    result = {"tasks": {**before, **tasks}}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, found in tasks.items():
        for variant, numbers in found["variants"].items():
            within, least = numbers["spearman_within_mean"], numbers["spearman_within_least"]
            cut = numbers["ten_percent"]
            shares = [cut[key] / cut["real"] for key in ("predicted", "shared_gate", "shared_gate_curvature")]
            print(
                f"{name}, {variant}: within {within:.2f} (least {least:.2f}), whole {numbers['spearman_whole']:.2f}; "
                f"10 % cut raises the loss by {cut['real']:.4f}, predicted / real {shares[0]:.2f}, by the shared gate "
                f"{shares[1]:.2f}, by its curvature {shares[2]:.2f}"
            )
    print(json.dumps({"out": str(arguments.out), "seconds": {name: found["seconds"] for name, found in tasks.items()}}))


if __name__ == "__main__":
    main()
