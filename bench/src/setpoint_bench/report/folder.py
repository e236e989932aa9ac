"""A results folder, read leniently: lines of its files become cells, also where old versions left keys out."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from setpoint.checkpoint.plain import json_object
from setpoint.errors import CheckpointError, ReportError
from setpoint.ledger import Ledger
from setpoint.report.record import Record, integer, mapping, number, record_of
from setpoint_bench.report.packed import file_of, read_histories, text_of
from setpoint_bench.report.results import Cell, Point, Results, Timing

SCHEMA = 2
"""The version of the format that is written today."""
METRICS = ("accuracy", "loss")
SCHEMAS = (1, 2)
"""The versions that are read: the second only added keys."""
KNOWN_FAMILIES = ("dense", "small", "setpoint")
"""Families whose methods the first version of the format knew by their names alone."""
NUMBERS = (
    *("budget", "final_flops", "final_params", "train_flops", "seconds", "overhead_seconds", "overhead_flops"),
    *("theoretical_flops", "theoretical_train_flops", "density", "energy_j"),
)
INTEGERS = ("resizes", "steps")
"""Keys of a result that are read as they are: one of another kind counts as missing."""
RESULTS = "results.jsonl"
HISTORY = "history.jsonl"
LEDGER = "ledger.jsonl"
TIMING = "timing.jsonl"


def read_results(folder: Path) -> Results:
    """Read a results folder.

    A half-written last line, as a run that was interrupted leaves it, is left out and remarked upon; so
    are missing histories and ledgers.

    Args:
        folder: holds `results.jsonl` and the cells' folders, or both packed (see docs/results-format.md).

    Raises:
        ReportError: if there is no results file or no result in it, or if one is damaged, has an unknown schema
            or lacks what every result has.
    """
    path = file_of(folder, RESULTS)
    if not path.is_file():
        raise ReportError(
            f"no {RESULTS} in {folder}: give the folder that `setpoint bench --out` wrote, or a ledger's file"
        )
    remarks: list[str] = []
    cells: dict[tuple[Any, ...], Cell] = {}
    histories = read_histories(folder)
    for position, line in enumerate(read_lines(path, RESULTS, remarks, whole=True), start=1):
        cell = read_cell(folder, line, histories, f"result {position} of {path}", remarks)
        key = (cell.task, cell.method, cell.budget, cell.seed)
        # Popped first, so that a repeated run stands where it was written last.
        cells.pop(key, None)
        cells[key] = cell
    for key, timing in read_timings(folder, remarks).items():
        if key in cells and timing.date and timing.date < cells[key].date:
            remarks.append(f"{key[1]} of seed {key[3]} was run again after it was timed: its seconds are left out")
        elif key in cells:
            cells[key] = replace(cells[key], timing=timing)
    if not cells:
        raise ReportError(f"{path} holds no complete result yet: wait for the first run to end")
    return Results(tuple(cells.values()), tuple(remarks))


def read_timings(folder: Path, remarks: list[str]) -> dict[tuple[Any, ...], Timing]:
    """The timings of a folder by task, method, budget and seed; of several the last one counts.

    Raises:
        ReportError: if one has an unknown schema.
    """
    path, found = file_of(folder, TIMING), {}
    for line in read_lines(path, TIMING, remarks) if path.is_file() else ():
        if line.get("schema") not in SCHEMAS:
            raise ReportError(f"{path} has schema {line.get('schema')!r}: delete it")
        if (seconds := number(line.get("seconds"))) is None:
            continue
        load = line.get("load")
        key = (str(line.get("task")), str(line.get("method")), number(line.get("budget")), integer(line.get("seed")))
        found[key] = Timing(
            seconds=seconds,
            rounds=numbers(line.get("rounds")),
            own_seconds=number(line.get("own_seconds")) or 0.0,
            load=number(load[0]) if isinstance(load, list) and load else None,
            control=numbers(line.get("control")),
            environment=texts(line.get("environment")),
            date=str(line.get("date") or ""),
        )
    return found


def read_lines(path: Path, name: str, remarks: list[str], *, whole: bool = False) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line; incomplete lines are skipped with a remark.

    With `whole`, only a last line without an end may be incomplete, as an interruption leaves it.

    Raises:
        ReportError: another line of a `whole` file is incomplete.
    """
    found = []
    for place, line in enumerate(io.StringIO(text_of(path)), start=1):
        if not line.strip():
            continue
        if (value := json_object(line)) is not None:
            found.append(value)
        elif whole and line.endswith("\n"):
            raise ReportError(f"line {place} of {path} is damaged: delete that line; its run can be done again")
        else:
            remarks.append(f"line {place} of {name} is not a complete JSON object and was left out")
    return found


def read_cell(
    folder: Path,
    line: Mapping[str, Any],
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    where: str,
    remarks: list[str],
) -> Cell:
    """One cell from its line of the results file, with its history, packed or in its folder, and its ledger."""
    if line.get("schema") not in SCHEMAS:
        raise ReportError(
            f"{where} has schema {line.get('schema')!r}, this version of Setpoint reads schema "
            f"{' and '.join(map(str, SCHEMAS))}: "
            "use the version that wrote it, or run the benchmark again"
        )
    missing = [key for key in ("task", "method", "value") if key not in line]
    if missing:
        raise ReportError(f"{where} lacks {', '.join(missing)}: every result has task, method and value")
    metric = line.get("metric", "accuracy")
    if metric not in METRICS:
        raise ReportError(f"{where} has metric {metric!r}, this version of Setpoint reads {' and '.join(METRICS)}")
    task, method, seed = str(line["task"]), str(line["method"]), integer(line.get("seed"))
    value = number(line["value"])
    home, name = cell_folder(folder, line), f"{task} {method} seed {seed}"
    packed = histories.get(str(line.get("folder")))
    plain: dict[str, Any] = {key: number(line.get(key)) for key in NUMBERS}
    plain |= {key: integer(line.get(key)) for key in INTEGERS}
    return Cell(
        task=task,
        method=method,
        value=math.nan if value is None else value,
        metric=metric,
        split=line.get("split", "test"),
        seed=seed,
        budget_met=line["budget_met"] if isinstance(line.get("budget_met"), bool) else None,
        widths=counts(line.get("widths")),
        dense_widths=counts(line.get("dense_widths")),
        environment=texts(line.get("environment")),
        date=str(line.get("date", "")),
        family=str(line.get("family") or (method if method in KNOWN_FAMILIES else "")),
        clock=str(line.get("clock", "interleaved")),
        notes=str(line.get("notes") or ""),
        unit=str(line["unit"]) if isinstance(line.get("unit"), str) else "nats",
        history=read_history(home, name, remarks) if packed is None else points_of(packed),
        record=read_record(home, name, remarks),
        **plain,
    )


def cell_folder(folder: Path, line: Mapping[str, Any]) -> Path | None:
    """The folder of a cell; None if it has none or names one outside the results folder."""
    if not line.get("folder"):
        return None
    home = folder / str(line["folder"])
    return home if home.resolve().is_relative_to(folder.resolve()) and home.is_dir() else None


def read_history(home: Path | None, name: str, remarks: list[str]) -> tuple[Point, ...]:
    """The history of a cell; empty, with a remark, if there is none."""
    if home is None or not (home / HISTORY).is_file():
        remarks.append(f"{name}: no {HISTORY}, so it is missing in the curves")
        return ()
    return points_of(read_lines(home / HISTORY, f"{HISTORY} of {name}", remarks))


def points_of(lines: Sequence[Mapping[str, Any]]) -> tuple[Point, ...]:
    """The lines of a history, but for those without a step."""
    return tuple(
        Point(
            step=step,
            seconds=number(line.get("seconds")),
            flops=number(line.get("flops")),
            split=str(line.get("split", "train")),
            loss=number(line.get("loss")),
            accuracy=number(line.get("accuracy")),
        )
        for line in lines
        if (step := number(line.get("step"))) is not None
    )


def read_record(home: Path | None, name: str, remarks: list[str]) -> Record | None:
    """The ledger of a cell; None if there is none."""
    if home is None or not (home / LEDGER).is_file():
        return None
    try:
        ledger = Ledger.load(home / LEDGER)
    except CheckpointError as error:
        remarks.append(f"{name}: its ledger could not be read, so its decisions are missing: {error}")
        return None
    return record_of(ledger)


def numbers(value: Any) -> tuple[float, ...]:
    items = value if isinstance(value, list) else []
    return tuple(found for item in items if (found := number(item)) is not None)


def texts(value: Any) -> dict[str, str]:
    return {str(key): str(item) for key, item in mapping(value).items()}


def counts(value: Any) -> dict[str, int]:
    return {str(key): count for key, item in mapping(value).items() if (count := integer(item)) is not None}
