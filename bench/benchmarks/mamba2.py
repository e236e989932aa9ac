"""Mamba-2 of transformers on tiny Shakespeare: states and heads pruned in training to half the cost, by three rankings.

    python bench/benchmarks/mamba2.py --data FOLDER --out results/mamba2.json

The same model, batches and times of cuts, and the same widths in the end; what differs is which states and heads go:
those that Setpoint ranks least (`ranking`: states by averaged Gramians, heads by Taylor), any (`random`), or those it
ranks first (`worst-first`). `dense` is the whole model.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from record import keep
from torch import Tensor, nn

import setpoint
from setpoint.groups.group import Group
from setpoint.sensor.chain import SensorChain
from setpoint.sensor.reading import Reading
from setpoint.states.selective import SelectiveSensor
from setpoint_bench.random_sensor import RandomSensor
from setpoint_bench.tasks.shakespeare import splits

WAYS = ("dense", "ranking", "random", "worst-first")
WINDOW, BATCH, STEPS, RATE = 64, 16, 300, 4e-3
SETTINGS = {
    "vocab_size": 65,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "state_size": 32,
    "expand": 2,
    "num_heads": 16,
    "head_dim": 8,
    "n_groups": 1,
    "chunk_size": 32,
    "use_cache": False,
}


@dataclass(frozen=True)
class WorstFirst:
    """A sensor turned over: what another ranks first goes first."""

    inner: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def read(self, state: Any, groups: tuple[Group, ...], step: int) -> Reading:
        """The reading with each group's order reversed."""
        reading = self.inner.read(state, groups, step)
        turned = {name: values.max() - values for name, values in reading.saliency.items()}
        return replace(reading, saliency=turned, calibrated=False)


def windows(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random stretches of text, one character longer than the model reads."""
    starts = torch.randint(0, len(text) - WINDOW, (count, 1), generator=generator)
    return text[starts + torch.arange(WINDOW + 1)]


def loss_of(model: nn.Module, stretch: Tensor) -> Tensor:
    """Mean cross-entropy of each next character, in nats."""
    logits = model(input_ids=stretch[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), stretch[:, 1:].flatten())


@torch.no_grad()
def loss_elsewhere(model: nn.Module, text: Tensor) -> float:
    """Loss on 256 stretches of the test text."""
    model.eval()
    stretches = windows(text, 256, torch.Generator().manual_seed(0)).split(32)
    found = sum(loss_of(model, each).item() for each in stretches) / len(stretches)
    model.train()
    return found


def run(way: str, seed: int, data: Path | None) -> dict[str, Any]:
    """One run."""
    started, text = time.process_time(), splits(data)
    torch.manual_seed(seed)
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**SETTINGS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    example = {"input_ids": windows(text["train"], BATCH, torch.Generator().manual_seed(1))[:, :-1]}
    groups = setpoint.find_groups(model, example)
    mixers = tuple(group for group in groups if group.what in ("state", "head"))
    ranking = SensorChain(SelectiveSensor(example), setpoint.TaylorSensor(BATCH * WINDOW))
    sensor = {"random": RandomSensor(seed), "worst-first": WorstFirst(ranking)}.get(way, ranking)
    loop = setpoint.attach(
        model,
        optimizer,
        setpoint.Budget.fraction(1.0 if way == "dense" else 0.5, of="flops"),
        example=example,
        total_steps=STEPS,
        groups=mixers,
        sensor=sensor,
        controller=setpoint.PricedController(
            setpoint.Schedule(warmup=0.2, settle=0.6, num_cuts=4), allocation="uniform"
        ),
        allow_lossy=True,
    )
    generator, right_after = torch.Generator().manual_seed(seed), []
    for _ in range(STEPS):
        loss = loss_of(model, windows(text["train"], BATCH, generator))
        loss.backward()
        widths = loop.widths
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if loop.widths != widths:
            right_after.append(loss_elsewhere(model, text["test"]))
    summary = loop.finish()
    return {
        "way": way,
        "seed": seed,
        "loss": loss_elsewhere(model, text["test"]),
        "right_after": right_after,
        "flops_ratio": summary.final_flops_ratio,
        "budget_met": summary.budget_met,
        "widths": dict(summary.widths),
        "dense_widths": dict(summary.dense_widths),
        "processor_seconds": time.process_time() - started,
    }


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder that holds karpathy/tiny_shakespeare")
    parser.add_argument("--out", type=Path, help="where to write the record; runs that it holds already are kept")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(arguments.out.read_text())["runs"] if arguments.out and arguments.out.exists() else []
    done = {(each["way"], each["seed"]) for each in known}
    cells = [(way, seed) for seed in range(arguments.seeds) for way in WAYS]
    found = {
        "steps": STEPS,
        "settings": SETTINGS,
        "runs": [*known, *(run(*cell, arguments.data) for cell in cells if cell not in done)],
    }
    keep(found, arguments.out)


if __name__ == "__main__":
    main()
