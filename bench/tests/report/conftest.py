"""A made-up results folder, written the way the benchmark writes one."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from setpoint.ledger import Entry, Ledger

STEPS = 1000
DENSE_FLOPS = 2.4e9
GROUPS = {"stem.conv": 16, "stage1.0.conv1": 32, "stage1.0.conv2": 32, "stage2.0.conv1": 64, "head.fc": 24}
MakeResults = Callable[..., Path]


def history(rng: random.Random, pace: Callable[[int], float], ratio: Callable[[int], float], level: float) -> list[Any]:
    """Lines of a history: `pace` is seconds per step, `ratio` FLOPs per step / dense."""
    lines, seconds, flops = [], 0.0, 0.0
    for step in range(1, STEPS + 1):
        seconds += pace(step)
        flops += DENSE_FLOPS * ratio(step)
        now = {"step": step, "seconds": seconds, "flops": flops}
        loss = level + 2.2 * math.exp(-step / 180)
        if step % 2 == 0:
            lines.append({**now, "split": "train", "loss": loss + rng.gauss(0, 0.08)})
        if step % 100 == 0:
            lines.append({**now, "split": "validation", "loss": loss + 0.05, "accuracy": 1 - loss / 2.5})
    return lines


def ledger(rng: random.Random) -> Ledger:
    """A ledger of eight decisions that go from dense to half of the FLOPs; one unit comes back."""
    found = Ledger(
        {
            "groups": {name: {"num_units": num, "what": "channel"} for name, num in GROUPS.items()},
            "dense": {"flops": DENSE_FLOPS},
            "limit": {"flops": DENSE_FLOPS / 2},
            "total_steps": STEPS,
        }
    )
    alive = {name: list(range(num)) for name, num in GROUPS.items()}
    for decision in range(8):
        step, reference = 50 + 40 * decision, DENSE_FLOPS * (1 - (decision + 1) / 16)
        rate = 4e-13 * (1 + decision)
        gone = {name: sorted(rng.sample(units, len(units) // 12)) for name, units in alive.items()}
        grown = {"stem.conv": [sorted(set(range(16)) - set(alive["stem.conv"]))[0]]} if decision == 5 else {}
        for name, units in alive.items():
            alive[name] = sorted(set(units) - set(gone[name]) | set(grown.get(name, [])))
        worth = {name: [rng.uniform(0, rate) for _ in units] for name, units in gone.items()}
        found.append(
            Entry(
                step=step,
                widths={name: len(units) for name, units in alive.items()},
                dropped={name: units for name, units in gone.items() if units},
                grown=grown,
                loss=1.0,
                seconds=step * 0.02,
                reason="worth below the price" if decision else "first cut: reference left the dense cost",
                spent={"flops": reference * 0.995},
                reference={"flops": reference},
                price={"flops": rate},
                worth=worth,
                saliency={name: [value * 2e7 for value in values] for name, values in worth.items()},
                own_seconds={"sensing": 0.01, "deciding": 0.004, "resizing": 0.03},
            )
        )
    return found


def share_of(method: str) -> Callable[[int], float]:
    """FLOPs per step / dense, by step."""
    if method == "setpoint":
        return lambda step: 1 - 0.5 * min(1.0, max(0.0, (step - 50) / 300))
    return lambda step: 0.5 if method == "small" else 1.0


def write_cell(folder: Path, task: str, method: str, seed: int, metric: str, budget: float) -> dict[str, Any]:
    """Write one cell's files and give its line of the results file."""
    rng = random.Random(f"{method} {seed} {budget}")
    level = {"dense": 0.05, "small": 0.12}.get(method, 0.06)
    share = share_of(method)
    lines = history(rng, lambda step: 0.02 * (0.1 + 0.9 * share(step)), share, level)
    name = f"{task}-{method}-{budget:g}-{seed}".replace("/", "_").replace("<", "_")
    home = folder / name
    home.mkdir(parents=True)
    (home / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ours = method == "setpoint"
    if ours:
        ledger(rng).save(home / "ledger.jsonl")
    final = 0.5 if method != "dense" else 1.0
    accuracy = {"dense": 0.981, "small": 0.962}.get(method, 0.979) + rng.gauss(0, 0.002)
    return {
        "schema": 1,
        "task": task,
        "method": method,
        "budget": budget,
        "seed": seed,
        "metric": metric,
        "value": accuracy if metric == "accuracy" else 2.7 - accuracy,
        "split": "test",
        "final_flops": DENSE_FLOPS * final,
        "final_params": int(272_474 * (final + 0.03 * ours)),
        "train_flops": lines[-1]["flops"],
        "seconds": lines[-1]["seconds"],
        "overhead_seconds": 0.5 if ours else 0.0,
        "overhead_flops": 1e9 if ours else 0.0,
        "resizes": 8 if ours else 0,
        "budget_met": True if ours else None,
        "widths": {name: num // 2 for name, num in GROUPS.items()} if ours else {},
        "dense_widths": GROUPS,
        "environment": {"torch": "2.13.0", "cpu": "Example CPU", "threads": 2},
        "date": f"2026-01-0{seed + 1}T12:00:00+00:00",
        "folder": name,
    }


@pytest.fixture
def make_results(tmp_path: Path) -> MakeResults:
    """Writes a results folder for a task and gives its path; calls add to the same folder."""

    def make(
        task: str = "digits",
        methods: tuple[str, ...] = ("dense", "small", "setpoint"),
        seeds: tuple[int, ...] = (0, 1),
        metric: str = "accuracy",
        budgets: tuple[float, ...] = (0.5,),
        **changes: Any,
    ) -> Path:
        folder = tmp_path / "results"
        folder.mkdir(exist_ok=True)
        with (folder / "results.jsonl").open("a") as file:
            for seed in seeds:
                for method in methods:
                    for budget in budgets if method != "dense" else (1.0,):
                        line = write_cell(folder, task, method, seed, metric, budget)
                        file.write(json.dumps(line | changes) + "\n")
        return folder

    return make
