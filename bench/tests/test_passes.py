"""Runs at a multiple of a task's passes: what is gathered, and the table of fine-tuning."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import script
from setpoint_bench.results import FILE

WHERE = {"environment": {"cpu": "a processor", "threads": "1", "torch": "2.13"}, "date": "2026-11-29T00:00:00"}


def _row(task: str, method: str, budget: float | None, seed: int, value: float, **more: Any) -> dict[str, Any]:
    final = {None: 100.0, 0.5: 50.0, 0.25: 25.0}[budget]
    facts = {"task": task, "method": method, "budget": budget, "seed": seed, "value": value, "split": "test"}
    costs = {"final_flops": final, "dense_flops": 100.0, "train_flops": 1e3, "steps": 40}
    return {**facts, **costs, **WHERE, **more}


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir()
    (folder / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_passes_are_steps_over_those_of_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a run of three times the steps has three passes; one that is made again takes the place of the earlier."""
    passes = script("passes", monkeypatch)
    steps = passes.task_named("digits").steps
    for name, value in (("once", 0.8), ("again", 0.9)):
        _write(tmp_path / name, [_row("digits", "setpoint", 0.5, 0, value, task_steps=3 * steps)])
    out = tmp_path / "out.json"
    for name in ("once", "again"):
        monkeypatch.setattr(sys, "argv", ["passes.py", str(tmp_path / name), "--out", str(out)])
        passes.main()
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert row["passes"] == 3 and row["value"] == 0.9


def test_the_table_sets_cut_models_beside_dense_and_small_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: differences are in points, paired by seed, with the dense and the small model of the same passes."""
    script("passes", monkeypatch)  # makes the tables importable
    from tables.fine_tuning import passes_table

    _write(tmp_path / "big", [_row("big", "dense", None, 0, 0.88), _row("big", "setpoint", 0.5, 0, 0.85)])
    _write(tmp_path / "small", [_row("small", "dense", None, 0, 0.86, final_flops=30.0)])
    longer = [
        _row("big", "dense", None, 0, 0.89, passes=4.0),
        _row("big", "setpoint", 0.5, 0, 0.887, passes=4.0),
        _row("small", "dense", None, 1, 0.87, passes=4.0, final_flops=30.0),
    ]
    (tmp_path / "longer.json").write_text(json.dumps({"rows": longer}), encoding="utf-8")
    table = passes_table(tmp_path / "longer.json", tmp_path, "big", "small").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table if line.startswith("|")][2:]
    assert [row[:4] for row in rows] == [
        ["1 x", "`dense`", "100 %", "88.00 %"],
        ["1 x", "`setpoint`", "50.0 %", "85.00 %"],
        ["1 x", "`small`", "30.0 %", "86.00 %"],
        ["4 x", "`dense`", "100 %", "89.00 %"],
        ["4 x", "`setpoint`", "50.0 %", "88.70 %"],
        ["4 x", "`small`", "30.0 %", "87.00 %"],
    ]
    assert rows[1][4].startswith("−3.00") and rows[1][5].startswith("−1.00") and rows[4][4].startswith("−0.30")
    assert rows[4][5] == "–", "no seed is common"


def test_runs_made_again_stand_beside_those_of_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a gain is paired by seed and above 0 where the run is better, for a loss too; other seeds are left out."""
    script("passes", monkeypatch)  # makes the tables importable
    from tables.costs import again_table

    before = [_row("text", "setpoint", 0.5, seed, 1.9 + seed / 10, metric="loss") for seed in range(4)]
    _write(tmp_path / "text", [*before, _row("text", "setpoint", 0.5, 0, 9.9, metric="loss") | {"split": "validation"}])
    _write(tmp_path / "big", [_row("big", "dense", None, 0, 0.88, metric="accuracy")])
    again = [_row("text", "setpoint", 0.5, seed, 1.88 + seed / 10) for seed in range(1, 5)]
    again.append(_row("big", "dense", None, 0, 0.87))
    (tmp_path / "again.json").write_text(json.dumps({"rows": again}), encoding="utf-8")
    table = again_table(tmp_path / "again.json", tmp_path).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table if line.startswith("|")][2:]
    assert rows[0] == ["`big`", "`dense`", "100 %", "88.00 %", "87.00 %", "−1.00 (n = 1)", "1"]
    assert rows[1][:5] == ["`text`", "`setpoint`", "50.0 %", "2.1000", "2.0800"]
    assert rows[1][5].strip("*").startswith("+0.0200 [+0.0200") and rows[1][6] == "3"
