"""Results: one line of JSON per finished cell, and the history of each cell in its own folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SCHEMA = 1
FILE = "results.jsonl"
HISTORY = "history.jsonl"
LEDGER = "ledger.jsonl"
MODEL = "model.safetensors"


@dataclass(frozen=True)
class Result:
    """What one cell (task, method, budget, seed) came to.

    Args:
        task: name of the task.
        method: name of the method.
        budget: fraction of the dense FLOPs per step; None where the method has none.
        seed: seed of weights, data order and augmentation.
        metric: "accuracy" or "loss" (nats).
        value: the metric on `split`, after the last step.
        split: "test" or "validation".
        final_flops: FLOPs of one optimizer step of the finished model, by the independent counter.
        claimed_flops: the same by Setpoint's own cost; None where Setpoint took no part.
        final_params: parameters of the finished model.
        train_flops: FLOPs of all optimizer steps, overhead included.
        seconds: wall-clock time of training, overhead included, evaluation excluded.
        evaluation_seconds: wall-clock time of evaluation.
        overhead_seconds: the part of `seconds` that Setpoint spent.
        overhead_flops: the part of `train_flops` that Setpoint spent.
        resizes: how many times the model was cut.
        landed: whether it landed within the budget; None where there was nothing to land.
        steps: optimizer steps.
        widths: active units by group at the end.
        dense_widths: the same at the start.
        dense_flops: FLOPs per step of the model that pruning began with; None where Setpoint took no part.
        environment: what the numbers depend on.
        date: when the cell finished, ISO 8601 in UTC.
        folder: the cell's folder, relative to the results file.
        theoretical_flops: FLOPs of one step of the finished model if only weights that are not masked cost any;
            None where no weights are masked. `final_flops` is what is realised on this hardware.
        theoretical_train_flops: the same for all optimizer steps.
        density: kept fraction of the weights that may be masked; None where none are.
        break_even_step: first step at which the seconds saved exceed the overhead; None if never.
        notes: what a reader must know, such as a search that is not counted.
        family: what kind of method it is, such as "post-training".
        schema: version of this format.
    """

    task: str
    method: str
    budget: float | None
    seed: int
    metric: str
    value: float
    split: str
    final_flops: float
    claimed_flops: float | None
    final_params: int
    train_flops: float
    seconds: float
    evaluation_seconds: float
    overhead_seconds: float
    overhead_flops: float
    resizes: int
    landed: bool | None
    steps: int
    widths: Mapping[str, int]
    dense_widths: Mapping[str, int]
    environment: Mapping[str, str | int]
    date: str
    folder: str
    dense_flops: float | None = None
    theoretical_flops: float | None = None
    theoretical_train_flops: float | None = None
    density: float | None = None
    break_even_step: int | None = None
    notes: str = ""
    family: str = ""
    schema: int = field(default=SCHEMA)


def append_result(folder: Path, result: Result) -> None:
    """Append one result as one line; a line left half-written by an interrupted run is cut off first."""
    path = folder / FILE
    if path.exists():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            path.write_bytes(content[: content.rfind(b"\n") + 1])
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(result)) + "\n")
