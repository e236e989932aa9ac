"""How discovery, decisions and cuts grow with a model: Llama's structure on the meta device, in depth and in width.

    python bench/benchmarks/growth.py --out results/growth.json

Processor seconds on one thread, each model in a fresh process, after torch's exporter has been loaded once. Depth: 12
to 96 layers of width 512. Width: 12 layers of width 256 to 8,192. Discovery is `find_groups` with nothing kept. The
decision is a late one at half of the FLOPs, on random saliency. The cut drops half of each group of a fresh copy. Each
number is a median of three, that of a decision one of fifteen. Python's garbage is collected before each call, and its
collection stays on within it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import keep_machine
from torch import nn

import setpoint
from setpoint.controller.plan import Observation
from setpoint.controller.priced import PricedController
from setpoint.cost.cost import flops_cost
from setpoint.groups.group import widths_of
from setpoint.groups.trace import trace
from setpoint.sensor.reading import Reading

SEED, ROUNDS, DECISIONS = 0, 3, 15
DEPTHS, WIDTHS = (12, 24, 48, 96), (256, 512, 1024, 2048, 4096, 8192)
MODELS = tuple(dict.fromkeys([*((depth, 512) for depth in DEPTHS), *((12, width) for width in WIDTHS)]))


def llama(layers: int, width: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A Llama of this depth and width, heads of 64 and 4 x as many neurons, on the meta device."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        use_cache=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).train()
        return model, {"input_ids": torch.zeros(2, 64, dtype=torch.long)}


def seconds(function: Callable[[], object]) -> float:
    """Processor seconds of a call; what was left over before is collected first, so that no call pays for another."""
    gc.collect()
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(layers: int, width: int) -> dict[str, Any]:
    """Seconds of each kind of work on one model, in this process."""
    torch.set_num_threads(1)
    setpoint.find_groups(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(2, 4),))
    model, example = llama(layers, width)
    discovery = [seconds(lambda: setpoint.find_groups(model, example)) for _ in range(ROUNDS)]
    traced = trace(model, example)
    groups = tuple(group for group in traced.groups if group.lossless)
    cost, dense, generator = flops_cost(traced), widths_of(traced.groups), np.random.default_rng(SEED)
    total = cost.total(dense)
    saliency = {group.name: generator.exponential(size=group.num_units) for group in groups}
    reading = Reading(500, saliency, num_samples=32, num_steps=100)
    controller = PricedController()
    decisions = []
    for _ in range(DECISIONS):
        state = controller.init(groups)
        seen = Observation(500, 1000, dense, dense, reading, {"flops": total}, {"flops": 0.5 * total}, {"flops": total})
        decisions.append(seconds(lambda state=state, seen=seen: controller.decide(state, seen, cost, groups)))
    keep_half = {group.name: np.arange(group.num_units) < group.num_units // 2 for group in groups}
    cuts = []
    for _ in range(ROUNDS):
        fresh = copy.deepcopy(model)
        cuts.append(seconds(lambda fresh=fresh: setpoint.shrink(fresh, None, traced.groups, keep_half)))
    return {
        "layers": layers,
        "width": width,
        "params": sum(parameter.numel() for parameter in llama(layers, width)[0].parameters()),
        "groups": len(groups),
        "units": sum(group.num_units for group in groups),
        "discovery_s": statistics.median(discovery),
        "decision_s": statistics.median(decisions),
        "cut_s": statistics.median(cuts),
        "rounds": {"discovery_s": discovery, "decision_s": decisions, "cut_s": cuts},
    }


def main() -> None:
    """Measure every model in a process of its own, print a line for each, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--models", default=None, help="LAYERSxWIDTH with commas; by default all ten")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*map(int, args.one.split("x")))))
        return
    chosen = args.models.split(",") if args.models else [f"{layers}x{width}" for layers, width in MODELS]
    rows = []
    for name in chosen:
        call = [sys.executable, __file__, "--one", name]
        rows.append(row := json.loads(subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout))
        shown = ", ".join(f"{kind} {1e3 * row[f'{kind}_s']:.0f} ms" for kind in ("discovery", "decision", "cut"))
        print(f"{row['layers']} layers, width {row['width']}, {row['units']:,} units: {shown}", flush=True)
    keep_machine({"seed": SEED, "models": rows}, args.out, shown={"models": len(rows)})


if __name__ == "__main__":
    main()
