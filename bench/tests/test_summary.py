"""Results and their summary: written, read back, and added up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from setpoint_bench.report.folder import read_results
from setpoint_bench.results import FILE, Result, append_result, held, load_results, mend
from setpoint_bench.summary import summarise
from setpoint_bench.task import BenchError

DENSE = Result(
    task="digits",
    method="dense",
    budget=None,
    seed=0,
    metric="accuracy",
    value=0.9,
    split="test",
    final_flops=1000.0,
    claimed_flops=None,
    final_params=100,
    train_flops=10_000.0,
    seconds=8.0,
    evaluation_seconds=1.0,
    overhead_seconds=0.0,
    overhead_flops=0.0,
    resizes=0,
    budget_met=None,
    steps=10,
    widths={"a": 8},
    dense_widths={"a": 8},
    environment={"python": "3.11"},
    date="2026-01-01T00:00:00+00:00",
    folder="digits-dense-seed0",
)
PRUNED = replace(
    DENSE,
    method="setpoint",
    budget=0.5,
    value=0.88,
    final_flops=499.0,
    claimed_flops=499.0,
    train_flops=6000.0,
    seconds=5.0,
    overhead_seconds=0.5,
    overhead_flops=60.0,
    resizes=3,
    budget_met=True,
    widths={"a": 4},
)


def test_results_round_trip(tmp_path: Path) -> None:
    """What is appended is read back; a line that an interruption cut short is left out, then replaced."""
    append_result(tmp_path, DENSE)
    with (tmp_path / FILE).open("a", encoding="utf-8") as file:
        file.write('{"schema": 1, "task": "dig')
    assert [cell.method for cell in read_results(tmp_path).cells] == ["dense"]
    append_result(tmp_path, PRUNED)
    cells = read_results(tmp_path).cells
    assert [cell.method for cell in cells] == ["dense", "setpoint"]
    for cell, result in zip(cells, (DENSE, PRUNED), strict=True):
        for name in ("budget", "value", "final_flops", "train_flops", "seconds", "budget_met", "widths", "resizes"):
            assert getattr(cell, name) == getattr(result, name)
    assert (tmp_path / FILE).read_text(encoding="utf-8").count("\n") == 2


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    """A file that was copied or edited may lack its last newline: its last result counts, and stays."""
    append_result(tmp_path, DENSE)
    append_result(tmp_path, PRUNED)
    path = tmp_path / FILE
    path.write_text(path.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")
    assert [cell.method for cell in read_results(tmp_path).cells] == ["dense", "setpoint"]
    assert [result.method for result in load_results(tmp_path)] == ["dense", "setpoint"]
    mend(path)
    assert [result.method for result in load_results(tmp_path)] == ["dense", "setpoint"]
    assert path.read_text(encoding="utf-8").endswith("}\n")


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    """A second process is told that the first is at work; a folder that cannot be made is named."""
    with held(tmp_path), pytest.raises(BenchError, match="another setpoint bench is at work"), held(tmp_path):
        pass
    with held(tmp_path):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(BenchError, match="cannot be written"), held(tmp_path / "file" / "folder"):
        pass


def test_ratios_are_to_dense() -> None:
    """Ratios and savings of one seed follow from its dense run."""
    methods = summarise([DENSE, PRUNED])["methods"]
    pruned = methods["setpoint"]
    assert methods["dense"]["accuracy"] == 0.9
    assert pruned["final_flops_ratio"] == pytest.approx(0.499)
    assert pruned["train_flops_ratio"] == pytest.approx(0.6)
    assert pruned["seconds_saved_per_flops_saved"] == pytest.approx((3 / 8) / 0.4)
    assert pruned["overhead_flops_ratio"] == pytest.approx(0.01)
    assert pruned["budget_met"] is True
    assert pruned["counter_agrees"] is True
    assert "counter_agrees" not in summarise([DENSE, replace(PRUNED, claimed_flops=None)])["methods"]["setpoint"]


def test_seeds_are_averaged() -> None:
    """Several seeds give means and the runs beside them; what fails in one seed fails in the mean."""
    again = [replace(DENSE, seed=1, value=1.0), replace(PRUNED, seed=1, value=0.9, budget_met=False, claimed_flops=7.0)]
    methods = summarise([DENSE, PRUNED, *again])["methods"]
    assert methods["dense"]["accuracy"] == pytest.approx(0.95)
    assert methods["setpoint"]["accuracy"] == pytest.approx(0.89)
    assert methods["setpoint"]["budget_met"] is False
    assert methods["setpoint"]["counter_agrees"] is False
    assert [run["seed"] for run in methods["setpoint"]["runs"]] == [0, 1]
