"""What it costs that several ranks decide together: messages per decision, and the resize, as ranks are added.

    python bench/benchmarks/distributed.py --out results/distributed.json

Every rank is a process with one thread on this machine (gloo). Only rows with no more ranks than cores say anything
about time; the file notes both. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from costs import BUILDS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import setpoint
from setpoint.controller.schedule import Schedule
from setpoint.host.ddp import rewrap
from setpoint_bench.environment import machine

RESULTS = Path(__file__).resolve().parents[2] / "results"
STEPS, CUTS, PLAIN_STEPS, REPEATS = 24, 6, 8, 50


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call, begun by all ranks together."""
    dist.barrier()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def median(function: Callable[[], Any], repeats: int) -> float:
    """Of several calls, after one that warms up; the slowest rank counts."""
    seconds(function)
    slowest = torch.tensor(statistics.median(seconds(function) for _ in range(repeats)))
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def wrapped(name: str, wrapper: str) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """A model in its wrapper, with optimizer and example; sharded by its children, and children of lists."""
    torch.manual_seed(0)
    inner, optimizer, example = BUILDS[name]()
    if wrapper == "ddp":
        return DistributedDataParallel(inner), optimizer, example
    inner.to(memory_format=torch.contiguous_format)  # which FSDP insists on
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    lists = [child for child in inner.modules() if isinstance(child, (nn.ModuleList, nn.Sequential))]
    for part in [each for child in lists for each in child if any(True for _ in each.parameters())]:
        fully_shard(part, mesh=mesh)
    fully_shard(inner, mesh=mesh)
    return inner, type(optimizer)(inner.parameters(), lr=optimizer.defaults["lr"]), example


def measured(name: str, wrapper: str) -> dict[str, Any]:
    """All numbers of one model on the ranks of this group."""
    model, optimizer, example = wrapped(name, wrapper)
    controller = setpoint.PricedController(Schedule(0.4, 0.8, 0.9, num_cuts=CUTS))
    budget = setpoint.Budget.fraction(0.5, of="flops")
    loop = setpoint.attach(model, optimizer, budget, example=example, total_steps=STEPS, controller=controller)

    def step() -> None:
        output = model(*example)
        (output[0] if isinstance(output, tuple) else output).float().logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    step_s = statistics.median(seconds(step) for _ in range(PLAIN_STEPS))  # no decision falls into these
    assert not len(loop.ledger), "a decision fell into the timed steps"
    host, reading = loop.host, loop.reading()

    def agree() -> None:
        with host.together("a plan") as facts:
            facts["plan"] = 0

    shared_s = median(lambda: host.mean(lambda: reading, loop.losses, loop.step), REPEATS)
    agreed_s = median(agree, REPEATS)
    trained = [parameter for parameter in host.model.parameters() if parameter.requires_grad]
    rewrap_s = median(lambda: rewrap(model, trained), 10) if wrapper == "ddp" else 0.0
    units = torch.zeros(sum(group.num_units for group in loop.groups))
    sensed_s = median(lambda: host.ranks.total(units), REPEATS) if host.mesh is not None else 0.0
    while loop.step < STEPS:
        step()
    decisions, summary = len(loop.ledger), loop.finish()
    numbers = [getattr(reading, part) for part in ("saliency", "slope", "norm")]
    return {
        "step_seconds": step_s,
        "reading_numbers": sum(len(values) for part in numbers for values in part.values()),
        "reading_seconds": shared_s,
        "plan_seconds": agreed_s,
        "decision_in_steps": (shared_s + agreed_s) / step_s,
        "sensing_seconds": sensed_s,
        "rewrap_seconds": rewrap_s,
        "resizes": summary.resizes,
        "resize_seconds": summary.resizing_seconds / max(1, summary.resizes),
        "resize_in_steps": summary.resizing_seconds / max(1, summary.resizes) / step_s,
        "decisions": decisions,
    }


def on_rank(rank: int, count: int, names: list[str], folder: str) -> None:
    """Measure on one rank; the first writes what was found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{count}", rank=rank, world_size=count)
    found = {f"{name}, {wrapper}": measured(name, wrapper) for wrapper in ("ddp", "fsdp") for name in names}
    if rank == 0:
        Path(folder, f"{count}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "distributed.json")
    parser.add_argument("--models", default="cnn,gpt", help="with commas")
    parser.add_argument("--ranks", default="1,2,4", help="with commas")
    args = parser.parse_args()
    names, rows = args.models.split(","), {}
    with tempfile.TemporaryDirectory() as folder:
        for count in map(int, args.ranks.split(",")):
            multiprocessing.spawn(on_rank, (count, names, folder), nprocs=count)
            rows[count] = json.loads(Path(folder, f"{count}.json").read_text(encoding="utf-8"))
            print(count, json.dumps(rows[count]))
    answer = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {**machine(), "threads": 1, "cores": os.cpu_count(), "backend": "gloo"},
        "steps": STEPS,
        "ranks": rows,
    }
    args.out.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
