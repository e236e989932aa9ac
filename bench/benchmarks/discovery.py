"""How long discovery takes, and how much memory: GPT-2 at 12, 24 and 48 layers, and the models people name.

    python bench/benchmarks/discovery.py --out results/discovery.json

On one thread, each model in a fresh process, after torch's exporter has been loaded once. Memory is the growth of
the process's peak resident set over what it held with the model built, against the bytes of the model's tensors.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

import setpoint
from setpoint.groups.export import export
from setpoint.report.target import named_model
from setpoint_bench.catalogue import task_named
from setpoint_bench.environment import environment
from setpoint_bench.zoo import transformers_model

ROUNDS = 3
LAYERS = (12, 24, 48)
NAMED = ("torchvision:resnet50", "torchvision:vit_b_16", "timm:convnext_tiny", "transformers:bert")


def gpt(layers: int) -> tuple[nn.Module, Any]:
    """GPT-2 with so many layers of its smallest size (12 of them are the model of 124 million parameters)."""
    import transformers

    return transformers_model(transformers.AutoConfig.for_model("gpt2", n_layer=layers))


def peak_bytes() -> int:
    """The most that this process has held so far (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(target: str) -> dict[str, Any]:
    """Discovery of one model in this process."""
    torch.set_num_threads(1)
    setpoint.find_groups(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(2, 4),))
    model, example = gpt(int(target.removeprefix("gpt2-"))) if target.startswith("gpt2-") else named_model(target, None)
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    before = peak_bytes()
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        groups = setpoint.find_groups(model, example)
        seconds.append(time.process_time() - start)
    grown = peak_bytes() - before
    ops = sum(node.op == "call_function" for node in export(model, example).graph.nodes)
    return {
        "model": target,
        "ops": ops,
        "groups": len(groups),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds,
        "seconds_median": statistics.median(seconds),
        "model_bytes": size,
        "peak_growth_bytes": grown,
        "peak_growth_in_models": grown / size,
    }


def main() -> None:
    """Measure every model in a process of its own, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/discovery.json"))
    parser.add_argument("--one", help="measure this model in this process and print the record")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    rows = []
    for target in (*(f"gpt2-{layers}" for layers in LAYERS), *NAMED):
        command = [sys.executable, __file__, "--one", target]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        row = rows[-1]
        print(f"{target}: {row['ops']} ops, {row['groups']} groups, {row['seconds_median']:.2f} s, "
              f"memory {row['peak_growth_in_models']:.2f} of the model")  # fmt: skip
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {**environment(task_named("digits")), "threads": 1},
        "rounds": ROUNDS,
        "models": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
