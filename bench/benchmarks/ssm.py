"""State-space models: a training step by number of states, and one reduction beside a step of a large layer.

    python bench/benchmarks/ssm.py --out results/ssm.json

On one thread, in processor seconds: batch 50, 8 channels. The reference is CompreSSM's JAX code, measured on one core
of another machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import keep

from setpoint.states import balance, reduce_modes
from setpoint_bench.models import LRU, SequenceClassifier

REFERENCE = {(784, 256): 1.55, (784, 28): 0.151, (196, 256): 0.331, (196, 28): 0.019}
BATCH, CHANNELS, ROUNDS = 50, 8, 7


def processor_seconds(work: Callable[[], object]) -> float:
    """Processor seconds of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def training_step(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """One step of AdamW on a fixed batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps() -> list[dict[str, Any]]:
    """Seconds of a training step at each size, sizes taken in turn."""
    torch.manual_seed(0)
    y = torch.randint(0, 10, (BATCH,))
    work = {
        (length, states): training_step(
            SequenceClassifier(1, 10, num_channels=CHANNELS, num_states=states), torch.randn(BATCH, length, 1), y
        )
        for length, states in REFERENCE
    }
    seconds: dict[tuple[int, int], list[float]] = {key: [] for key in work}
    for round_number in range(ROUNDS + 1):
        for key, step in work.items():
            taken = processor_seconds(step)
            if round_number:  # the first is a warm-up
                seconds[key].append(taken)
    return [
        {
            "steps": length,
            "states": states,
            "seconds": taken,
            "seconds_median": statistics.median(taken),
            "reference_seconds": REFERENCE[length, states],
            "times_faster": REFERENCE[length, states] / statistics.median(taken),
        }
        for (length, states), taken in seconds.items()
    ]


def reduction(states: int = 384, channels: int = 512, kept: int = 64, length: int = 1024) -> dict[str, Any]:
    """One reduction of a large layer beside one training step of that layer."""
    torch.manual_seed(0)
    layer = LRU(channels, states)
    x = torch.randn(BATCH, length, channels)

    def step() -> None:
        layer(x).square().mean().backward()

    system = layer.state_space()
    return {
        "states": states,
        "channels": channels,
        "kept": kept,
        "reduction_seconds": [processor_seconds(lambda: reduce_modes(system, kept, balance(system))) for _ in "123"],
        "step_seconds": [processor_seconds(step) for _ in "12"],
        "length": length,
        "batch": BATCH,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep({"training_steps": steps(), "reduction": reduction()}, arguments.out)


if __name__ == "__main__":
    main()
