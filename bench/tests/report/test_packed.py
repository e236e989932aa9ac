"""Packed results are read as the runs that they were made from."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from setpoint_bench.report.folder import read_results

ROOT = Path(__file__).resolve().parents[2]


def pack(runs: Path, tables: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "pack.py"), str(runs), str(tables), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def add_timing(runs: Path, seconds: float) -> None:
    line = {"schema": 2, "task": "digits", "method": "dense", "budget": 1.0, "seed": 0, "seconds": seconds}
    with (runs / "timing.jsonl").open("a") as file:
        file.write(json.dumps({**line, "rounds": [seconds], "date": "2027-01-01"}) + "\n")


def test_packed_runs_are_read_as_they_were(make_results: Any, tmp_path: Path) -> None:
    """Cells, histories and timings come back as they were, and of the ledgers that of the first seed at each budget."""
    runs, tables = make_results(budgets=(0.5, 0.25)), tmp_path / "tables"
    add_timing(runs, 3.0)
    add_timing(runs, 4.0)
    assert pack(runs, tables).returncode == 0
    before, after = read_results(runs), read_results(tables)
    assert [replace(cell, record=None) for cell in after.cells] == [replace(cell, record=None) for cell in before.cells]
    assert len(before.cells[0].history) == 510 and before.cells[0].timing and before.cells[0].timing.seconds == 4.0
    kept = {(cell.budget, cell.seed): cell.record for cell in after.cells if cell.record is not None}
    assert kept == {(cell.budget, 0): cell.record for cell in before.cells if cell.record and cell.seed == 0}
    assert len(kept) == 2 and after.remarks == ()


def test_runs_are_added_to_tables(make_results: Any, tmp_path: Path) -> None:
    """Runs of another folder join the tables; one that is there already is replaced, its history too."""
    runs, tables = make_results(methods=("dense", "setpoint"), seeds=(1,)), tmp_path / "tables"
    assert pack(runs, tables).returncode == 0
    runs.rename(tmp_path / "old")
    again = make_results(methods=("setpoint", "small"), seeds=(0, 1), value=0.5)
    (history,) = again.glob("digits-setpoint-*-1/history.jsonl")
    history.write_text('{"step": 7, "split": "validation", "loss": 0.25}\n')
    assert pack(again, tables).returncode == 0
    cells = {(cell.method, cell.seed): cell for cell in read_results(tables).cells}
    assert list(cells) == [("dense", 1), ("setpoint", 0), ("small", 0), ("setpoint", 1), ("small", 1)]
    assert cells["dense", 1].value != 0.5 and cells["setpoint", 1].value == 0.5
    assert [(point.step, point.loss) for point in cells["setpoint", 1].history] == [(7, 0.25)]
    assert len(cells["dense", 1].history) == 510
    assert cells["setpoint", 0].record is not None and cells["setpoint", 1].record is None
    assert len(list(tables.rglob("ledger.jsonl"))) == 1
    assert pack(again, tables, "--ledgers", "small").returncode == 0
    assert not list(tables.rglob("ledger.jsonl"))
