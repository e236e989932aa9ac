"""Whether it pays that truncated states may come back: the same runs without and with regrowth.

    python bench/benchmarks/state_regrowth.py --out results/state-regrowth.json

A classifier with two layers of 64 states learns which of ten frequencies is hidden in noise (as in moments.py), and its
states are pruned in training until a step takes 0.35 of the FLOPs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from moments import BATCH, LENGTH, RATE, loss_elsewhere, patterns, train
from record import keep

import setpoint
from setpoint_bench.models import SequenceClassifier

STATES, STEPS, BUDGET = 64, 500, 0.35


def run(seed: int, *, regrow: bool) -> dict[str, Any]:
    """One run."""
    torch.manual_seed(seed)
    model = SequenceClassifier(1, 10, num_channels=8, num_states=STATES, num_blocks=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    example = (patterns(torch.Generator().manual_seed(0), BATCH)[0],)
    loop = setpoint.attach(
        model,
        optimizer,
        setpoint.Budget.fraction(BUDGET, of="flops"),
        example=example,
        total_steps=STEPS,
        groups=tuple(group for group in setpoint.find_groups(model, example) if group.kind == "state"),
        controller=setpoint.PricedController(regrow=regrow),
    )
    train(model, optimizer, seed, STEPS)
    summary = loop.finish()
    return {
        "seed": seed,
        "regrow": regrow,
        "loss": loss_elsewhere(model),
        "widths": dict(summary.widths),
        "budget_met": summary.budget_met,
        "regrown_units": summary.regrown_units,
        "flops_ratio": summary.final_flops_ratio,
        "train_flops": summary.train_flops,
    }


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the record")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "states": STATES,
        "steps": STEPS,
        "length": LENGTH,
        "budget": BUDGET,
        "runs": [run(seed, regrow=regrow) for seed in range(arguments.seeds) for regrow in (False, True)],
    }
    keep(found, arguments.out)


if __name__ == "__main__":
    main()
