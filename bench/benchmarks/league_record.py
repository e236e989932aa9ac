"""What a league's folders hold, in one file, with milliseconds in ONNX Runtime and the int8 of each model shown.

    python bench/benchmarks/league_record.py clothing-mobilenet banking77 --runs runs/league --out results/league.json

Of each method the runs at its chosen rate are kept. Files of the first seed's models are timed at batch 1 on one
thread, forward by forward in turns. Shown are dense, the neighbour, Setpoint's default and, of each budget, the best
rival: their models of all seeds are quantized statically (dynamically without convolutions) and judged on test data.
What is measured for a model stays in the file until its run is another one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from int8 import accuracy, files_of
from league import FAILURES, RATES, at_rate
from record import held_in, write
from tables.league import DENSE, NEIGHBOUR, best_rivals, plain
from torch import nn

import setpoint
from setpoint.runtimes.files import opened
from setpoint.runtimes.onnx import OnnxRuntime
from setpoint.runtimes.runtime import in_turns
from setpoint_bench.catalogue import task_named
from setpoint_bench.environment import machine, package_version
from setpoint_bench.results import MODEL, load_results
from setpoint_bench.simple_task import SimpleTask, dense_widths

Row = dict[str, Any]


def runs_of(folder: Path, usual: int) -> list[Row]:
    """A row for each run at its method's chosen rate."""
    chosen = {(row["method"], row["budget"]): row["chosen"] for row in map(dict, held_in(folder / RATES))}
    # What no budget changes has a rate, too: results say no budget for it.
    chosen |= {(method, None): rate for (method, _), rate in chosen.items()}
    rows = []
    for part in sorted(folder.glob("x*")):
        results = load_results(part)
        dense = {each.seed: each for each in results if each.method == DENSE}
        for each in results:
            method, _, rate = each.method.partition("@learning_rate=")
            if at_rate(method, chosen.get((method, each.budget), 1.0)) != each.method:
                continue
            of = dense.get(each.seed)
            rows.append(
                {
                    "length": int(part.name[1:]),
                    "method": method,
                    "budget": each.budget,
                    "seed": each.seed,
                    "rate": float(rate or 1),
                    "value": each.value,
                    "steps": each.steps,
                    "flops": each.final_flops / of.final_flops if of else None,
                    "train_flops": each.train_flops / of.train_flops if of else None,
                    "date": each.date,
                    "model": f"{part.name}/{each.folder}",
                }
            )
    return rows


def built(task: SimpleTask, row: Row, folder: Path) -> tuple[SimpleTask, nn.Module]:
    """The task as the row's run saw it, and its model."""
    seen = task.for_seed(row["seed"])
    if plain(row["method"]) == NEIGHBOUR:
        seen = seen.neighbour_task()
    return seen, setpoint.load(folder / row["model"] / MODEL, into=seen.build(dense_widths(seen)))


def timed(task: SimpleTask, rows: Sequence[Row], folder: Path, quantized: bool) -> None:
    """Write milliseconds of the file of each row's model into the row, of floats or of eight bits."""
    forwards = []
    with tempfile.TemporaryDirectory() as made:
        for number, row in enumerate(rows):
            seen, model = built(task, row, folder)
            files = files_of(model, seen, Path(made) / f"{number}.x")
            way = "fp32" if not quantized else "dynamic" if "dynamic" in files else "static"
            row["way"] = way if quantized else row.get("way")
            forwards.append(opened(OnnxRuntime(), files[way], {"x": seen.data.split("test")[0][:1]}))
        for row, seconds in zip(rows, in_turns(forwards), strict=True):
            row["int8_ms" if quantized else "ms"] = 1e3 * statistics.median(seconds)


def judged(task: SimpleTask, row: Row, folder: Path) -> None:
    """Write the accuracy of the model in eight bits into the row."""
    seen, model = built(task, row, folder)
    with tempfile.TemporaryDirectory() as made:
        files = files_of(model, seen, Path(made) / "model.x")
        row["int8"] = accuracy(files["dynamic" if "dynamic" in files else "static"], seen)


def measured(task: SimpleTask, folder: Path, held: Mapping[str, Any]) -> Row:
    """The record of a task."""
    rows = runs_of(folder, task.steps)
    known = {(row["model"], row["date"]): row for row in held.get("runs", ())}
    for row in rows:
        row |= {key: value for key, value in known.get((row["model"], row["date"]), {}).items() if key not in row}
    first = min(row["seed"] for row in rows)
    one = [row for row in rows if row["seed"] == first]
    if any("ms" not in row for row in one):
        timed(task, one, folder, quantized=False)
    shown = {DENSE, NEIGHBOUR, *(method for pair in best_rivals(rows).values() for method in pair)}
    eight = [row for row in rows if plain(row["method"]) in {plain(each) for each in shown}]
    if any("int8_ms" not in row for row in eight if row["seed"] == first):
        timed(task, [row for row in eight if row["seed"] == first], folder, quantized=True)
    for row in eight:
        if "int8" not in row:
            judged(task, row, folder)
            print(f"{task.name} {row['model']}: {row['value']:.2%}, int8 {row['int8']:.2%}", flush=True)
    torch.manual_seed(0)
    seen = task.for_seed(first)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {**machine(), "threads": 1, "onnxruntime": package_version("onnxruntime")},
        "steps": task.steps,
        "before": seen.evaluate(seen.build(dense_widths(seen)), "test").accuracy,
        "failures": held_in(folder / FAILURES),
        "runs": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--runs", type=Path, default=Path("runs/league"))
    parser.add_argument("--steps", type=int, help="of length 1, in place of the task's own")
    parser.add_argument("--out", type=Path, default=Path("results/league.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.tasks:
        held = held_in(given.out).get("tasks", {})
        found = measured(task_named(name, steps=given.steps), given.runs / name, held.get(name, {}))
        write({"tasks": {**held, name: found}}, given.out)


if __name__ == "__main__":
    main()
