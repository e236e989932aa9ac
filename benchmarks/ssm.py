"""State-space models: a training step by number of states, one reduction, and what moments do after a cut.

    python benchmarks/ssm.py --out results/ssm.json

On one thread, in processor seconds. The reference is CompreSSM's JAX code on one core of the two-core CPU that
this project is developed on: batch 50, 8 channels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from setpoint.actuator.balance import balance_and_shrink
from setpoint.bench.environment import machine
from setpoint.groups.trace import find_groups
from setpoint.models import LRU, SequenceClassifier
from setpoint.ssm import BalancedPairs, balance, reduce_modes

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


def patterns(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a sine of one of ten frequencies in it, and which one it is."""
    y = torch.randint(0, 10, (BATCH,), generator=generator)
    phase = 6.3 * torch.rand(BATCH, 1, generator=generator)
    wave = torch.sin(torch.arange(64) * (0.2 + 0.1 * y[:, None]) + phase)
    return (0.7 * wave + torch.randn(BATCH, 64, generator=generator)).unsqueeze(-1), y


def after_a_cut(moments: Any, seed: int, *, before: int = 300, after: int = 100, kept: int = 12) -> dict[str, Any]:
    """Training loss around a cut from 96 states in the middle of a run."""
    torch.manual_seed(seed)
    model = SequenceClassifier(1, 10, num_channels=CHANNELS, num_states=96)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for number in range(before + after):
        if number == before:
            groups = tuple(g for g in find_groups(model, (torch.randn(BATCH, 64, 1),)) if g.kind == "state")
            basis = {"blocks.0.lru": BalancedPairs(balance(model.blocks[0].lru.state_space()))}
            keep = {"blocks.0.lru": np.arange(96) < kept}
            balance_and_shrink(model, optimizer, groups, keep, basis, moments=moments)
        x, y = patterns(generator)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    mean = statistics.fmean
    return {
        "moments": moments,
        "seed": seed,
        "before": mean(losses[before - 20 : before]),
        "first": losses[before],
        "next_10": mean(losses[before + 1 : before + 11]),
        "highest": max(losses[before : before + 20]),
        "last_20": mean(losses[-20:]),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the record")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {**machine(), "threads": 1},
        "training_steps": steps(),
        "reduction": reduction(),
        "after_a_cut": [
            after_a_cut(moments, seed) for seed in range(arguments.seeds) for moments in ("carry", "reset", "position")
        ],
    }
    text = json.dumps(record)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
