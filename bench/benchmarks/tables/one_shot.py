"""The table of models that are cut at once: by method, task and budget, as cut and after a little training."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from setpoint.report.numbers import NOTHING, digits, percent
from setpoint_bench.report.statistics import paired
from tables.words import made_on, marked

NAMES = {
    "finetune": "small CNN, CIFAR-10",
    "resnet56": "ResNet-56, CIFAR-10",
    "clothing": "EfficientNet-Lite0, clothes",
    "banking77": "MiniLM-L6, BANKING77",
    "llama": "small Llama, Shakespeare",
}
OURS = "compress"

Row = Mapping[str, Any]


def one_shot_table(path: Path) -> str:
    """Two tables: as cut, and after a tenth of the task's steps."""
    if not path.exists():
        return "Not measured yet."
    data = json.loads(path.read_text(encoding="utf-8"))
    parts = (
        ("As cut, without any training:", "value"),
        (f"After {percent(data['recovery'])} of the task's steps:", "recovered"),
    )
    tables = (f"{title}\n\n{_table(data['rows'], key)}" for title, key in parts)
    return "\n\n".join([*tables, f"Seeds are in brackets. {made_on(data)}"])


def _table(rows: Sequence[Row], key: str) -> str:
    methods = list(dict.fromkeys(row["method"] for row in rows if row["budget"] is not None))
    heads = ["model", "FLOPs", "dense", *(f"`{name}`" for name in methods), "`compress` ahead of the best other"]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for task, words in NAMES.items():
        of_task = [row for row in rows if row["task"] == task]
        for budget in sorted({row["budget"] for row in of_task} - {None}, reverse=True):
            cells = {
                name: {
                    row["seed"]: row[key]
                    for row in of_task
                    if (row["method"], row["budget"]) == (name, budget) and key in row
                }
                for name in methods
            }
            dense = {row["seed"]: row["value"] for row in of_task if row["method"] == "dense"}
            metric = of_task[0]["metric"]
            shown = [_mean(dense, metric), *(_mean(cells[name], metric) for name in methods)]
            lines.append(f"| {words} | {percent(budget)} | {' | '.join(shown)} | {_ahead(cells, metric)} |")
    return "\n".join(lines)


def _mean(values: Mapping[int, float], metric: str) -> str:
    if not values:
        return NOTHING
    mean = statistics.mean(values.values())
    return f"{percent(mean) if metric == 'accuracy' else digits(mean)} ({len(values)})"


def _ahead(cells: Mapping[str, Mapping[int, float]], metric: str) -> str:
    """How far our default is ahead of the other one of the best mean."""
    others = {name: found for name, found in cells.items() if name != OURS and found}
    if not others or not cells.get(OURS):
        return NOTHING
    sign = 1 if metric == "accuracy" else -1
    best = max(others, key=lambda name: sign * statistics.mean(others[name].values()))
    pairs = [sign * (value - others[best][seed]) for seed, value in cells[OURS].items() if seed in others[best]]
    return f"{marked(paired(pairs), metric)} (`{best}`)" if pairs else NOTHING
