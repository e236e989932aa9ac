"""Half of the FLOPs may take longer than all: MobileNetV2 cut by Torch-Pruning and by Setpoint, in one ONNX Runtime.

    python bench/benchmarks/rounding.py --out results/rounding.json

Torch-Pruning cuts by norms to half of the FLOPs, all layers by one ratio that bisection finds, as its widths come
and with `round_to=16`. Setpoint is given half of the FLOPs, and half of the seconds in ONNX Runtime. Weights are
random, images of 128 pixels. All files are timed in turns at batch 1 on one thread, each loaded several times.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from int8 import quartiles
from record import keep
from torch import nn

import setpoint
from runtimes import BATCH, LOADS, mobilenetv2, varied
from setpoint.resources.serving import answering
from setpoint.runtimes import OnnxRuntime
from setpoint.runtimes.runtime import in_turns, ratios
from setpoint_bench.counter import step_flops
from setpoint_bench.environment import package_version

HALF, PROBES = 0.5, 12


def torch_pruned(round_to: int | None) -> nn.Module:
    """The largest MobileNetV2 of at most half of the FLOPs, cut at one ratio."""
    import torch_pruning

    def cut(ratio: float) -> nn.Module:
        torch.manual_seed(0)
        model, example = mobilenetv2()
        pruner = torch_pruning.pruner.BasePruner(
            model,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=[model.classifier[1]],
            round_to=round_to,
        )
        pruner.step()
        return model

    example = mobilenetv2()[1]
    low, high, limit = 0.0, 0.9, HALF * step_flops(cut(0.0), example)
    for _ in range(PROBES):
        middle = (low + high) / 2
        low, high = (low, middle) if step_flops(cut(middle), example) <= limit else (middle, high)
    return cut(high)


def by_setpoint(budget: setpoint.Budget, steps: int = 60) -> nn.Module:
    """What a short run on random images leaves."""
    torch.manual_seed(0)
    model, (image,) = mobilenetv2()
    batch = torch.cat([varied(image) for _ in range(BATCH)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loop = setpoint.attach(model, optimizer, budget, example=(batch,), total_steps=steps)
    for _ in range(steps):
        model(varied(batch)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    loop.finish()
    return model


WAYS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: mobilenetv2()[0],
    "Torch-Pruning": lambda: torch_pruned(None),
    "Torch-Pruning, round_to=16": lambda: torch_pruned(16),
    "Setpoint, half of the FLOPs": lambda: by_setpoint(setpoint.Budget.fraction(HALF, of="flops")),
    "Setpoint, half of the seconds": lambda: by_setpoint(
        setpoint.Budget.fraction(HALF, of="inference", runtime=OnnxRuntime())
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    example = mobilenetv2()[1]
    models = [make() for make in WAYS.values()]
    read: list[list[float]] = [[] for _ in models]
    for _ in range(LOADS):
        taken = in_turns([OnnxRuntime().load(answering(model), example) for model in models])
        read = [seconds + more for seconds, more in zip(read, taken, strict=True)]
    flops = [step_flops(model, example) for model in models]
    rows: list[dict[str, Any]] = [
        {
            "model": way,
            "flops_ratio": each / flops[0],
            "seconds": statistics.median(seconds),
            "of_dense_quartiles": quartiles(ratios(seconds, read[0])),
        }
        for way, each, seconds in zip(WAYS, flops, read, strict=True)
    ]
    versions = {package: package_version(package) for package in ("onnxruntime", "torch-pruning")}
    keep({"seed": 0, "versions": versions, "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
