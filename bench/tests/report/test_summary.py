"""The summary's rows equal what one computes by hand from the cells."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import pytest

from setpoint_bench.report.columns import columns, difference_columns
from setpoint_bench.report.folder import read_results
from setpoint_bench.report.results import Cell, Results, Timing
from setpoint_bench.report.summary import Row, summary_rows


def cells(method: str, values: list[float], **more: Any) -> list[Cell]:
    """One cell per value, with seeds from 0."""
    return [Cell(task="t", method=method, value=value, seed=seed, **more) for seed, value in enumerate(values)]


def row(found: list[Cell], label: str) -> Row:
    return {row.label: row for row in summary_rows(Results(tuple(found)))}[label]


def test_differences_are_paired_by_seed() -> None:
    """Seeds that move both models alike leave no spread in the difference."""
    ours = row(cells("dense", [0.9, 0.8, 0.7]) + cells("setpoint", [0.89, 0.79]), "setpoint")
    assert ours.difference and ours.difference.mean == pytest.approx(-0.01)
    assert ours.difference.deviation == pytest.approx(0.0, abs=1e-12)


def test_budgets_of_a_method_are_rows_of_their_own() -> None:
    """Rows go budget by budget, the larger first, each named by it; dense comes first, then small."""
    found = cells("setpoint", [0.8], budget=0.25) + cells("setpoint", [0.9], budget=0.5)
    found += cells("small", [0.8], budget=0.5, family="small") + cells("dense", [0.95], budget=1.0)
    labels = [row.label for row in summary_rows(Results(tuple(found)))]
    assert labels == ["dense", "small 0.5", "setpoint 0.5", "setpoint 0.25"]


def test_rivals_are_of_the_same_budget() -> None:
    """A method is compared with dense, and with small models and Setpoint at its budget alone; not with itself."""
    found = cells("dense", [0.95]) + cells("setpoint", [0.9], budget=0.5) + cells("setpoint", [0.8], budget=0.25)
    found += cells("small", [0.85], budget=0.5) + cells("small-long", [0.7], budget=0.25)
    half, quarter = row(found, "setpoint 0.5"), row(found, "setpoint 0.25")
    assert {name: round(each.mean, 3) for name, each in half.differences.items()} == {"dense": -0.05, "small": 0.05}
    assert {name: round(each.mean, 3) for name, each in quarter.differences.items()} == {
        "dense": -0.15,
        "small-long": 0.1,
    }
    assert set(row(found, "small 0.5").differences) == {"dense", "setpoint"}
    assert row(found, "dense").differences == {}


def test_timings_replace_the_clocks_of_the_runs() -> None:
    """With timings, seconds and overhead are theirs alone; what was not timed has none."""
    dense = cells("dense", [0.9], seconds=1.0, train_flops=100.0, timing=Timing(100.0, (99.0, 101.0)))
    timing = Timing(62.0, own_seconds=2.0)
    ours = cells("setpoint", [0.9], seconds=9.0, overhead_seconds=8.0, train_flops=60.0, timing=timing)
    other = cells("small", [0.9], seconds=1.0)
    found = row(dense + ours + other, "setpoint")
    assert (found.clock, found.seconds_ratio, found.overhead_seconds) == ("timed", 0.62, 2.0)
    assert row(dense + ours + other, "small").seconds is None
    spread = row(dense + ours + other, "dense").seconds
    assert spread and spread.deviation == pytest.approx(2**0.5)


def test_shares_are_taken_round_by_round() -> None:
    """A machine that slows down for a while moves seconds, not the share of dense, which has its range over rounds."""
    dense = cells("dense", [0.9, 0.8], train_flops=100.0, timing=Timing(120.0, (100.0, 200.0, 120.0)))
    ours = cells("setpoint", [0.9, 0.8], train_flops=50.0, timing=Timing(66.0, (50.0, 120.0, 66.0)))
    found = row(dense + ours, "setpoint")
    assert found.seconds_share and astuple(found.seconds_share) == pytest.approx((0.55, 0.5, 0.6))
    assert found.seconds and (found.seconds.mean, found.seconds.deviation) == (66.0, pytest.approx(36.68, abs=0.01))
    told = {column.heading: column.text(found) for column in columns([found])}
    assert told["time of dense"] == "55.0 % (50.0 to 60.0)"


def test_masked_models_are_shown_in_theory_and_as_they_are() -> None:
    """A mask that is counted at half of dense in theory spends all of it in fact."""
    dense = cells("dense", [0.9], final_flops=10.0, train_flops=100.0)
    masked = {"theoretical_flops": 5.0, "theoretical_train_flops": 60.0, "density": 0.4}
    found = row(dense + cells("rigl", [0.9], final_flops=10.0, train_flops=100.0, **masked), "rigl")
    assert (found.final_flops_ratio, found.theoretical_ratio) == (1.0, 0.5)
    assert (found.train_flops_ratio, found.theoretical_train_ratio, found.density) == (1.0, 0.6, 0.4)


def test_rows_as_texts(make_results: Any) -> None:
    """A row's texts stand under the headings, in human units; columns that nothing fills are left out."""
    rows = summary_rows(read_results(make_results()))
    texts = {column.heading: column.text(rows[-1]) for column in columns(rows)}
    assert texts["FLOPs / step"] == "1.2 GFLOPs" and texts["budget met"] == "2 of 2" and texts["cuts"] == "8"
    assert "energy" not in texts and "FLOPs / step in theory" not in texts
    assert [column.heading for column in difference_columns(rows)] == [
        *("method", "to dense", "to small", "to setpoint")
    ]
    assert difference_columns(rows)[1].text(rows[-1]).endswith("(n = 2)")
