"""What becomes of the loss after states are cut: moments carried, reset, left in place, or no balancing at all.

    python bench/benchmarks/moments.py --out results/moments.json

A classifier of 96 states learns which of ten frequencies is hidden in noise. After 300 steps its states are cut, in
each way from the same state of model and optimizer, and training goes on over the same batches. The loss is that on
sequences which training never sees.

* `carry`: the layer is balanced, truncated and diagonalised; moments follow through the same change of basis.
* `reset`: the same truncation; the layer's optimizer state begins anew.
* `position`: the same truncation; each kept position keeps the moments that stood there, of a mode that is gone.
* `first`: no balancing: the first n modes stay as they are, with their own moments.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from record import keep
from torch import Tensor

from setpoint.groups.trace import find_groups
from setpoint.states import BalancedPairs, balance
from setpoint_bench.balance_and_shrink import balance_and_shrink
from setpoint_bench.models import SequenceClassifier

WAYS = ("carry", "reset", "position", "first")
AFTER = (0, 1, 5, 20, 100)
"""Steps after the cut at which the loss is told."""
STATES, STEPS, LENGTH, BATCH, RATE = 96, 300, 64, 50, 4e-3


def patterns(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Noise with a sine of one of ten frequencies in it, and which one it is."""
    y = torch.randint(0, 10, (count,), generator=generator)
    phase = 6.3 * torch.rand(count, 1, generator=generator)
    wave = torch.sin(torch.arange(LENGTH) * (0.2 + 0.1 * y[:, None]) + phase)
    return (0.7 * wave + torch.randn(count, LENGTH, generator=generator)).unsqueeze(-1), y


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int) -> None:
    """Some steps, on batches that the seed draws."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = patterns(generator, BATCH)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss_elsewhere(model: torch.nn.Module) -> float:
    """Loss on a thousand sequences of their own, in evaluation mode."""
    x, y = patterns(torch.Generator().manual_seed(10**6), 1000)
    loss = F.cross_entropy(model.eval()(x), y).item()
    model.train()
    return loss


def cut(model: SequenceClassifier, optimizer: torch.optim.Optimizer, way: Any, kept: int) -> None:
    """Cut the states in one of the ways."""
    groups = tuple(group for group in find_groups(model, (torch.randn(2, LENGTH, 1),)) if group.kind == "state")
    keep = {group.name: np.arange(STATES) < kept for group in groups}
    bases = {group.name: BalancedPairs(balance(model.blocks[0].lru.state_space())) for group in groups}
    if way == "first":
        balance_and_shrink(model, optimizer, groups, keep, {})
    else:
        balance_and_shrink(model, optimizer, groups, keep, bases, moments=way)


def runs(seed: int) -> Iterator[dict[str, Any]]:
    """One dense run to the cut, and every way on from there."""
    torch.manual_seed(seed)
    model = SequenceClassifier(1, 10, num_channels=8, num_states=STATES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    train(model, optimizer, seed, STEPS)
    before = loss_elsewhere(model)
    for kept in (STATES // 2, STATES // 8):
        for way in WAYS:
            one, its = copy.deepcopy((model, optimizer))
            cut(one, its, way, kept)
            done, losses = 0, []
            for steps in AFTER:
                train(one, its, 1000 * (seed + 1) + done, steps - done)
                done = steps
                losses.append(loss_elsewhere(one))
            yield {"seed": seed, "kept": kept, "way": way, "before": before, "after": losses}


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the record")
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "states": STATES,
        "steps": STEPS,
        "after": AFTER,
        "runs": [run for seed in range(arguments.seeds) for run in runs(seed)],
    }
    keep(found, arguments.out)


if __name__ == "__main__":
    main()
